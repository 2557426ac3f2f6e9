"""Slabs: a rank page of all layers as one array, which costs one copy."""

import numpy as np

from preft_jax.adapters.pages import PackedSite


def slab(edit: PackedSite, n: int) -> np.ndarray:
    """Return rank page ``n`` of an adapter at one site as one array ``[L, W]`` of A's dtype, for ``api.write_pages``.

    A row is A, B, and the bits of the float32 c; behind it, if they have some, the bits of the scales of A and of B.
    """
    layers = len(edit.a)
    numbers = [edit.c[:, n]] if edit.scales is None else [edit.c[:, n], *(scale[:, n] for scale in edit.scales)]
    bits = (np.ascontiguousarray(x, np.float32).view(edit.a.dtype) for x in numbers)
    return np.concatenate([edit.a[:, n].reshape(layers, -1), edit.b[:, n].reshape(layers, -1), *bits], axis=1)
