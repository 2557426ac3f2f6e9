"""An adapter to start from keeps what it is; where it acts and how it is trained may be others."""

import dataclasses
from pathlib import Path

import pytest

from preft_jax import AdapterConfig, ConfigError
from preft_jax.shapes import LINEAR_SITES
from train.run.start import start_config

pytestmark = pytest.mark.host

LORA = AdapterConfig(rank=3, alpha=6.0, targets=("k", "up"), layers=(0, 2), dropout=0.1)
WHOLE = AdapterConfig(rank=8)
MARKED = AdapterConfig(rank=8, alora_invocation_tokens=(7, 3))
FREE = AdapterConfig(kind="direft", rank=2, orthonormal=False)
APART = AdapterConfig(kind="loreft", rank=2, positions="f3+l2", share_weights=False, assistant_turns="skip")


def start(found, **asked):
    return start_config(found, asked, where=Path("old"), num_layers=4)


@pytest.mark.parametrize("found", [LORA, WHOLE, FREE, APART, dataclasses.replace(FREE, positions="f7+l7")])
def test_what_is_not_asked_for_is_the_adapters(found):
    assert start(found) == found


def test_an_adapter_of_every_token_becomes_prefill_only_unless_all_is_asked_for():
    ordinary = dataclasses.replace(LORA, positions="all")
    assert start(ordinary) == LORA
    assert start(ordinary, positions="all") == ordinary


@pytest.mark.parametrize(
    "asked",
    [
        {"positions": "f2"}, {"positions": "all"}, {"assistant_turns": "skip"}, {"dropout": 0.5}, {"dropout": 0.0},
        {"positions": "l1", "assistant_turns": "skip", "dropout": 0.0},
    ],
)  # fmt: skip
def test_what_does_not_change_the_shape_may_be_another(asked):
    assert start(LORA, **asked) == dataclasses.replace(LORA, **asked)


@pytest.mark.parametrize(
    ("found", "asked", "reason"),
    [
        (LORA, {"kind": "loreft"}, "adapter_kind is loreft .* old, is lora; leave adapter_kind out"),
        (APART, {"kind": "lora"}, "adapter_kind is lora .* is loreft"),
        (LORA, {"rank": 9}, "rank is 9 .* old, is 3; leave rank out, or leave init_from out"),
        (LORA, {"rank": 0}, "rank is 0 .* is 3"),
        (LORA, {"alpha": 3.0}, r"lora_alpha is 3\.0 .* is 6\.0"),
        (WHOLE, {"alpha": 16.0}, r"lora_alpha is 16\.0 .* is 8\.0"),
        (FREE, {"alpha": 2.0}, r"lora_alpha is 2\.0 .* is none"),
        (LORA, {"use_rslora": True}, "use_rslora is True .* is False"),
        (LORA, {"targets": ("q", "up")}, "targets is q,up .* is k,up"),
        (LORA, {"targets": ()}, "targets is q,k,v,o,gate,up,down .* is k,up"),
        (WHOLE, {"targets": ("q",)}, "targets is q .* is q,k,v,o,gate,up,down"),
        (WHOLE, {"targets": ("qq",)}, "targets is qq .* is q,k"),
        (LORA, {"layers": (0, 1)}, "layers is 0,1 .* is 0,2"),
        (LORA, {"layers": None}, "layers is all .* is 0,2"),
        (WHOLE, {"layers": (0, 1, 2, 9)}, "layers is 0,1,2,9 .* is all"),
        (FREE, {"orthonormal": True}, "orthonormal is True .* is False"),
        (FREE, {"share_weights": False}, "share_weights is False .* is True"),
        (APART, {"share_weights": True}, "share_weights is True .* is False"),
        (APART, {"positions": "f7+l7"}, r"positions is 'f7\+l7' .* old, .* of 'f3\+l2'; leave positions out"),
        (FREE, {"dropout": 0.1}, "lora_dropout is LoRA's; .* old, is 'direft'"),
        (LORA, {"dropout": 1.0}, "dropout 1.0"),
        (LORA, {"positions": "last"}, "'last' is not a rule"),
        (MARKED, {"positions": "l4"}, "begin the edits at a marker, and positions 'l4'"),
    ],
)  # fmt: skip
def test_what_contradicts_the_adapter_is_refused_by_name_with_both_values(found, asked, reason):
    with pytest.raises(ConfigError, match=reason):
        start(found, **asked)


def test_a_marker_is_kept_and_may_be_changed():
    assert start(MARKED).alora_invocation_tokens == (7, 3)
    assert (start(MARKED).positions, start(MARKED, positions="all").positions) == ("prompt", "all")
    assert start(MARKED, alora_invocation_tokens=(1,)).alora_invocation_tokens == (1,)
    assert start(LORA, alora_invocation_tokens=(1,)).alora_invocation_tokens == (1,)


@pytest.mark.parametrize(
    ("found", "asked"),
    [
        (LORA, {"kind": "lora", "rank": 3, "alpha": 6, "targets": ("up", "k"), "layers": (2, 0), "dropout": 0.1}),
        (WHOLE, {"alpha": 8.0, "use_rslora": False, "targets": LINEAR_SITES, "layers": (0, 1, 2, 3)}),
        (dataclasses.replace(WHOLE, layers=(0, 1, 2, 3)), {"layers": None, "targets": ()}),
        (APART, {"kind": "loreft", "targets": ("block",), "share_weights": False, "positions": "f3+l2"}),
    ],
)
def test_the_adapters_own_values_may_be_repeated_in_other_words(found, asked):
    assert start(found, **asked) == found
