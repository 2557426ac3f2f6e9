"""The reference edits against float64 NumPy, token by token, on fresh random inputs.

Float32 sums of at most 64 products of numbers of order 1: 1e-5. bfloat16 has 8 bits: 2e-2 of the result's scale.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import api
from kernels.types import PagePool, TilePages

PAGES, RANK = 7, 16
T, TILE, D, F = 24, 8, 10, 6
ATOL = 1e-5


def f64(array):
    return np.asarray(array, np.float64)


def make_pool(rng, d=D, f=F, pages=PAGES):
    a, c, b = (rng.standard_normal(shape) for shape in ((pages, d, RANK), (pages, RANK), (pages, RANK, f)))
    a[0] = c[0] = b[0] = 0
    return PagePool(*(jnp.asarray(array, jnp.float32) for array in (a / d**0.5, c, b / RANK**0.5)))


def make_tiles(*entries, width=4):
    """Make page lists for three tiles from ``(tile, page, start, end, group)``."""
    table = np.zeros((4, T // TILE, width), np.int32)
    filled = [0] * (T // TILE)
    for tile, *entry in entries:
        table[:, tile, filled[tile]] = entry
        filled[tile] += 1
    return TilePages(*map(jnp.asarray, table))


# Requests of tokens 0-4 (pages 1 and 5), 5-13 (page 3, and page 2 in group 1), 14-15 (base), 16-18 (page 5 too);
# tokens 19-23 are padding.
TILES = make_tiles(
    (0, 1, 0, 5, 0),
    (0, 5, 0, 5, 0),
    (0, 3, 5, 8, 0),
    (0, 2, 5, 8, 1),
    (1, 3, 0, 6, 0),
    (1, 2, 0, 6, 1),
    (2, 5, 0, 3, 0),
)
UNUSED = (4, 6)


def make_mask(rng):
    mask = rng.random((T, 2)) < 0.6
    mask[[0, 7, 9, 16]] = True
    return mask


def edit(x, pool, tiles, mask):
    """Return ``m * ((x @ A + c) @ B)`` summed over the entries that own each token."""
    a, c, b = map(f64, pool)
    x = f64(x)
    out = np.zeros((len(x), b.shape[2]))
    size = len(x) // tiles.page_NE.shape[0]
    for t in range(len(x)):
        n, offset = divmod(t, size)
        for page, start, end, group in zip(*(np.asarray(array)[n] for array in tiles), strict=True):
            if page and start <= offset < end and mask[t, group]:
                out[t] += (x[t] @ a[page] + c[page]) @ b[page]
    return out


def spoil(pool, pages):
    """Return the pool with NaN in some pages."""
    return PagePool(*(leaf.at[np.array(pages)].set(jnp.nan) for leaf in pool))


@pytest.fixture
def inputs(rng):
    x, y = rng.standard_normal((T, D)).astype(np.float32), rng.standard_normal((T, F)).astype(np.float32)
    return x, y, make_pool(rng), make_mask(rng)


lowrank_edit = jax.jit(functools.partial(api.lowrank_edit, implementation="xla"))


def test_edit_of_several_requests_in_a_tile(inputs):
    x, y, pool, mask = inputs
    ours = lowrank_edit(x, y, pool, TILES, mask)
    assert ours.dtype == np.float32
    delta = edit(x, pool, TILES, mask)
    np.testing.assert_allclose(ours, y + delta, atol=ATOL)
    assert np.abs(delta[mask[:, 0] & (np.arange(T) < 5)]).max() > 0.1


def test_tokens_that_are_not_edited_keep_every_bit(inputs):
    x, y, pool, mask = inputs
    ours = np.asarray(lowrank_edit(x, y, pool, TILES, mask))
    still = ~mask.any(axis=1) | (np.arange(T) >= 19) | np.isin(np.arange(T), (14, 15))
    assert still.sum() > 8
    np.testing.assert_array_equal(ours[still], y[still])


def test_nothing_is_edited_under_a_mask_of_zeros(inputs):
    x, y, pool, _ = inputs
    np.testing.assert_array_equal(lowrank_edit(x, y, pool, TILES, np.zeros((T, 2), bool)), y)


def test_each_entry_is_switched_by_its_own_column(inputs):
    x, y, pool, _ = inputs
    for column in (0, 1):
        mask = np.zeros((T, 2), bool)
        mask[:, column] = True
        np.testing.assert_allclose(
            lowrank_edit(x, y, pool, TILES, mask), y + edit(x, pool, TILES, mask), atol=ATOL
        )  # fmt: skip


def test_the_null_page_edits_nothing_whatever_its_span_says(inputs):
    x, y, pool, _ = inputs
    everywhere = make_tiles(*((n, 0, 0, TILE, 0) for n in range(3)), (1, 3, 2, 5, 0))
    mask = np.ones((T, 2), bool)
    ours = lowrank_edit(x, y, pool, everywhere, mask)
    np.testing.assert_allclose(ours, y + edit(x, pool, everywhere, mask), atol=ATOL)
    np.testing.assert_array_equal(np.asarray(ours)[:10], y[:10])


def test_the_order_of_entries_and_the_pages_numbers_do_not_matter(inputs, rng):
    x, y, pool, mask = inputs
    order = np.array([0, *rng.permutation(np.arange(1, PAGES))])
    moved = PagePool(*(leaf[np.argsort(order)] for leaf in pool))
    columns = rng.permutation(4)
    renamed = TilePages(*(array[:, columns] for array in TILES))
    renamed = renamed._replace(page_NE=jnp.asarray(order.astype(np.int32))[renamed.page_NE])
    np.testing.assert_allclose(
        lowrank_edit(x, y, moved, renamed, mask), lowrank_edit(x, y, pool, TILES, mask), atol=ATOL
    )  # fmt: skip


def test_pages_that_no_entry_names_may_hold_anything(inputs):
    x, y, pool, mask = inputs
    ours = lowrank_edit(x, y, spoil(pool, UNUSED), TILES, mask)
    np.testing.assert_array_equal(ours, lowrank_edit(x, y, pool, TILES, mask))


@pytest.mark.parametrize("leaf", ["a_PDR", "c_PR"])
def test_a_page_of_nan_spoils_the_tokens_that_own_it_only(leaf, inputs):
    """Another request's tokens share its tile. B must be finite: a tile's tokens are multiplied with all its pages."""
    x, y, pool, mask = inputs
    spoiled = pool._replace(**{leaf: getattr(spoil(pool, [3]), leaf)})
    ours = np.asarray(lowrank_edit(x, y, spoiled, TILES, mask))
    owners = (np.arange(T) >= 5) & (np.arange(T) < 14)
    np.testing.assert_allclose(ours[~owners], (y + edit(x, pool, TILES, mask))[~owners], atol=ATOL)
    assert np.isnan(ours[owners & mask[:, 0]]).all()


def test_a_token_of_nan_spoils_itself_only(inputs):
    x, y, pool, mask = inputs
    bad = x.copy()
    bad[[2, 20]] = np.nan
    ours, clean = np.asarray(lowrank_edit(bad, y, pool, TILES, mask)), lowrank_edit(x, y, pool, TILES, mask)
    others = ~np.isin(np.arange(T), (2, 20))
    np.testing.assert_array_equal(ours[others], np.asarray(clean)[others])
    np.testing.assert_array_equal(ours[20], y[20])


def test_shrink_serves_sites_of_different_widths_from_one_x(inputs, rng):
    x, _, pool, mask = inputs
    pools, tiles = [pool, make_pool(rng, f=9)], [TILES, make_tiles((0, 4, 0, 8, 0), (2, 6, 1, 3, 1))]
    shrunk = jax.jit(api.shrink)(x, pools, tiles, mask)
    for s, one, lists, width in zip(shrunk, pools, tiles, (F, 9), strict=True):
        assert s.shape == (T, 4, RANK)
        assert s.dtype == np.float32
        y = rng.standard_normal((T, width)).astype(np.float32)
        np.testing.assert_allclose(api.expand(s, y, one, lists), y + edit(x, one, lists, mask), atol=ATOL)
        owned = np.zeros((T, 4), bool)
        for n, e in np.ndindex(3, 4):
            page, start, end, group = (int(array[n, e]) for array in lists)
            owned[n * TILE + start : n * TILE + end, e] = page > 0
            owned[:, e] &= np.where(np.arange(T) // TILE == n, mask[:, group], True)
        assert not np.asarray(s)[~owned].any()


def test_edits_at_one_site_read_the_unedited_input(inputs, rng):
    """At the residual stream x and y are one array, and a second page must not see the first one's edit."""
    x, _, _, mask = inputs
    pool = make_pool(rng, f=D)
    np.testing.assert_allclose(lowrank_edit(x, x, pool, TILES, mask), x + edit(x, pool, TILES, mask), atol=ATOL)


def test_bfloat16(inputs):
    x, y, pool, mask = inputs
    x16, y16 = jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16)
    rounded = PagePool(pool.a_PDR.astype(jnp.bfloat16), pool.c_PR, pool.b_PRF.astype(jnp.bfloat16))
    ours = lowrank_edit(x16, y16, rounded, TILES, mask)
    assert ours.dtype == jnp.bfloat16
    expected = f64(y16) + edit(x16, rounded, TILES, mask)
    np.testing.assert_allclose(f64(ours), expected, atol=2e-2 * np.abs(expected).max())


ROWS = np.array([[1, 4, 0, 0], [0, 0, 0, 0], [2, 0, 5, 6], [3, 0, 0, 0], [1, 4, 0, 0]], np.int32)
decode_edit = jax.jit(api.decode_edit)


def decode_edit64(x, y, pool, rows):
    a, c, b = map(f64, pool)
    out = f64(y).copy()
    for i, pages in enumerate(rows):
        for page in pages[pages > 0]:
            out[i] += (f64(x)[i] @ a[page] + c[page]) @ b[page]
    return out


def test_each_row_has_its_own_pages(rng):
    x, y = rng.standard_normal((5, D)).astype(np.float32), rng.standard_normal((5, F)).astype(np.float32)
    pool = make_pool(rng)
    ours = decode_edit(x, y, [pool], [ROWS])
    np.testing.assert_allclose(ours, decode_edit64(x, y, pool, ROWS), atol=ATOL)
    np.testing.assert_array_equal(ours[1], y[1])
    assert np.abs(np.asarray(ours) - y)[[0, 2, 3, 4]].max(axis=1).min() > 0.1


def test_a_row_sees_no_other_rows_pages(rng):
    x, y = rng.standard_normal((5, D)).astype(np.float32), rng.standard_normal((5, F)).astype(np.float32)
    pool = make_pool(rng)
    ours = np.asarray(decode_edit(x, y, [spoil(pool, [3])], [ROWS]))
    assert np.isnan(ours[3]).all()
    np.testing.assert_allclose(
        np.delete(ours, 3, 0), np.delete(decode_edit64(x, y, pool, ROWS), 3, 0), atol=ATOL
    )  # fmt: skip


def test_decode_in_bfloat16(rng):
    x, y = (jnp.asarray(rng.standard_normal((5, width)), jnp.bfloat16) for width in (D, F))
    pool = make_pool(rng)
    ours = decode_edit(x, y, [pool], [ROWS])
    assert ours.dtype == jnp.bfloat16
    expected = decode_edit64(x, y, pool, ROWS)
    np.testing.assert_allclose(f64(ours), expected, atol=2e-2 * np.abs(expected).max())


def arguments(rng):
    x, y = rng.standard_normal((T, D)).astype(np.float32), rng.standard_normal((T, F)).astype(np.float32)
    return x, y, make_pool(rng), TILES, np.ones((T, 2), bool)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, y, p, t, m: (x[:, :-1], y, p, t, m), "pool.a_PDR has input width 10; x has 9"),
        (lambda x, y, p, t, m: (x, y[:, :-1], p, t, m), "pool.b_PRF has output width 6; y has 5"),
        (lambda x, y, p, t, m: (x, y, p._replace(c_PR=p.c_PR[1:]), t, m), "pool.c_PR has shape"),
        (lambda x, y, p, t, m: (x, y, p._replace(b_PRF=p.b_PRF[:, 1:]), t, m), "pool.b_PRF has shape"),
        (lambda x, y, p, t, m: (x, y, p, t._replace(end_NE=t.end_NE[:, 1:]), m), "tiles.end_NE has shape"),
        (
            lambda x, y, p, t, m: (x, y, p, t._replace(page_NE=t.page_NE / 2), m),
            "tiles.page_NE has dtype float32; it must be an integer",
        ),
        (lambda x, y, p, t, m: (x[:-1], y[:-1], p, t, m[:-1]), "tiles.page_NE has 3 tiles.*23 tokens"),
        (lambda x, y, p, t, m: (x, y, p, t, m[:-1]), "mask_TG"),
        (lambda x, y, p, t, m: (x, y, p, t, m[:, 0]), "mask_TG"),
        (lambda x, y, p, t, m: (x, y, p, t, m.astype(np.float32)), "mask_TG is float32"),
        (lambda x, y, p, t, m: (x, y[:-12], p, t, m), "s_TER has shape"),
    ],
)
def test_wrong_arguments_of_an_edit_are_named(change, text, rng):
    with pytest.raises(ValueError, match=text):
        api.lowrank_edit(*change(*arguments(rng)))


def test_wrong_arguments_of_shrink_and_decode_are_named(rng):
    x, y, pool, tiles, mask = arguments(rng)
    with pytest.raises(ValueError, match="pools has 2 sites, tiles 1"):
        api.shrink(x, (pool, pool), (tiles,), mask)
    with pytest.raises(ValueError, match=r"pages\[0\] has 4 rows; x_BD has 24"):
        api.decode_edit(x, y, [pool], [ROWS[:4]])
    with pytest.raises(ValueError, match=r"pool\.a_PDR has input width 10; x has 6"):
        api.decode_edit(y, y, [pool], [ROWS[:4]])


def pages_of_rank_8(pool):
    return PagePool(pool.a_PDR[..., :8], pool.c_PR[:, :8], pool.b_PRF[:, :8])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, y, p, t, m: (x[0], y, p, t, m), "x_TD has shape .*; expected 2 axes"),
        (lambda x, y, p, t, m: (x.astype(int), y, p, t, m), "x_TD has dtype int64; it must be a floating-point number"),
        (lambda x, y, p, t, m: (x, y[0], p, t, m), "y_TF has shape .*; expected 2 axes"),
        (lambda x, y, p, t, m: (x, y.astype(int), p, t, m), "y_TF has dtype int64"),
        (lambda x, y, p, t, m: (x[:0], y[:0], p, t, m[:0]), "x_TD has shape .*; no axis may be empty"),
        (lambda x, y, p, t, m: (x, y, pages_of_rank_8(p), t, m), "pages of rank 8; they must be of rank 16"),
        (lambda x, y, p, t, m: (x, y, p._replace(a_PDR=p.a_PDR[0]), t, m), "pool.a_PDR has shape .*; expected 3 axes"),
        (lambda x, y, p, t, m: (x, y, p._replace(b_PRF=p.b_PRF.astype(np.int8)), t, m), "pool.b_PRF has dtype int8"),
        (lambda x, y, p, t, m: (x, y, p, TilePages(*(a[:, :0] for a in t)), m), "tiles.page_NE has shape .* empty"),
        (lambda x, y, p, t, m: (x, y, p, TilePages(*(a[0] for a in t)), m), "page_NE has shape .*; expected 2 axes"),
        (lambda x, y, p, t, m: (x, y, p, TilePages(*(a.tolist() for a in t)), m), "tiles.page_NE is of type list"),
    ],
)  # fmt: skip
def test_what_is_no_such_array_is_named(change, text, rng):
    with pytest.raises(ValueError, match=text):
        api.lowrank_edit(*change(*arguments(rng)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, y, p, r: (x, y[:1], [p], [r]), "y_BF has 1 rows; x_BD has 5"),
        (lambda x, y, p, r: (x, y, [p], [r[:, 0]]), r"pages\[0\] has shape .*; expected 2 axes"),
        (
            lambda x, y, p, r: (x, y, [p], [r.astype(np.float32)]),
            r"pages\[0\] has dtype float32; it must be an integer",
        ),
        (lambda x, y, p, r: (x, y, [pages_of_rank_8(p)], [r]), "rank 8"),
    ],
)
def test_wrong_rows_of_a_decode_edit_are_named(change, text, rng):
    x, y = rng.standard_normal((5, D)).astype(np.float32), rng.standard_normal((5, F)).astype(np.float32)
    with pytest.raises(ValueError, match=text):
        api.decode_edit(*change(x, y, make_pool(rng), ROWS))


def test_a_group_beyond_the_mask_switches_nothing_on(inputs):
    x, y, pool, _ = inputs
    beyond = TILES._replace(group_NE=jnp.full_like(TILES.group_NE, 5))
    np.testing.assert_array_equal(lowrank_edit(x, y, pool, beyond, np.zeros((T, 2), bool)), y)


def test_slots_outside_the_pool_are_not_written(rng):
    qkv = rng.standard_normal((3, 4 * 4)).astype(np.float32)
    cos, sin = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)
    pool = jnp.zeros((2, 4, 2, 4), jnp.float32)
    _, written = api.rope_kv(qkv, (None, None, None), cos, sin, pool, np.array([-1, 8, 2], np.int32))
    assert np.flatnonzero(np.abs(np.asarray(written).reshape(8, -1)).sum(axis=1)).tolist() == [2]


def test_an_unknown_implementation_is_refused_with_those_there_are(rng):
    x, y, pool, tiles, mask = arguments(rng)
    calls = [
        lambda: api.shrink(x, (pool,), (tiles,), mask, implementation="cuda"),
        lambda: api.expand(np.zeros((T, 4, RANK), np.float32), y, pool, tiles, implementation="cuda"),
        lambda: api.lowrank_edit(x, y, pool, tiles, mask, implementation="cuda"),
        lambda: api.decode_edit(x, y, [pool], [np.zeros((T, 1), np.int32)], implementation="cuda"),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"'cuda'.*xla"):
            call()


def test_an_unknown_implementation_does_not_hide_a_wrong_argument(rng):
    x, y, pool, tiles, mask = arguments(rng)
    with pytest.raises(ValueError, match="mask_TG"):
        api.lowrank_edit(x, y, pool, tiles, mask[:3], implementation="cuda")
