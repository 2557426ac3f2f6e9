"""The paged KV cache: shapes, refusals, and writes that land at their slots or nowhere."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from preft_jax import ConfigError, ModelConfig
from preft_jax.models.cache import NO_SLOT, init_cache, pages_for, write_kv

MODEL = ModelConfig(
    vocab_size=32, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=4,
)  # fmt: skip


def test_shape_and_dtype():
    cache = init_cache(MODEL, 5, 8, jnp.bfloat16)
    assert (cache.num_pages, cache.page_size) == (5, 8)
    assert len(cache.kv) == 3
    for pool in cache.kv:
        assert pool.shape == (5, 8, 2 * 2, 4)
        assert pool.dtype == jnp.bfloat16
        assert not np.asarray(pool).any()


def test_every_pool_is_a_buffer_of_its_own():
    """They are donated: one buffer given twice could not be."""
    cache = init_cache(MODEL, 2, 4, jnp.float32)
    assert len({pool.unsafe_buffer_pointer() for pool in cache.kv}) == len(cache.kv)


@pytest.mark.parametrize(("pages", "size"), [(0, 8), (3, 0), (-1, 8)])
def test_an_empty_cache_is_refused(pages, size):
    with pytest.raises(ConfigError, match=f"{pages} of {size}"):
        init_cache(MODEL, pages, size, jnp.float32)


def test_more_slots_than_an_index_can_name_are_refused():
    with pytest.raises(ConfigError, match="slots"):
        init_cache(MODEL, 2**27, 16, jnp.float32)


def test_write_puts_rows_at_their_slots_and_drops_the_rest(rng):
    """Keys and values alternate in a row: k0 v0 k1 v1."""
    pool = rng.standard_normal((4, 3, 4, 5)).astype(np.float32)
    slots = np.array([7, NO_SLOT, 0, 11, 12, NO_SLOT], np.int32)
    k, v = rng.standard_normal((2, 6, 2, 5)).astype(np.float32)
    written = np.asarray(write_kv(jnp.asarray(pool), jnp.asarray(slots), jnp.asarray(k), jnp.asarray(v)))
    expected = pool.reshape(12, 4, 5).copy()
    for token, slot in ((0, 7), (2, 0), (3, 11)):
        expected[slot] = k[token, 0], v[token, 0], k[token, 1], v[token, 1]
    np.testing.assert_array_equal(written, expected.reshape(pool.shape))


def test_write_casts_to_the_cache(rng):
    pool = jnp.zeros((1, 2, 2, 3), jnp.bfloat16)
    k, v = rng.standard_normal((2, 1, 1, 3)).astype(np.float32)
    written = write_kv(pool, jnp.asarray([1], jnp.int32), jnp.asarray(k), jnp.asarray(v))
    assert written.dtype == jnp.bfloat16
    np.testing.assert_array_equal(written[0, 1], np.concatenate([k[0], v[0]]).astype(jnp.bfloat16))


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (8, 1), (9, 2), (64, 8)])
def test_pages_for(tokens, pages):
    assert pages_for(tokens, 8) == pages


@pytest.mark.parametrize(("kv_heads", "channels", "row"), [(3, 64, (3, 128)), (4, 64, (4, 128)), (8, 128, (16, 128))])
def test_a_tpu_stores_narrow_heads_as_lanes(kv_heads, channels, row, rng):
    """The same numbers in the same order, written by another scatter; three lane rows do not fill a TPU's tiles."""
    config = dataclasses.replace(
        MODEL, num_attention_heads=kv_heads, num_key_value_heads=kv_heads, head_dim=channels
    )  # fmt: skip
    plain = init_cache(config, 5, 8, jnp.float32).kv[0]
    with dispatch.preferring("pallas_tpu"):
        stored = init_cache(config, 5, 8, jnp.float32).kv[0]
    assert stored.shape == (5, 8, *row)
    assert plain.shape == (5, 8, 2 * kv_heads, channels)
    old = rng.standard_normal(plain.shape).astype(np.float32)
    k, v = (rng.standard_normal((4, kv_heads, channels)).astype(np.float32) for _ in range(2))
    slots = np.array([17, 39, NO_SLOT, 0], np.int32)
    expected = write_kv(jnp.asarray(old), slots, k, v)
    ours = write_kv(jnp.asarray(old.reshape(stored.shape)), slots, k, v)
    np.testing.assert_array_equal(ours.reshape(plain.shape), expected)
    assert np.abs(np.asarray(expected) - old).reshape(40, -1).any(axis=1).sum() == 3
