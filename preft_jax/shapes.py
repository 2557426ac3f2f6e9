"""The one legend for the axis letters that end array names, as in ``x_TD`` or ``a_PDR``.

========  ==================================================================
``T``     tokens of a packed batch, requests one after the other
``S``     tokens of one padded sequence, or keys that a query may look at
``B``     requests (sequences) in a batch
``Q``     queries of one request in a batch, padded
``D``     model width (``hidden_size``), or the input width of an edit's site
``F``     feed-forward width, or the output width of an edit's site
``H``     query heads
``K``     key/value heads
``J``     key and value heads, interleaved: k0 v0 k1 v1 ...
``C``     channels of one head (``head_dim``)
``V``     vocabulary
``L``     layers
``P``     pages of a pool (KV pages, or rank pages of the adapter bank)
``N``     tiles: fixed-size runs of tokens of a packed batch; in attention, of queries
``E``     entries of a tile's (or a row's) list of rank pages
``R``     rank; inside a rank page always ``RANK_PAGE``
``X``     pairs of rotary channels of one head (C / 2)
``I``     tokens of one tile
``U``     parts of a sum that several programs share
``M``     entries of a list of token biases, or KV pages copied at once
``G``     position groups of an edit mask (0: edited, or first; 1: last)
========  ==================================================================

``bool`` masks are named ``mask_...``; counts and cumulative counts are ``int32``.
"""

from typing import Any

from preft_jax.errors import ShapeError, shown

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes of weights and of rank pages."""

KV_DTYPES = {name: name for name in DTYPES} | {"fp8": "float8_e4m3fn"}
"""What the KV cache may be in: names of options, and of dtypes."""

ADAPTER_DTYPES = ("fp8",)
"""What rank pages may be in outside the bank, if not in its dtype."""

RANK_PAGE = 16
"""Rank of one page of the adapter bank: an edit of rank 48 occupies three pages."""

NUM_GROUPS = 2
"""Position groups of every edit mask."""

LINEAR_SITES = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven linears of a layer that a LoRA may edit, in the order of computation."""

SITES = (*LINEAR_SITES, "block")
"""Every site of a layer that a low-rank edit may act on; ``block`` is the residual stream after the layer."""

PREFIX = "prefix"
"""The site of attention's learned positions in front of a prompt: keys are A, values are B (``PrefixKV``)."""

BANK_SITES = (*SITES, PREFIX)
"""Every site that adapters may have rank pages at."""


def check_axes(name: str, array: Any, kind: str = "", **axes: int | None) -> None:
    """Check an array's shape axis by axis, and its kind.

        check_axes("edit_mask_BSG", mask, "bool", B=2, S=16, G=NUM_GROUPS)

    Args:
        name: of the array, for the error.
        array: of NumPy or JAX, traced or not.
        kind: ``bool``, ``int`` or ``float``; empty for any.
        axes: the letters and sizes of all its axes, in order; None for any size.

    Raises:
        ShapeError: it is no array, or has other axes or another kind.
    """
    wanted = ", ".join(letter if size is None else f"{letter}={size}" for letter, size in axes.items())
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    if shape is None or dtype is None:
        raise ShapeError(
            f"{name} is {shown(array)}; give an array of NumPy or JAX, {f'{kind} ' if kind else ''}[{wanted}]"
        )
    fits = len(shape) == len(axes) and all(size in (None, own) for own, size in zip(shape, axes.values(), strict=True))
    if not fits:
        raise ShapeError(f"{name} has the shape {list(shape)}, expected [{wanted}]")
    if kind and not _is_kind(dtype, kind):
        raise ShapeError(f"{name} is {dtype}, expected {kind} [{wanted}]")


def _is_kind(dtype: Any, kind: str) -> bool:
    if kind == "float":  # bfloat16 is of no kind that NumPy knows.
        return dtype.kind == "f" or "float" in str(dtype)
    return dtype.kind in {"bool": "b", "int": "iu"}[kind]
