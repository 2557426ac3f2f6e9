"""Slabs: a rank page of all layers as one array, which costs one copy."""

from typing import Any

import numpy as np

from preft_jax.adapters.pages import PackedSite


def slab(edit: PackedSite, n: int, dtype: Any) -> np.ndarray:
    """Return rank page ``n`` of an adapter at one site as one array ``[L, W]``: A, B, and the bits of the float32 c."""
    layers, dtype = len(edit.a), np.dtype(dtype)
    a, b = (array[:, n].reshape(layers, -1).astype(dtype) for array in (edit.a, edit.b))
    return np.concatenate([a, b, np.ascontiguousarray(edit.c[:, n], np.float32).view(dtype)], axis=1)


def slab_width(d: int, f: int, rank: int, dtype: Any) -> int:
    """Return the width of a site's slabs."""
    return rank * (d + f) + rank * 4 // np.dtype(dtype).itemsize
