"""The TPU kernels in Pallas' TPU interpreter, against float64 NumPy, token by token, on fresh random inputs.

The interpreter fills memory that nothing has written with NaN and looks for races; either fails a test. Float32 sums
of up to 1500 products of numbers of order 1 that share a scale: 2e-5 of the result's scale. bfloat16 has 8 bits, and
the shrunk activations and the softmax's weights are rounded to it once more: 2e-2.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as stock

from kernels import api, dispatch, pallas_tpu
from kernels.pallas_tpu import attention, lowrank
from kernels.types import PagePool, TilePages, Unsupported

RANK, PAGES = 16, 7
UNUSED = (4, 6)
PARAMS = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def interpreted(function, *args, **options):
    """Call a kernel in the interpreter; a race is an error."""
    with pallas_tpu.interpret(PARAMS):
        out = jax.block_until_ready(function(*args, **options))
    races = interpret_pallas_call.races
    assert races is not None, "the kernel did not run in the interpreter"
    assert not races.races_found, "the kernel has a data race"
    return jax.tree.map(np.asarray, out)


def f64(array):
    return np.asarray(array, np.float64)


def close(ours, expected, dtype="float32"):
    assert not np.isnan(f64(ours)).any()
    np.testing.assert_allclose(f64(ours), expected, rtol=0, atol=TOLERANCE[dtype] * max(1.0, np.abs(expected).max()))


def test_a_race_is_an_error():
    def copy_and_read(x_ref, out_ref, buffer, semaphore):
        copy = pltpu.make_async_copy(x_ref, buffer, semaphore)
        copy.start()
        out_ref[...] = buffer[...]
        copy.wait()

    def racy(x):
        return pl.pallas_call(
            copy_and_read,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        )(x)

    with pytest.raises(AssertionError, match="data race"):
        interpreted(racy, jnp.ones((8, 128)))


# Low-rank edits.


def make_pool(rng, d, f, dtype=jnp.float32, unused=UNUSED):
    """Return a pool whose unused pages hold NaN, and its null page what must not be used either."""
    a, c, b = (rng.standard_normal(shape) for shape in ((PAGES, d, RANK), (PAGES, RANK), (PAGES, RANK, f)))
    for leaf in (a, c, b):
        leaf[0], leaf[list(unused)] = 3, np.nan
    return PagePool(jnp.asarray(a / d**0.5, dtype), jnp.asarray(c, jnp.float32), jnp.asarray(b / 4, dtype))


def make_tiles(num_tiles, entries, width=None):
    """Make page lists from ``(tile, page, start, end, group)``; the rest of each list is null."""
    lists = [[entry[1:] for entry in entries if entry[0] == n] for n in range(num_tiles)]
    table = np.zeros((4, num_tiles, width or max(1, *map(len, lists))), np.int32)
    for n, own in enumerate(lists):
        if own:
            table[:, n, : len(own)] = np.transpose(own)
    return TilePages(*map(jnp.asarray, table))


def edit64(x, pool, tiles, mask):
    """Return ``m * ((x @ A + c) @ B)`` of every token, summed over the entries that own it."""
    x, (a, c, b) = f64(x), map(f64, pool)
    out = np.zeros((len(x), b.shape[2]))
    size = len(x) // tiles.page_NE.shape[0]
    page_NE, start_NE, end_NE, group_NE = map(np.asarray, tiles)
    for t in range(len(x)):
        n, offset = divmod(t, size)
        for e in np.flatnonzero((page_NE[n] > 0) & (start_NE[n] <= offset) & (offset < end_NE[n])):
            if mask[t, group_NE[n, e]]:
                out[t] += (x[t] @ a[page_NE[n, e]] + c[page_NE[n, e]]) @ b[page_NE[n, e]]
    return out


def lowrank_edit(x, y, pool, tiles, mask):
    return interpreted(api.lowrank_edit, x, y, pool, tiles, mask, implementation="pallas_tpu")


# Three tiles of 16: requests of tokens 0-9 (rank 48, of which one page in group 1), 10-29 (rank 16, over two tiles),
# 30-33 (the base model), 34-40 (shares a page with the first); 41-47 are padding.
MIXED = make_tiles(
    3,
    [
        (0, 1, 0, 10, 0),
        (0, 5, 0, 10, 0),
        (0, 2, 0, 10, 1),
        (0, 0, 0, 16, 0),
        (0, 3, 10, 16, 0),
        (1, 3, 0, 14, 0),
        (2, 5, 2, 9, 0),
    ],
    width=5,
)
TOKENS = 48


@pytest.fixture
def packed(rng):
    x, y = (rng.standard_normal((TOKENS, width)).astype(np.float32) for width in (192, 160))
    mask = rng.random((TOKENS, 2)) < 0.6
    mask[[0, 9, 12, 20, 35]] = True
    return x, y, make_pool(rng, 192, 160), mask


def test_requests_of_mixed_ranks_share_tiles(packed):
    x, y, pool, mask = packed
    ours = lowrank_edit(x, y, pool, MIXED, mask)
    delta = edit64(x, pool, MIXED, mask)
    close(ours, y + delta)
    still = ~delta.any(axis=1)
    assert still[30:34].all()
    assert still[41:].all()
    np.testing.assert_array_equal(ours[still], y[still])
    assert np.abs(delta).max(axis=1)[~still].min() > 0.1


def test_sites_of_one_input_are_shrunk_together(packed, rng):
    x, _, pool, mask = packed
    pools = [pool, make_pool(rng, 192, 24)]
    tiles = [MIXED, make_tiles(3, [(0, 2, 3, 9, 0), (2, 1, 0, 16, 1)])]
    shrunk = interpreted(api.shrink, x, pools, tiles, mask, implementation="pallas_tpu")
    for s, one, lists in zip(shrunk, pools, tiles, strict=True):
        assert s.dtype == np.float32
        b_NERF = np.nan_to_num(f64(one.b_PRF))[np.asarray(lists.page_NE)]
        expanded = np.einsum("nier,nerf->nif", f64(s).reshape(3, 16, -1, RANK), b_NERF).reshape(TOKENS, -1)
        close(expanded, edit64(x, one, lists, mask))


@pytest.mark.parametrize("what", ["mask", "pages"])
def test_nothing_is_edited_without_mask_or_pages(what, packed):
    x, y, pool, mask = packed
    null = MIXED._replace(page_NE=jnp.zeros_like(MIXED.page_NE))
    args = (pool, MIXED, np.zeros_like(mask)) if what == "mask" else (pool, null, np.ones_like(mask))
    np.testing.assert_array_equal(lowrank_edit(x, y, *args), y)


def test_33_requests_in_a_tile_and_axes_in_blocks(rng, monkeypatch):
    """Five groups of entries, two blocks of D and three of F: a budget of VMEM that holds 128 lanes of a tile."""
    monkeypatch.setattr(lowrank, "VMEM_BUDGET_BYTES", 1_100_000)
    tokens = 2 * 128
    starts = np.sort(rng.choice(np.arange(1, 128), 32, replace=False))
    spans = list(zip([0, *starts], [*starts, 128], strict=True))
    entries = [(1, (1, 2, 3, 5)[i % 4], *span, i % 2) for i, span in enumerate(spans)]
    tiles = make_tiles(2, [*entries, (0, 2, 0, 100, 0)])
    assert lowrank.shrink_blocks(128, 256, 33, RANK, jnp.float32, (jnp.float32,)).width == 128
    assert lowrank.expand_blocks(128, 384, 33, RANK, jnp.float32, jnp.float32).width == 128
    x, y = (rng.standard_normal((tokens, width)).astype(np.float32) for width in (256, 384))
    pool, mask = make_pool(rng, 256, 384), rng.random((tokens, 2)) < 0.7
    close(lowrank_edit(x, y, pool, tiles, mask), y + edit64(x, pool, tiles, mask))


@pytest.mark.parametrize("tokens", [1, 3])
def test_tiles_of_one_token(tokens, rng):
    x, y = (rng.standard_normal((tokens, width)).astype(np.float32) for width in (32, 48))
    pool, mask = make_pool(rng, 32, 48), np.ones((tokens, 2), bool)
    tiles = make_tiles(tokens, [(n, 1 + n, 0, 1, 0) for n in range(0, tokens, 2)])
    close(lowrank_edit(x, y, pool, tiles, mask), y + edit64(x, pool, tiles, mask))


def test_what_is_not_finite_spoils_its_own_tokens_only(packed):
    x, y, pool, mask = packed
    x = x.copy()
    x[2] = np.nan
    bad = pool._replace(a_PDR=pool.a_PDR.at[3].set(jnp.inf), c_PR=pool.c_PR.at[3].set(jnp.nan))
    ours = lowrank_edit(x, y, bad, MIXED, mask)
    spoilt = np.isin(np.arange(TOKENS), (2, *range(10, 30)))
    close(ours[~spoilt], (y + edit64(x, pool, MIXED, mask))[~spoilt])
    assert np.isnan(ours[10:30][mask[10:30, 0]]).all()


def test_the_residual_stream_is_its_own_input(packed, rng):
    """An expand may write over y; x is the same array here and must survive."""
    x, _, _, mask = packed
    pool, x = make_pool(rng, 192, 192), jnp.asarray(x)
    before = np.array(x)
    close(lowrank_edit(x, x, pool, MIXED, mask), before + edit64(before, pool, MIXED, mask))
    np.testing.assert_array_equal(x, before)


def test_edits_in_bfloat16(packed, rng):
    x, y, _, mask = packed
    x, y, pool = jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16), make_pool(rng, 192, 160, jnp.bfloat16)
    ours = lowrank_edit(x, y, pool, MIXED, mask)
    assert ours.dtype == jnp.bfloat16
    close(ours, f64(y) + edit64(x, pool, MIXED, mask), "bfloat16")


# One token a row.


def decode64(x, y, pool, rows):
    x, out, (a, c, b) = f64(x), f64(y).copy(), map(f64, pool)
    for i, pages in enumerate(np.asarray(rows)):
        for page in pages[pages > 0]:
            out[i] += (x[i] @ a[page] + c[page]) @ b[page]
    return out


ROWS = np.array([[1, 5, 0], [0, 0, 0], [2, 0, 5], [3, 0, 0], [1, 5, 0]], np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_row_has_its_own_pages(dtype, rng):
    x, y = (jnp.asarray(rng.standard_normal((5, width)), dtype) for width in (72, 160))
    pool = make_pool(rng, 72, 160, dtype)
    bad = PagePool(*(leaf.at[3].set(jnp.nan) for leaf in pool))
    ours = interpreted(api.decode_edit, x, y, [bad], [ROWS], implementation="pallas_tpu")
    assert ours.dtype == dtype
    assert np.isnan(f64(ours[3])).all()
    rest = [0, 1, 2, 4]
    close(ours[rest], decode64(x, y, pool, ROWS)[rest], dtype)
    np.testing.assert_array_equal(ours[1], y[1])


def test_rows_with_many_pages_and_wide_axes(rng):
    """Two groups of entries, and axes of more than one chunk."""
    x, y = (rng.standard_normal((2, width)).astype(np.float32) for width in (1100, 1288))
    pool, rows = make_pool(rng, 1100, 1288), rng.choice([0, 1, 2, 3, 5], (2, 9)).astype(np.int32)
    rows[0, 8] = 2
    close(
        interpreted(api.decode_edit, x, y, [pool], [rows], implementation="pallas_tpu"), decode64(x, y, pool, rows)
    )  # fmt: skip


# Attention over pages.


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

    def check(self):
        ours = interpreted(
            api.paged_attention, self.q, self.kv, jnp.asarray(self.table), jnp.asarray(self.start),
            jnp.asarray(self.kv_len), max_query_len=self.most, implementation="pallas_tpu",
        )  # fmt: skip
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


# What the kernels do not take, and who is asked.


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def trace(function, *args, **options):
    """Trace a call on abstract arguments."""
    return jax.make_jaxpr(functools.partial(function, **options))(*args)


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


@pytest.mark.parametrize(
    ("width", "tokens", "tile", "dtype", "text"),
    [
        (100_001, 256, 256, jnp.float32, "x_TD has width 100001"),
        (128, 1 << 17, 1, jnp.float32, "tiles.page_NE takes"),
        (128, 16, 16, jnp.float16, "x_TD has dtype float16"),
    ],
)
def test_what_shrink_does_not_take_is_named(width, tokens, tile, dtype, text):
    pool = PagePool(abstract(3, width, RANK), abstract(3, RANK), abstract(3, RANK, 128))
    tiles = TilePages(*[abstract(tokens // tile, 1, dtype=jnp.int32)] * 4)
    arguments = (abstract(tokens, width, dtype=dtype), (pool,), (tiles,), abstract(tokens, 2, dtype=jnp.bool_))
    with dispatch.preferring("pallas_tpu"), pytest.raises(Unsupported, match=text):
        trace(api.shrink, *arguments, implementation="pallas_tpu")


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="it runs here")
def test_without_a_tpu_the_kernels_say_so():
    x = abstract(4, 128)
    pool = PagePool(abstract(3, 128, RANK), abstract(3, RANK), abstract(3, RANK, 128))
    with pytest.raises(Unsupported, match="'pallas_tpu' needs a TPU; the default backend is 'cpu'"):
        trace(api.decode_edit, x, x, [pool], [abstract(4, 1, dtype=jnp.int32)], implementation="pallas_tpu")


def test_a_preferred_implementation_is_traced_unless_another_is_named():
    pool = PagePool(abstract(3, 128, RANK), abstract(3, RANK), abstract(3, RANK, 128))

    def traced(width=128, **options):
        x = abstract(4, 128, dtype=jnp.float16 if width != 128 else jnp.float32)
        return "pallas_call" in str(trace(api.decode_edit, x, x, [pool], [abstract(4, 1, dtype=jnp.int32)], **options))

    assert not traced()
    with dispatch.preferring("pallas_tpu"):
        assert traced()
        assert not traced(implementation="xla")
        assert not traced(width=0)
    assert not traced()
    with pytest.raises(ValueError, match=r"'palas'.*pallas_tpu"), dispatch.preferring("palas"):
        pass


def test_jit_traces_anew_for_another_preference():
    pool = PagePool(abstract(3, 128, RANK), abstract(3, RANK), abstract(3, RANK, 128))
    x, program = abstract(4, 128), jax.jit(api.decode_edit)

    def traced():
        return "pallas_call" in str(program.trace(x, x, [pool], [abstract(4, 1, dtype=jnp.int32)]).jaxpr)

    assert not traced()
    with dispatch.preferring("pallas_tpu"):
        assert traced()
    assert not traced()
