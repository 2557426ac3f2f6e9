"""The reference attention over pages against float64 NumPy, query by query, on fresh random inputs.

Float32 sums of a few products of numbers of order 1: 1e-5. bfloat16 has 8 bits: 2e-2 of the result's scale.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import api

ATOL = 1e-5


def f64(array):
    return np.asarray(array, np.float64)


HEADS, KV_HEADS, CHANNELS, SIZE, POOL = 6, 2, 4, 4, 16


def attention64(q, keys, values, scale):
    """Attend ``q [n, H, C]`` to ``keys, values [S, K, C]``; the queries are the last n of the S positions."""
    n, heads, _ = q.shape
    out = np.zeros(q.shape)
    for i, h in np.ndindex(n, heads):
        kv = h // (heads // keys.shape[1])
        visible = len(keys) - n + i + 1
        scores = scale * keys[:visible, kv] @ q[i, h]
        weights = np.exp(scores - scores.max())
        out[i, h] = weights / weights.sum() @ values[:visible, kv]
    return out


class Ragged:
    """Random requests with ``lengths`` of (queries, keys), their pages scattered over a pool otherwise full of NaN."""

    def __init__(self, rng, lengths, *, kv_heads=KV_HEADS, padding=3, width=5, rest=np.nan, scale=1.0):
        self.lengths = lengths
        counts = [-(-keys // SIZE) for _, keys in lengths]
        order = rng.permutation(POOL)
        self.pool = np.full((POOL, SIZE, 2 * kv_heads, CHANNELS), rest, np.float32)
        self.table = rng.integers(0, POOL, (len(lengths), width)).astype(np.int32)
        self.kv = []
        for row, ((_, keys), count) in enumerate(zip(lengths, counts, strict=True)):
            own, order = order[:count], order[count:]
            self.table[row, :count] = own
            kv = scale * rng.standard_normal((2, keys, kv_heads, CHANNELS))
            for position in range(keys):
                slot = own[position // SIZE], position % SIZE
                self.pool[slot][0::2], self.pool[slot][1::2] = kv[:, position]
            self.kv.append(kv.astype(np.float32).astype(np.float64))
        self.start = np.cumsum([0, *(queries for queries, _ in lengths)]).astype(np.int32)
        self.kv_len = np.array([keys for _, keys in lengths], np.int32)
        self.q = rng.standard_normal((self.start[-1] + padding, HEADS, CHANNELS)).astype(np.float32)

    def ours(self, **options):
        options = {"max_query_len": max(queries for queries, _ in self.lengths), **options}
        return np.asarray(
            jax.jit(functools.partial(api.paged_attention, **options))(
                self.q, self.pool, self.table, self.start, self.kv_len
            )
        )

    def expected(self, scale=CHANNELS**-0.5):
        out = np.zeros(self.q.shape)
        for row, (queries, _) in enumerate(self.lengths):
            own = slice(self.start[row], self.start[row] + queries)
            out[own] = attention64(f64(self.q)[own], *self.kv[row], scale)
        return out


MIXED = [(5, 9), (1, 1), (3, 3), (1, 17), (4, 20)]


def test_ragged_queries_over_scattered_pages(rng):
    """Prefill, chunks and decode in one call; unused pages, slots and table entries hold NaN; padding gives zeros."""
    ragged = Ragged(rng, MIXED)
    ours = ragged.ours()
    np.testing.assert_allclose(ours, ragged.expected(), atol=ATOL)
    assert not ours[-3:].any()


def test_a_generous_bound_on_queries_changes_nothing(rng):
    ragged = Ragged(rng, MIXED)
    np.testing.assert_allclose(ragged.ours(max_query_len=14), ragged.expected(), atol=ATOL)


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
def test_grouped_queries(kv_heads, rng):
    ragged = Ragged(rng, MIXED, kv_heads=kv_heads)
    np.testing.assert_allclose(ragged.ours(), ragged.expected(), atol=ATOL)


def test_decode_is_one_query_a_row(rng):
    ragged = Ragged(rng, [(1, keys) for keys in (1, 4, 5, 12)], padding=0)
    np.testing.assert_allclose(ragged.ours(), ragged.expected(), atol=ATOL)


def test_requests_without_tokens(rng):
    """Rows of a batch that is not full."""
    ragged = Ragged(rng, [(2, 6), (0, 0), (0, 0)])
    np.testing.assert_allclose(ragged.ours(), ragged.expected(), atol=ATOL)


def test_the_scale_of_scores(rng):
    ragged = Ragged(rng, MIXED)
    np.testing.assert_allclose(ragged.ours(scale=1.7), ragged.expected(1.7), atol=ATOL)
    assert np.abs(ragged.ours() - ragged.expected(1.7)).max() > 1e-2


def test_scores_too_large_to_exponentiate(rng):
    ragged = Ragged(rng, MIXED, scale=1e3)
    np.testing.assert_allclose(ragged.ours(), ragged.expected(), rtol=1e-4, atol=1e-1)


def test_page_order_is_the_tables(rng):
    """The twin of scattered pages: with a request's first and last page swapped its earlier queries see other keys."""
    ragged = Ragged(rng, MIXED)
    ragged.table[4, [0, 4]] = ragged.table[4, [4, 0]]
    assert np.abs(ragged.ours() - ragged.expected())[-7:-3].max() > 1e-2


def test_bfloat16_attention(rng):
    ragged = Ragged(rng, MIXED)
    ragged.q, ragged.pool = (jnp.asarray(array, jnp.bfloat16) for array in (ragged.q, ragged.pool))
    ours = ragged.ours()
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(f64(ours), ragged.expected(), atol=4e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_a_pool_narrower_than_the_queries_loses_its_own_rounding_only(dtype, rng):
    """Weights and sums keep the queries' precision: the result is that of the rounded keys and values."""
    ragged = Ragged(rng, MIXED)
    ragged.pool = jnp.asarray(ragged.pool, dtype)
    ragged.kv = [f64(jnp.asarray(kv, jnp.float32).astype(dtype)) for kv in ragged.kv]
    ours = ragged.ours()
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, ragged.expected(), atol=ATOL)


@pytest.mark.parametrize(
    ("changes", "options", "text"),
    [
        ({"pool": lambda a: a[:, :, :3]}, {}, "kv_PSJC has 3 heads; keys and values alternate"),
        ({"q": lambda a: a[..., :2]}, {}, "kv_PSJC has head size 4; q_THC has 2"),
        ({"q": lambda a: a[:, :5]}, {}, "q_THC has 5 heads, not a multiple of 2 KV heads"),
        ({"table": lambda a: a[1:]}, {}, "page_table_BP has 4 rows; kv_len_B 5"),
        ({"start": lambda a: a[1:]}, {}, "query_start_B1 has shape"),
        ({}, {"max_query_len": 0}, "max_query_len is 0"),
        ({}, {"max_query_len": 18}, "max_query_len is 18; allowed: 1 to 17"),
    ],
)
def test_wrong_arguments_of_attention_are_named(changes, options, text, rng):
    ragged = Ragged(rng, MIXED)
    for name, change in changes.items():
        setattr(ragged, name, change(getattr(ragged, name)))
    with pytest.raises(ValueError, match=text):
        ragged.ours(**options)


def test_an_unknown_implementation_is_refused_with_those_there_are(rng):
    with pytest.raises(NotImplementedError, match=r"'cuda'.*xla"):
        Ragged(rng, MIXED).ours(implementation="cuda")
