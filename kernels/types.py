"""The arrays that kernels share. Axis letters: ``preft_jax/shapes.py``."""

from typing import Any, NamedTuple

import jax

Array = Any
"""A ``jax.Array`` inside a program; a NumPy array where the host packs what the program will be called with."""


class Unsupported(NotImplementedError):  # noqa: N818 (a reason to take another implementation, seldom an error)
    """An implementation cannot do what it was asked, with the reason; ``implementation=None`` then takes another."""


class PagePool(NamedTuple):
    """Rank pages of one site of one layer.

    ``a_PDR [P, D, R]``, ``c_PR [P, R]``, ``b_PRF [P, R, F]`` with R = 16. Page 0 is null: all zeros, owned by nobody.
    """

    a_PDR: jax.Array
    c_PR: jax.Array
    b_PRF: jax.Array


class TilePages(NamedTuple):
    """For each tile of a packed batch, the rank pages that act in it and on which of its tokens.

    All int32 ``[N, E]``. Entry e of tile n says: page ``page_NE``, switched by column ``group_NE`` of the edit mask,
    acts on the tokens ``start_NE <= offset < end_NE`` of the tile. Unused entries have page 0 and an empty span. The
    tile size is T // N.
    """

    page_NE: Array
    start_NE: Array
    end_NE: Array
    group_NE: Array


class Site(NamedTuple):
    """Where an edit acts: a site's rank pages and the page lists of the batch's tiles there."""

    pool: PagePool
    tiles: TilePages


class Shrunk(NamedTuple):
    """An edit whose first half is done: ``s_TER``, float32 ``[T, E, R]``, from a shrink at ``site``."""

    s_TER: jax.Array
    site: Site


class QuantizedRows(NamedTuple):
    """Rows in FP8: ``x_TD * scale_T[:, None]``, float8_e4m3fn and float32. Any axes may lead both."""

    x_TD: jax.Array
    scale_T: jax.Array


class Unscaled(NamedTuple):
    """A product of matrices in FP8 before its scales: ``y_TF * row_T[:, None] * column_F``, rounded to y's dtype.

    With ``bias_F``, that is added before it is rounded. Scales and bias are float32; y is bfloat16 or float32, whose
    range such products do not leave.
    """

    y_TF: jax.Array
    row_T: jax.Array
    column_F: jax.Array
    bias_F: jax.Array | None = None


Product = jax.Array | Unscaled
"""What a linear gives, ``[T, F]``."""


class Draws(NamedTuple):
    """A token of each row, int32 ``[B]``, and float32 ``[B]``: its log-probability under the logits, under what it was
    drawn from, and the logarithm of the sum of the exponentials of the logits.
    """

    token_B: jax.Array
    logprob_B: jax.Array
    sampling_logprob_B: jax.Array
    total_B: jax.Array
