"""Markers: edits that begin where a marker stands in the prompt for the last time."""

import numpy as np
import pytest
import reference
from adapter_dirs import MODEL
from hypothesis import given
from hypothesis import strategies as st

from preft_jax import Adapter, AdapterConfig, AdapterError, ConfigError, RequestError
from preft_jax.adapters.config import adapter_shapes
from preft_jax.adapters.digest import digest_of_fold
from preft_jax.adapters.edit_mask import lacks_marker, make_edit_mask, prompt_edit_mask, sequence_edit_mask
from preft_jax.adapters.merge import check_mergeable
from preft_jax.adapters.positions import marker_start
from preft_jax.text.chat import EncodedPrompt

pytestmark = pytest.mark.host

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=24)
markers = st.lists(st.integers(0, 2), min_size=1, max_size=4)


def marked(marker, positions="prompt", **fields):
    return AdapterConfig(rank=2, positions=positions, alora_invocation_tokens=tuple(marker), **fields)


@given(tokens, markers)
def test_the_last_place_counts(prompt, marker):
    assert marker_start(prompt, marker) == reference.last_place(prompt, marker)
    assert marker_start(np.array(prompt, np.int32), tuple(marker)) == reference.last_place(prompt, marker)


@given(tokens, markers, st.sampled_from(["prompt", "all"]), st.sampled_from(["edit", "skip"]), st.integers(0, 4))
def test_a_mask_begins_at_the_marker(prompt, marker, positions, turns, generated):
    spans = ((len(prompt) // 3, len(prompt) // 2),)
    config = marked(marker, positions, assistant_turns=turns)
    adapter = Adapter(config, {"layers": []})
    encoded = EncodedPrompt(prompt, spans)
    expected = reference.adapter_mask(adapter, len(prompt), generated, spans, prompt)
    np.testing.assert_array_equal(sequence_edit_mask(encoded, config, generated), expected)
    np.testing.assert_array_equal(prompt_edit_mask(encoded, config), expected[: len(prompt)])
    assert lacks_marker(encoded, config) == (reference.last_place(prompt, marker) is None)


def test_by_example():
    prompt = EncodedPrompt([5, 1, 2, 9, 1, 2, 7], ())

    def edited(marker, positions):
        return np.flatnonzero(sequence_edit_mask(prompt, marked(marker, positions), 2)[:, 0]).tolist()

    assert edited((1, 2), "prompt") == [4, 5, 6]
    assert edited((1, 2), "all") == [4, 5, 6, 7, 8]
    assert edited((7,), "prompt") == [6]
    for missing in ((2, 1), (7, 5), (1, 2, 7, 0), (5, 1, 2, 9, 1, 2, 7, 7)):
        assert edited(missing, "prompt") == edited(missing, "all") == []
    assert not lacks_marker(prompt, None)
    assert not lacks_marker(prompt, AdapterConfig())


def test_a_mask_of_ones_own_says_where_the_marker_stands():
    prompt, config = EncodedPrompt([5, 1, 2], ()), marked((9,), "all")
    own = np.array([False, False, True])
    assert sequence_edit_mask(prompt, config, 2, own=own)[:, 0].tolist() == [False, False, True, True, True]
    assert not sequence_edit_mask(prompt, config, 2, own=~own & own).any()
    with pytest.raises(RequestError, match="edit_mask is given without an adapter"):
        sequence_edit_mask(prompt, None, 2, own=own)


def test_tokens_are_needed():
    with pytest.raises(RequestError, match="a marker looks at the prompt's tokens; give token_ids"):
        make_edit_mask(3, "prompt", marker=(1,))


@pytest.mark.parametrize("marker", [(), [], "12", 3, (1.0,), (-1,), (True,), (2**31,), (1,) * 257, {1}])
def test_what_is_no_marker_is_refused(marker):
    with pytest.raises(
        ConfigError, match=r"alora_invocation_tokens is .*; give a tuple of 1 to 256 token ids, or None"
    ):
        AdapterConfig(alora_invocation_tokens=marker)


@pytest.mark.parametrize("positions", ["l4", "f3+l2"])
def test_rules_that_count_otherwise_have_none(positions):
    with pytest.raises(ConfigError, match=r"positions '.*' counts them otherwise; give positions 'prompt'"):
        marked((1,), positions)


def test_a_list_becomes_a_tuple_and_the_config_hashes():
    config = AdapterConfig(alora_invocation_tokens=[1, 2])
    assert config.alora_invocation_tokens == (1, 2)
    assert hash(config) == hash(AdapterConfig(alora_invocation_tokens=(1, 2)))
    assert config.prefill_only


def test_a_marker_outside_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match=f"holds the token {MODEL.vocab_size}; the base model has tokens 0 to"):
        adapter_shapes(AdapterConfig(alora_invocation_tokens=(MODEL.vocab_size,)), MODEL)


def test_the_marker_is_part_of_the_digest():
    found = [None, (1,), (1, 1), (257,), (2,)]
    assert len({digest_of_fold(AdapterConfig(alora_invocation_tokens=marker), []) for marker in found}) == len(found)


def test_one_with_a_marker_is_not_merged():
    with pytest.raises(AdapterError, match="alora_invocation_tokens cannot be merged"):
        check_mergeable(marked((1,), "all"))
