"""Learned prefixes as adapters: what a config may say, how they fold, and what a text's prefix is."""

import dataclasses

import jax
import numpy as np
import pytest
import reference

import preft_jax as pj
from preft_jax import AdapterConfig, ConfigError, RequestError
from preft_jax.adapters.config import adapter_shapes
from preft_jax.adapters.kinds import KINDS, register_kind
from preft_jax.config import PRESETS

CONFIG = AdapterConfig(kind="prefix", rank=7)
TINY = PRESETS["tiny"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("positions", "all"),
        ("positions", "l8"),
        ("layers", (0,)),
        ("alora_invocation_tokens", (1,)),
        ("assistant_turns", "skip"),
        ("dropout", 0.1),
    ],
)
def test_what_means_nothing_for_a_prefix_is_refused(field, value):
    with pytest.raises(ConfigError, match=rf"{field} is .*; leave {field} out"):
        dataclasses.replace(CONFIG, **{field: value})


def test_no_model_with_a_sliding_window_has_one_and_no_kind_is_both():
    with pytest.raises(ConfigError, match="sliding_window"):
        adapter_shapes(CONFIG, dataclasses.replace(TINY, sliding_window=64))
    kind = KINDS["prefix"]
    with pytest.raises(ConfigError, match="'prefix' and elsewhere"):
        register_kind("both", kind.shapes, kind.init, kind.fold, sites=("prefix", "q"))
    assert "both" not in KINDS


def test_a_fold_is_keys_and_values_of_positions_that_there_are():
    adapter = pj.random_adapter(CONFIG, TINY, jax.random.key(0))
    for sites, folded in zip(adapter.params["layers"], pj.fold(adapter)["layers"], strict=True):
        edit, own = folded["prefix"], sites["prefix"]
        np.testing.assert_array_equal(edit.a_DR, own["k"].T)
        np.testing.assert_array_equal(edit.b_RF, own["v"])
        np.testing.assert_array_equal(edit.c_R, np.ones(CONFIG.rank))


def test_a_forward_pass_and_scores_see_a_prefix(lively, trained, rng):
    adapter = pj.random_adapter(CONFIG, lively.config, jax.random.key(1))
    tokens = rng.integers(0, 250, 17)
    mask = reference.adapter_mask(adapter, 13, 4)
    expected = reference.log_softmax(reference.forward(lively.config, lively.params, tokens, adapter, mask))
    np.testing.assert_allclose(trained(lively, adapter, tokens, mask), expected, atol=1e-4)
    (found,) = pj.logprobs(lively, [tokens[:13].tolist()], [tokens[13:].tolist()], adapter)
    np.testing.assert_allclose(found, expected[np.arange(12, 16), tokens[13:]], atol=1e-4)
    with pytest.raises(RequestError, match="behind a learned prefix of 7"):
        pj.logprobs(lively, [[1] * 1020], [[1]], adapter)


def test_a_texts_prefix_is_what_the_base_model_keeps_of_it(lively):
    text = "An owl hoots."
    adapter = pj.text_prefix(CONFIG, lively, text)
    tokens = pj.encode_prompt(lively.tokenizer, text, vocab_size=256).token_ids[: CONFIG.rank]
    _, kept = reference.forward_with_kv(lively.config, lively.params, tokens)
    for sites, (k, v) in zip(adapter.params["layers"], kept, strict=True):
        for name, x in (("k", k), ("v", v)):
            np.testing.assert_allclose(sites["prefix"][name], x.reshape(CONFIG.rank, -1), atol=1e-5)
    assert pj.text_prefix(CONFIG, lively, text).digest == adapter.digest
    again = pj.text_prefix(CONFIG, lively, tokens[:3])
    whole = pj.text_prefix(CONFIG, lively, (tokens[:3] * 3)[: CONFIG.rank])
    assert again.digest == whole.digest != adapter.digest


def test_what_has_no_text_to_begin_with_is_refused(lively, tiny_text):
    with pytest.raises(ConfigError, match="this adapter is 'lora'"):
        pj.text_prefix(AdapterConfig(), lively)
    with pytest.raises(RequestError, match="empty"):
        pj.text_prefix(CONFIG, lively, [])
