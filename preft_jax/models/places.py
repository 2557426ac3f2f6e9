"""Where the tokens of a batch stand in the KV cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from preft_jax.models.batch import DecodeBatch, PrefillBatch


class Packed(NamedTuple):
    """Tokens of packed requests: int32 arrays as in ``PrefillBatch``.

    ``max_query_len`` is a static bound on the tokens of one request in the batch.
    """

    slots_T: jax.Array
    page_table_BP: jax.Array
    query_start_B1: jax.Array
    kv_len_B: jax.Array
    max_query_len: int


class Decoding(NamedTuple):
    """One token of each row: int32 ``page_table_BP`` and ``position_B``, as in ``DecodeBatch``."""

    page_table_BP: jax.Array
    position_B: jax.Array


class Mixed(NamedTuple):
    """Packed tokens, the last of which are those of decoding rows.

    ``rows`` has an entry for each of the last tokens that may be a row; those below position 0 are none. ``packed``
    knows nothing of rows: their slots lie beyond the pool, and no request has them.
    """

    packed: Packed
    rows: Decoding

    def put_rows(self, packed: jax.Array, rows: jax.Array) -> jax.Array:
        """Return ``packed [T, ...]`` with ``rows [B, ...]`` in place of those of its last tokens that hold a row."""
        at = packed.shape[0] - rows.shape[0]
        is_row = (self.rows.position_B >= 0).reshape(-1, *[1] * (rows.ndim - 1))
        return packed.at[at:].set(jnp.where(is_row, rows, packed[at:]))


Places = Packed | Decoding | Mixed


def packed_places(batch: PrefillBatch, max_query_len: int) -> Packed:
    """Return where the tokens of a packed batch stand."""
    return Packed(batch.slots_T, batch.page_table_BP, batch.query_start_B1, batch.kv_len_B, max_query_len)


def row_places(batch: DecodeBatch) -> Decoding:
    """Return where the tokens of decoding rows stand."""
    return Decoding(batch.page_table_BP, batch.positions_B)
