"""The arrays that low-rank-edit kernels share. Axis letters: ``preft_jax/shapes.py``."""

from typing import NamedTuple

import jax


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

    page_NE: jax.Array
    start_NE: jax.Array
    end_NE: jax.Array
    group_NE: jax.Array
