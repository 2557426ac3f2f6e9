"""Which examples are trained on when, and the arrays that a step takes: plain NumPy, the same for the same seed.

An epoch is planned whole: shuffled, then packed into rows of ``max_length`` or put beside others of like length.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kernels.types import Array
from preft_jax.errors import ConfigError
from preft_jax.models.batch import bucket
from preft_jax.shapes import NUM_GROUPS
from train.data.documents import Document
from train.data.rows import Example

_WINDOW = 32
"""Batches whose examples are sorted by length together."""

_OPEN_ROWS = 64
"""Rows that are filled at a time when packing."""

SHORTEST = 32
"""Tokens of the shortest padded row."""

Row = list[int]
"""Examples that share a row, by index."""


class Batch(NamedTuple):
    """Rows of tokens to learn from. ``segments_BS`` is None where no row holds several documents.

    int32 ``tokens_BS``, ``targets_BS`` (the next token of the same document), ``positions_BS`` (from 0 in each
    document, or behind a learned prefix), ``slot_B`` (the row's adapter), ``draw_BU`` (what the row's random numbers
    depend on: seed, micro-batch, row); float32 ``weights_BS`` of the targets, 0 where they are not learned; bool
    ``edit_mask_BSG``. What some losses need of the targets is float32 ``[B, S]`` too, and None for the others; so is
    ``temperature_BS``, of the targets' distribution, which is None where all have 1.
    """

    tokens_BS: Array
    targets_BS: Array
    weights_BS: Array
    edit_mask_BSG: Array
    positions_BS: Array
    segments_BS: Array | None
    slot_B: Array
    draw_BU: Array
    old_logprobs_BS: Array | None = None
    advantages_BS: Array | None = None
    ref_logprobs_BS: Array | None = None
    temperature_BS: Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How examples become batches.

    Attributes:
        batch_size: rows of a micro-batch.
        max_length: tokens of a packed row; examples are no longer.
        packing: put several examples into a row.
        shuffle: other orders each epoch, drawn from ``seed``; otherwise the file's order.
        seed: of the shuffling.
    """

    batch_size: int = 8
    max_length: int = 1024
    packing: bool = False
    shuffle: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; give at least 1")
        if not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"seed is {self.seed}; give an integer from 0 to {(1 << 32) - 1}")


def plan_epoch(lengths: Sequence[int], options: BatchOptions, epoch: int) -> list[list[Row]]:
    """Return an epoch's micro-batches, each a list of rows; every example is in exactly one."""
    rng = np.random.default_rng([options.seed, epoch])
    order = rng.permutation(len(lengths)) if options.shuffle else np.arange(len(lengths))
    if options.packing:
        rows = _pack(order.tolist(), lengths, options.max_length)
        return [rows[at : at + options.batch_size] for at in range(0, len(rows), options.batch_size)]
    if not options.shuffle:
        return [
            [[int(i)] for i in order[at : at + options.batch_size]] for at in range(0, len(order), options.batch_size)
        ]
    size, batches = options.batch_size * _WINDOW, []
    for at in range(0, len(order), size):
        window = sorted(order[at : at + size].tolist(), key=lambda i: -lengths[i])
        batches += [
            [[i] for i in window[n : n + options.batch_size]] for n in range(0, len(window), options.batch_size)
        ]
    return [batches[i] for i in rng.permutation(len(batches))]


def _pack(order: Sequence[int], lengths: Sequence[int], max_length: int) -> list[Row]:
    """Put each example into the first open row with room for it."""
    rows: list[Row] = []
    open_rows: list[tuple[Row, list[int]]] = []
    for i in order:
        fits = next((entry for entry in open_rows if entry[1][0] >= lengths[i]), None)
        if fits is None:
            fits = ([], [max_length])
            rows.append(fits[0])
            open_rows = [*open_rows[-_OPEN_ROWS + 1 :], fits]
        fits[0].append(i)
        fits[1][0] -= lengths[i]
    return rows


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one adapter for one micro-batch.

    Attributes:
        rows: each a list of documents, one after the other.
        slot: of the adapter.
        seed: of its random numbers.
        count: micro-batches that it has had before.
        first: position of each document's first token: behind a learned prefix.
    """

    rows: Sequence[Sequence[Example | Document]]
    slot: int
    seed: int
    count: int
    first: int = 0


def collate(
    parts: Sequence[Rows], *, num_rows: int, max_length: int, packed: bool, fields: Sequence[str] = ()
) -> Batch:
    """Return the rows of one or several adapters as one batch of ``num_rows``, padded to a bucketed length.

    Args:
        parts: rows by adapter.
        num_rows: rows of the batch; those that nobody needs are padding.
        max_length: no row is padded beyond it, rounded up to a multiple of ``SHORTEST``.
        packed: whether rows may hold several documents.
        fields: those of ``OPTIONAL_FIELDS`` that the batch has; all documents must have them.
    """
    longest = max((sum(map(len, row)) for part in parts for row in part.rows), default=1)
    most = -(-max(max_length, 1) // SHORTEST) * SHORTEST
    size = min(bucket(longest, SHORTEST), most)
    batch = empty_batch(num_rows, size, packed, fields)
    if any(document.temperature != 1 for part in parts for row in part.rows for document in row):
        batch = batch._replace(temperature_BS=np.ones((num_rows, size), np.float32))
    b = 0
    for part in parts:
        for number, row in enumerate(part.rows):
            batch.slot_B[b] = part.slot
            batch.draw_BU[b] = part.seed, part.count, number
            _fill(batch, b, row, fields, part.first)
            b += 1
    return batch


def empty_batch(num_rows: int, size: int, packed: bool, fields: Sequence[str] = ()) -> Batch:
    """Return a batch of padding alone; arguments as of ``collate``, ``size`` tokens in a row."""
    shape = num_rows, size
    return Batch(
        tokens_BS=np.zeros(shape, np.int32),
        targets_BS=np.zeros(shape, np.int32),
        weights_BS=np.zeros(shape, np.float32),
        edit_mask_BSG=np.zeros((*shape, NUM_GROUPS), bool),
        positions_BS=np.zeros(shape, np.int32),
        segments_BS=np.zeros(shape, np.int32) if packed else None,
        slot_B=np.zeros(num_rows, np.int32),
        draw_BU=np.zeros((num_rows, 3), np.uint32),
        **{f"{name}_BS": np.zeros(shape, np.float32) for name in fields},
    )


def _fill(batch: Batch, b: int, row: Sequence[Example | Document], fields: Sequence[str], first: int) -> None:
    at = 0
    for segment, document in enumerate(row, 1):
        n = len(document)
        here, targets = slice(at, at + n), slice(at, at + n - 1)
        batch.tokens_BS[b, here] = document.token_ids
        batch.targets_BS[b, targets] = document.token_ids[1:]
        batch.weights_BS[b, targets] = document.weights[1:]
        for name in fields:
            getattr(batch, f"{name}_BS")[b, targets] = getattr(document, name)[1:]
        if batch.temperature_BS is not None:
            batch.temperature_BS[b, targets] = document.temperature
        batch.edit_mask_BSG[b, here] = document.edit_mask
        batch.positions_BS[b, here] = np.arange(first, first + n)
        if batch.segments_BS is not None:
            batch.segments_BS[b, here] = segment
        at += n
