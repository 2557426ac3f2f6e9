"""Writing rank pages to a bank, by every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import api
from kernels.xla.fp8 import FP8

LAYERS, PAGES, R = 3, 6, 16


def bits(array):
    """Return numbers as they lie in memory."""
    array = np.asarray(array)
    return array.view(np.uint16 if array.itemsize == 2 else np.uint32)


def case(rng, dtype, d, f, count, before=0, behind=0):
    """Return pools, pages as A, c and B, and the slabs that hold them between ``before`` and ``behind`` elements."""

    def draw(*shape, dtype=dtype):
        return np.asarray(rng.standard_normal(shape), dtype)

    pools = [draw(LAYERS, PAGES, d, R), draw(LAYERS, PAGES, R, dtype=np.float32), draw(LAYERS, PAGES, R, f)]
    for pool in pools:
        pool[:, 0] = 0
    new = [draw(count, LAYERS, d, R), draw(count, LAYERS, R, dtype=np.float32), draw(count, LAYERS, R, f)]
    slabs = []
    for a, c, b in zip(*new, strict=True):
        own = [a.reshape(LAYERS, -1), b.reshape(LAYERS, -1), c.view(dtype)]
        slabs.append(np.concatenate([draw(LAYERS, before), *own, draw(LAYERS, behind)], axis=1))
    return pools, new, slabs


def write(implementation, pools, slabs, page, at=0):
    pages = jnp.asarray([[0] * len(page), page, [PAGES - 1] * len(page)], jnp.int32)
    arguments = [*map(jnp.asarray, pools), list(map(jnp.asarray, slabs)), pages]

    def function(*arguments):
        return api.write_pages(*arguments, row=1, at=at, implementation=implementation)

    return jax.jit(function, donate_argnums=(0, 1, 2))(*arguments)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize(("d", "f", "before", "behind"), [(32, 48, 0, 0), (64, 16, 96, 32), (272, 528, 2, 6)])
def test_pages_are_written_bit_by_bit_and_others_stay(implementation, dtype, d, f, before, behind, rng):
    pools, new, slabs = case(rng, dtype, d, f, 3, before, behind)
    page = [4, 1, 5]
    wanted = [pool.copy() for pool in pools]
    for pool, pages in zip(wanted, new, strict=True):
        pool[:, page] = np.moveaxis(pages, 0, 1)
    for found, expected in zip(write(implementation, pools, slabs, page, before), wanted, strict=True):
        np.testing.assert_array_equal(bits(found), bits(expected))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize(("d", "f", "before", "behind"), [(32, 48, 0, 0), (272, 528, 4, 12)])
def test_pages_in_fp8_are_multiplied_with_the_scales_of_their_ranks(implementation, dtype, d, f, before, behind, rng):
    """In float32, and rounded to the bank's dtype once; zeros for the null page write nothing."""
    pools, _, _ = case(rng, dtype, d, f, 1)
    a, b = (np.asarray(rng.uniform(-448, 448, shape), FP8) for shape in ((LAYERS, d, R), (LAYERS, R, f)))
    c, a_scale, b_scale = rng.standard_normal((3, LAYERS, R)).astype(np.float32)
    a_scale[:, 3] = 0
    parts = [a.reshape(LAYERS, -1), b.reshape(LAYERS, -1), *(x.view(FP8) for x in (c, a_scale, b_scale))]
    around = [np.asarray(rng.standard_normal((LAYERS, n)), FP8) for n in (before, behind)]
    slab = np.concatenate([around[0], *parts, around[1]], axis=1)
    wanted = [pool.copy() for pool in pools]
    wanted[0][:, 4] = a.astype(np.float32) * a_scale[:, None]
    wanted[1][:, 4] = c
    wanted[2][:, 4] = b.astype(np.float32) * b_scale[..., None]
    found = write(implementation, pools, [slab, np.zeros_like(slab)], [4, 0], before)
    for one, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(bits(one), bits(expected))


@pytest.mark.parametrize("count", [1, 8])
def test_zeros_for_the_null_page_write_nothing(implementation, count, rng):
    pools, new, slabs = case(rng, jnp.bfloat16, 32, 48, count)
    page = [0] * count
    page[-1] = 2
    for slab in slabs[:-1]:
        slab[:] = 0
    found = write(implementation, pools, slabs, page)
    for pool, pages, expected in zip(found, new, pools, strict=True):
        np.testing.assert_array_equal(bits(pool)[:, 2], bits(pages)[-1])
        np.testing.assert_array_equal(bits(pool)[:, [0, 1, 3, 4, 5]], bits(expected)[:, [0, 1, 3, 4, 5]])


def test_what_is_wrong_is_said(rng):
    pools, _, slabs = case(rng, np.float32, 32, 48, 2)
    with pytest.raises(ValueError, match="page_SK has rows of 1 pages; there are 2 slabs"):
        api.write_pages(*pools, slabs, np.zeros((1, 1), np.int32))
    with pytest.raises(ValueError, match=r"slabs\[0\] has shape .*; expected 3 rows of 1296 elements and more from 1"):
        api.write_pages(*pools, slabs, np.zeros((1, 2), np.int32), at=1)
    with pytest.raises(ValueError, match=r"slabs\[0\] has dtype float16; allowed: float32, as a_LPDR has, or float8"):
        api.write_pages(*pools, [slab.astype(np.float16) for slab in slabs], np.zeros((1, 2), np.int32))
    with pytest.raises(ValueError, match="slabs are of several dtypes"):
        api.write_pages(*pools, [slabs[0], slabs[1].astype(FP8)], np.zeros((1, 2), np.int32))
    with pytest.raises(ValueError, match="c_LPR has dtype float16; allowed: float32"):
        api.write_pages(pools[0], pools[1].astype(np.float16), pools[2], slabs, np.zeros((1, 2), np.int32))
    with pytest.raises(ValueError, match="slabs is empty"):
        api.write_pages(*pools, [], np.zeros((1, 0), np.int32))
    with pytest.raises(ValueError, match="row is 1; page_SK has 1 rows"):
        api.write_pages(*pools, slabs, np.zeros((1, 2), np.int32), row=1)
