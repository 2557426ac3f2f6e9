"""A sliding window: training, packed training, prefill in chunks and decoding see the same keys. float32: 1e-4."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from preft_jax.config import config_from_hf, config_to_hf
from preft_jax.errors import ConfigError
from preft_jax.models import forward
from preft_jax.models.batch import DecodeBatch, Span, pack_prefill
from preft_jax.models.cache import init_cache

ATOL = 1e-4
WINDOW, LENGTH = 5, 21


@pytest.fixture(scope="module")
def config(lively):
    return dataclasses.replace(lively.config, sliding_window=WINDOW)


@pytest.fixture(scope="module")
def program(config):
    return jax.jit(lambda params, tokens, segments, positions: forward.forward(
        config, params, tokens, segments_BS=segments, positions_BS=positions))  # fmt: skip


def test_documents_in_one_row_see_their_own_last_keys(config, lively, program, rng):
    lengths = 9, 12
    tokens = rng.integers(0, config.vocab_size, sum(lengths)).astype(np.int32)
    segments = np.repeat([1, 2], lengths).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    ours = np.asarray(program(lively.params, tokens[None], segments[None], positions[None]))[0]
    for at, own in zip(np.split(ours, [lengths[0]]), np.split(tokens, [lengths[0]]), strict=True):
        np.testing.assert_allclose(at, reference.forward(config, lively.params, own), atol=10 * ATOL)
        whole = reference.forward(lively.config, lively.params, own)
        assert np.abs(at - whole)[WINDOW:].max() > 0.1


def test_prefill_in_chunks_and_decoding_are_the_whole(config, lively, rng):
    tokens = rng.integers(0, config.vocab_size, LENGTH + 1).astype(np.int32)
    expected = reference.forward(config, lively.params, tokens)
    cache, pages = init_cache(config, 4, 8, jnp.float32), np.arange(4)
    for start, stop in ((0, 13), (13, LENGTH)):
        no_edits = np.zeros((stop - start, 2), bool)
        span = Span(tokens=tokens[start:stop], start=start, edit_mask=no_edits, kv_pages=pages)
        batch = pack_prefill([span], num_tokens=16, num_requests=1, page_table_width=4, page_size=8, tile=16, sites=())
        logits, cache = forward.prefill(config, lively.params, None, cache, batch, max_query_len=16)
        np.testing.assert_allclose(logits[0], expected[stop - 1], atol=10 * ATOL)
    rows = DecodeBatch(*(jnp.asarray(x, jnp.int32) for x in ([tokens[LENGTH]], [LENGTH], pages[None])))
    logits, _ = forward.decode(config, lively.params, cache, rows)
    np.testing.assert_allclose(logits[0], expected[LENGTH], atol=10 * ATOL)


@pytest.mark.parametrize("window", [0, -1, 2.5])
def test_a_window_that_is_no_positive_integer_is_refused(window, config):
    with pytest.raises(ConfigError, match=f"sliding_window is {window}; give an integer of at least 1, or null"):
        dataclasses.replace(config, sliding_window=window)


def test_a_window_of_another_family_is_refused(config):
    with pytest.raises(ConfigError, match="sliding_window is not supported for model_type 'llama'"):
        config_from_hf(config_to_hf(config) | {"sliding_window": 7})
