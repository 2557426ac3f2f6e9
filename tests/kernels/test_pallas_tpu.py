"""The TPU kernels in Pallas' TPU interpreter, against float64 NumPy, token by token, on fresh random inputs.

The interpreter fills memory that nothing has written with NaN and looks for races; either fails a test. Float32 sums
of up to 1500 products of numbers of order 1 that share a scale: 2e-5 of the result's scale. bfloat16 has 8 bits, and
the shrunk activations and the softmax's weights are rounded to it once more: 2e-2.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from pallas_interpreter import abstract, close, f64, interpreted, trace

from kernels import api, dispatch
from kernels.pallas_tpu import lowrank
from kernels.types import PagePool, TilePages, Unsupported

RANK, PAGES = 16, 7
UNUSED = (4, 6)


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
