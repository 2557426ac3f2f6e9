"""Which tokens are edited: every rule against one that decides token by token."""

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from preft_jax import ConfigError, RequestError
from preft_jax.adapters.edit_mask import extend_edit_mask, make_edit_mask
from preft_jax.adapters.positions import parse_positions

pytestmark = pytest.mark.host

counts = st.integers(0, 12)
lengths = st.integers(1, 40)


@st.composite
def rules(draw):
    """Draw a rule that edits something, in any of its spellings."""
    first, last = draw(counts), draw(counts)
    spellings = ["prompt", "all"]
    if first:
        spellings.append(f"f{first}")
    if last:
        spellings.append(f"l{last}")
    if first + last:
        spellings.append(f"f{first}+l{last}")
    return draw(st.sampled_from(spellings))


@st.composite
def masks(draw):
    """Draw the arguments of a mask: length, rule, groups and spans of earlier answers."""
    length, rule = draw(lengths), draw(rules())
    groups = draw(st.sampled_from([1, 2])) if rule.startswith(("f", "l")) else 1
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=6)))
    spans = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    return length, rule, groups, spans


@given(masks())
def test_mask_is_the_rule_applied_to_each_token(arguments):
    length, rule, groups, spans = arguments
    mask = make_edit_mask(length, rule, groups=groups, unedited_spans=spans)
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, reference.edit_mask(length, rule, groups, spans))


@given(masks(), st.integers(0, 5), st.integers(0, 5))
def test_extension_keeps_the_prompt_and_edits_generated_tokens_of_all_token_adapters_only(arguments, once, again):
    length, rule, groups, spans = arguments
    mask = make_edit_mask(length, rule, groups=groups, unedited_spans=spans)
    extended = extend_edit_mask(mask, once + again, rule)
    np.testing.assert_array_equal(extended[:length], mask)
    assert extended.shape == (length + once + again, 2)
    assert (extended[length:, 0] == (rule == "all")).all()
    assert not extended[length:, 1].any()
    np.testing.assert_array_equal(extend_edit_mask(extend_edit_mask(mask, once, rule), again, rule), extended)


@given(lengths, counts, counts)
def test_first_and_last_never_overlap_and_never_exceed_half_of_the_prompt(length, first, last):
    if first + last == 0:
        return
    mask = make_edit_mask(length, f"f{first}+l{last}", groups=2)
    assert not mask.all(axis=1).any()
    assert mask[:, 0].sum() == min(first, length // 2)
    assert mask[:, 1].sum() == min(last, length // 2)


@pytest.mark.parametrize(
    ("length", "edited"),
    [
        (20, [*range(7), *range(13, 20)]),
        (13, [*range(6), *range(7, 13)]),
        (4, [0, 1, 2, 3]),
        (3, [0, 2]),
        (2, [0, 1]),
        (1, []),
    ],
)
def test_f7_l7_takes_at_most_half_of_the_prompt_at_each_end(length, edited):
    assert np.flatnonzero(make_edit_mask(length, "f7+l7")[:, 0]).tolist() == edited


@pytest.mark.parametrize("positions", ["prompt", "all"])
def test_last_prompt_token_is_edited_also_when_it_is_the_only_one(positions):
    for length in (1, 2, 9):
        assert make_edit_mask(length, positions)[:, 0].all()
        assert not make_edit_mask(length, positions)[:, 1].any()


def test_first_or_last_alone():
    assert np.flatnonzero(make_edit_mask(10, "f3")[:, 0]).tolist() == [0, 1, 2]
    assert np.flatnonzero(make_edit_mask(10, "l3")[:, 0]).tolist() == [7, 8, 9]
    assert np.flatnonzero(make_edit_mask(10, "l3", groups=2)[:, 1]).tolist() == [7, 8, 9]


def test_spans_are_half_open_and_may_touch_the_ends():
    mask = make_edit_mask(8, "prompt", unedited_spans=[(0, 2), (4, 4), (7, 8)])
    assert np.flatnonzero(mask[:, 0]).tolist() == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("span", [(-1, 2), (3, 2), (0, 9)])
def test_a_span_outside_the_prompt_is_refused_with_its_numbers(span):
    with pytest.raises(RequestError, match=rf"\({span[0]}, {span[1]}\).*8 tokens"):
        make_edit_mask(8, "prompt", unedited_spans=[span])


def test_an_empty_prompt_is_refused():
    with pytest.raises(RequestError, match="empty"):
        make_edit_mask(0, "prompt")


@pytest.mark.parametrize(
    "positions",
    ["", "f", "l", "+", "f0", "f0+l0", "f-1", "f3l2", "f3+", "l2+f3", "+l2", "f3+f2", "F3+L2", "f3 + l2", "f3+l2\n",
     "first", "Prompt", "f1.5", "f٣", "f" + "9" * 5000, None, 7, ("prompt",)],
)  # fmt: skip
def test_what_is_not_a_rule_is_refused_by_name(positions):
    with pytest.raises(ConfigError, match="positions"):
        parse_positions(positions)


def test_parsed_rules():
    assert parse_positions("all").edits_generated
    assert not parse_positions("prompt").edits_generated
    rule = parse_positions("f7+l0")
    assert (rule.first, rule.last, rule.edits_generated) == (7, 0, False)
