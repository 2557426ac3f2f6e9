"""``collate``: sequences of several lengths as the padded arrays that ``forward`` and a loss take. Plain NumPy."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from preft_jax.errors import ShapeError
from preft_jax.models.batch import bucket
from preft_jax.shapes import NUM_GROUPS, check_axes

SHORTEST = 16
"""Tokens of the shortest padded row."""


class Rows(NamedTuple):
    """Padded sequences.

    int32 ``tokens_BS`` and ``targets_BS`` (each token's successor), bool ``edit_mask_BSG``, float32 ``weights_BS`` of
    the targets: 0 where nothing is learned, at each row's last token and in its padding.
    """

    tokens_BS: np.ndarray
    targets_BS: np.ndarray
    edit_mask_BSG: np.ndarray
    weights_BS: np.ndarray


def collate(examples: Sequence[tuple[Any, Any, Any]], *, length: int | None = None) -> Rows:
    """Pad examples to one length.

        rows = collate([(token_ids, edit_mask, weights), ...])
        logits = forward(config, params, rows.tokens_BS, folded=folded, edit_mask_BSG=rows.edit_mask_BSG)

    Args:
        examples: of each its token ids ``[S]``, its edit mask bool ``[S, NUM_GROUPS]``, and the weight of each token in
            the loss ``[S]``: float or bool, given those before it, so the first one's does not count.
        length: of the rows; None takes the longest one's, rounded up so that few lengths are compiled.

    Raises:
        ShapeError: if an array has other axes, or a row is longer than ``length``.
    """
    if not len(examples):
        raise ShapeError("there are no examples; give at least one (token_ids, edit_mask, weights)")
    checked = []
    for number, (token_ids, edit_mask, weights) in enumerate(examples):
        arrays = np.asarray(token_ids), np.asarray(edit_mask), np.asarray(weights, np.float32)
        size = len(arrays[0])
        check_axes(f"token_ids of example {number}", arrays[0], "int", S=None)
        check_axes(f"edit_mask of example {number}", arrays[1], "bool", S=size, G=NUM_GROUPS)
        check_axes(f"weights of example {number}", arrays[2], "float", S=size)
        checked.append(arrays)
    longest = max(len(token_ids) for token_ids, _, _ in checked)
    size = bucket(longest, SHORTEST) if length is None else length
    if longest > size:
        raise ShapeError(f"an example has {longest} tokens and length is {size}; raise it, or cut the example")
    shape = len(checked), size
    rows = Rows(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros((*shape, NUM_GROUPS), bool),
                np.zeros(shape, np.float32))  # fmt: skip
    for b, (token_ids, edit_mask, weights) in enumerate(checked):
        n = len(token_ids)
        rows.tokens_BS[b, :n], rows.edit_mask_BSG[b, :n] = token_ids, edit_mask
        rows.targets_BS[b, : n - 1], rows.weights_BS[b, : n - 1] = token_ids[1:], weights[1:]
    return rows
