"""Attention on a TPU, ours and the stock kernel as we call it: see ``test_pallas_tpu``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as stock
from pallas_interpreter import abstract, close, f64, interpreted, trace

from kernels import api, dispatch
from kernels.pallas_tpu import attention
from kernels.types import Unsupported


def attention64(q, kv, table, start, kv_len, scale):
    """Attend each query to the keys up to its own position, request by request."""
    q, kv, out = f64(q), f64(kv), np.zeros(q.shape)
    size, group = kv.shape[1], q.shape[1] // (kv.shape[2] // 2)
    for b, length in enumerate(kv_len):
        for t in range(start[b], start[b + 1]):
            visible = np.arange(length - (start[b + 1] - t) + 1)
            keys = kv[np.asarray(table)[b, visible // size], visible % size]
            for h in range(q.shape[1]):
                scores = scale * keys[:, h // group * 2] @ q[t, h]
                weights = np.exp(scores - scores.max())
                out[t, h] = weights @ keys[:, h // group * 2 + 1] / weights.sum()
    return out


class Ragged:
    """Requests of ``(queries, keys)`` over a pool of permuted pages, half of it unused and NaN.

    ``shared`` leading pages belong to every request that is long enough: together they name more pages than there are.
    """

    def __init__(self, rng, requests, heads, kv_heads, channels, size, dtype="float32", padding=0, shared=0):
        needed = [-(-keys // size) for _, keys in requests]
        width, free = max(needed) + 1, list(rng.permutation(2 * sum(needed) + 2))
        common = [free.pop() for _ in range(shared)]
        self.table = np.full((len(requests), width), free[0], np.int32)
        for row, pages in zip(self.table, needed, strict=True):
            own = common if pages > shared else []
            row[:pages] = [*own, *(free.pop() for _ in range(pages - len(own)))]
        kv = np.full((2 * sum(needed) + 2, size, 2 * kv_heads, channels), np.nan)
        for row, (_, keys) in zip(self.table, requests, strict=True):
            for at in range(keys):
                kv[row[at // size], at % size] = rng.standard_normal((2 * kv_heads, channels))
        self.start = np.cumsum([0, *(queries for queries, _ in requests)]).astype(np.int32)
        self.kv_len = np.array([keys for _, keys in requests], np.int32)
        self.kv = jnp.asarray(kv, dtype)
        self.q = jnp.asarray(rng.standard_normal((int(self.start[-1]) + padding, heads, channels)), dtype)
        self.most = max(1, *(queries for queries, _ in requests))
        self.scale = channels**-0.5

    def run(self):
        return interpreted(
            api.paged_attention, self.q, self.kv, jnp.asarray(self.table), jnp.asarray(self.start),
            jnp.asarray(self.kv_len), max_query_len=self.most, implementation="pallas_tpu",
        )  # fmt: skip

    def check(self):
        ours = self.run()
        dtype = self.q.dtype.name
        assert ours.dtype == self.q.dtype
        close(ours, attention64(self.q, self.kv, self.table, self.start, self.kv_len, self.scale), dtype)
        assert not f64(ours)[self.start[-1] :].any()


CHUNKS = [(5, 9), (1, 40), (0, 7), (21, 75)]
"""A whole prompt, a decode step, a request without queries, a chunk over a prefix."""
DECODE = [(1, 3), (1, 49), (1, 1), (1, 30)]
EMPTY = [(0, 0), (0, 12), (3, 3), (0, 5), (0, 0)]
HEADS = {"smollm2": (9, 3, 64), "qwen2.5": (14, 2, 64), "kv3x128": (6, 3, 128), "tiny": (4, 2, 16), "mqa": (4, 1, 64)}
"""Query heads, KV heads, head size, which our kernel takes."""


@pytest.fixture
def several_steps(monkeypatch):
    """Cut queries and keys so small that every test has several blocks of both."""
    monkeypatch.setattr(attention, "_MOST_QUERIES", 8)
    monkeypatch.setattr(attention, "_MOST_KEYS", 32)


@pytest.mark.usefixtures("several_steps")
@pytest.mark.parametrize(
    ("heads", "size", "dtype", "requests", "options"),
    [
        ("smollm2", 16, "float32", CHUNKS, {"padding": 6}),
        ("smollm2", 16, "bfloat16", DECODE, {}),
        ("smollm2", 64, "float32", [(1, 130), (3, 66)], {"shared": 1}),
        ("qwen2.5", 16, "bfloat16", CHUNKS, {"padding": 1, "shared": 1}),
        ("kv3x128", 16, "float32", CHUNKS, {}),
        ("tiny", 8, "float32", CHUNKS, {"padding": 3}),
        ("mqa", 16, "float32", EMPTY, {"padding": 2}),
    ],
)
def test_our_attention(heads, size, dtype, requests, options, rng):
    query_heads, kv_heads, channels = HEADS[heads]
    assert not attention.stock_takes(2 * kv_heads, channels)
    Ragged(rng, requests, query_heads, kv_heads, channels, size, dtype, **options).check()


@pytest.mark.usefixtures("several_steps")
def test_our_attention_without_any_query(rng):
    Ragged(rng, [(0, 0), (0, 3)], 4, 2, 64, 16, padding=4).check()


@pytest.mark.usefixtures("several_steps")
def test_a_key_that_is_no_number_shows_in_its_request_alone(rng):
    ragged = Ragged(rng, CHUNKS, *HEADS["tiny"], 8)
    ragged.kv = ragged.kv.at[ragged.table[1, 0], 0, ::2].set(jnp.nan)
    found = np.isnan(f64(ragged.run()))
    first, end = ragged.start[1], ragged.start[2]
    assert found[first:end].all()
    assert not np.delete(found, np.s_[first:end], axis=0).any()


class Loaded:
    """Stands for a reference to a buffer that the interpreter cannot load from once reshaped: holds its values."""

    def __init__(self, values):
        self.values, self.dtype = values, values.dtype

    def __getitem__(self, index):
        return self.values[index]

    def reshape(self, *shape):
        return Loaded(self.values.reshape(*shape))

    def bitcast(self, _):
        halves = jax.lax.bitcast_convert_type(self.values, jnp.uint16).astype(jnp.uint32)
        return Loaded(halves[0::2] | (halves[1::2] << 16))


class Substitute:
    """A module with some of its functions replaced."""

    def __init__(self, module, **replaced):
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(self._module, name)


@pytest.fixture
def stock_kernel(monkeypatch):
    """Let the interpreter run jax's own kernel: its loads through reshaped references and masked stores fail there."""
    wait = stock.MultiPageAsyncCopyDescriptor.wait

    def store(ref, value, *, mask):
        ref[...] = jnp.where(mask, value, ref[...])

    monkeypatch.setattr(stock.MultiPageAsyncCopyDescriptor, "wait", lambda self: Loaded(wait(self)[...]))
    monkeypatch.setattr(stock, "pltpu", Substitute(pltpu, store=store))
    monkeypatch.setattr(attention, "_MOST_KEYS", 32)
    stock.ragged_paged_attention.clear_cache()
    yield
    stock.ragged_paged_attention.clear_cache()


@pytest.mark.usefixtures("stock_kernel")
@pytest.mark.parametrize(
    ("heads", "size", "dtype", "requests", "options"),
    [
        ((8, 2), 16, "float32", CHUNKS, {"padding": 40}),
        ((8, 4), 16, "bfloat16", DECODE, {}),
        ((4, 2), 16, "float32", EMPTY, {"padding": 2}),
        ((4, 2), 16, "float32", [(0, 0), (0, 3)], {"padding": 4}),
        ((4, 2), 64, "bfloat16", [(1, 130), (3, 66)], {"shared": 1}),
    ],
)
def test_stock_attention_as_we_call_it(heads, size, dtype, requests, options, rng):
    assert attention.stock_takes(2 * heads[1], 128)
    Ragged(rng, requests, *heads, 128, size, dtype, **options).check()


def test_the_stock_kernel_gets_no_request_that_it_would_copy_for_in_vain(rng, monkeypatch):
    """It starts copies for the request after the one at hand, and waits only if that one has keys and a turn."""
    asked = []
    monkeypatch.setattr(attention, "ragged_paged_attention", lambda q, *args, **_: asked.append(args) or q)
    for requests, kv_len, start, count in (
        (EMPTY, [1, 1, 3, 1, 1], [0, 0, 0, 3, 3, 3], 3),
        ([(0, 0), (0, 3)], [1, 1], [0, 1, 1], 1),
    ):
        ragged = Ragged(rng, requests, 4, 2, 128, 16, padding=4)
        attention.paged_attention(
            ragged.q, ragged.kv, jnp.asarray(ragged.table), jnp.asarray(ragged.start), jnp.asarray(ragged.kv_len),
            max_query_len=4, scale=1.0,
        )  # fmt: skip
        _, kv_len_B, _, start_B1, num_requests = asked.pop()
        np.testing.assert_array_equal(kv_len_B, kv_len)
        np.testing.assert_array_equal(start_B1, start)
        np.testing.assert_array_equal(num_requests, [count])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kv": abstract(9, 16, 6, 64, dtype=jnp.float8_e4m3fn)}, "kv_PSJC has dtype float8_e4m3fn"),
        ({"q": abstract(8, 9, 64, dtype=jnp.float16)}, "q_THC has dtype float16"),
        ({"kv": abstract(9, 12, 6, 64)}, "kv_PSJC has pages of 12 tokens"),
        ({"kv": abstract(9, 16, 6, 20), "q": abstract(8, 9, 20)}, "q_THC has head size 20"),
        ({"table": abstract(4, 99_999, dtype=jnp.int32)}, "page_table_BP takes .* scalar memory"),
        ({"kv": abstract(9, 4096, 6, 64)}, "kv_PSJC has pages that take .* VMEM"),
    ],
)
def test_what_attention_does_not_take_is_named(changes, text):
    arguments = {
        "q": abstract(8, 9, 64),
        "kv": abstract(9, 16, 6, 64),
        "table": abstract(4, 8, dtype=jnp.int32),
        "start": abstract(5, dtype=jnp.int32),
        "len": abstract(4, dtype=jnp.int32),
    } | changes
    with dispatch.preferring("pallas_tpu"), pytest.raises(Unsupported, match=text):
        trace(api.paged_attention, *arguments.values(), max_query_len=4, implementation="pallas_tpu")
