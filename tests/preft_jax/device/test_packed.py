"""Many arrays as one: the same bits in a program, one leaf, and one structure for each layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.types import TilePages
from preft_jax.device.packed import Packed, pack
from preft_jax.errors import ShapeError


def tree_of(rng, tokens=6):
    """Return a tree with every dtype, an array without elements, a scalar and an array that is no contiguous one."""
    bits = rng.integers(0, 2**32, (3, 4), dtype=np.uint32)
    floats = bits.view(np.float32).copy()
    floats[0] = np.nan, -0.0, np.inf, np.float32(1e-45)  # A copy of numbers need not keep these.
    pages = np.arange(2 * 3, dtype=np.int32).reshape(2, 3)
    return {
        "tokens": rng.integers(-(2**31), 2**31, tokens, dtype=np.int64).astype(np.int32),
        "mask": rng.integers(0, 2, (tokens, 2)).astype(bool),
        "tiles": {"q": TilePages(pages, pages.T.reshape(2, 3), pages[:, ::-1], pages + 1)},
        "floats": floats,
        "seeds": bits,
        "none": np.zeros((0, 5), np.int32),
        "flag": np.asarray(True),
    }


def bits_of(array):
    array = np.asarray(array)
    return array if array.dtype == bool else array.view(np.uint32)


def test_a_program_finds_the_same_bits(rng):
    tree = tree_of(rng)
    packed = pack(tree)
    assert packed.flat.dtype == np.int32
    assert [leaf.shape for leaf in jax.tree.leaves(packed)] == [(sum(np.size(x) for x in jax.tree.leaves(tree)),)]
    found = jax.jit(Packed.unpack)(jax.device_put(packed))
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for own, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert (own.shape, own.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_array_equal(bits_of(own), bits_of(wanted))


def test_what_is_packed_is_a_copy(rng):
    tree = {"tokens": np.arange(4, dtype=np.int32)}
    packed = pack(tree)
    tree["tokens"][:] = 9
    assert packed.flat.tolist() == [0, 1, 2, 3]


def test_a_program_is_compiled_once_for_a_layout_and_takes_no_other(rng):
    traced = []

    def total(packed):
        traced.append(packed.layout)
        return packed.unpack()["tokens"].sum()

    program = jax.jit(total)
    for _ in range(2):
        program(pack(tree_of(rng)))
    assert len(traced) == 1
    compiled = program.lower(pack(tree_of(rng))).compile()
    compiled(pack(tree_of(rng)))
    other = {"tokens": np.zeros(pack(tree_of(rng)).flat.size, np.int32)}  # As many elements, cut otherwise.
    with pytest.raises(TypeError):
        compiled(pack(other))


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.float16, jnp.bfloat16, np.int8])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ShapeError, match=rf"\[3\] has dtype {np.dtype(dtype).name}; allowed: int32, uint32"):
        pack([np.zeros(3, dtype)])
