"""From a step to the NumPy arrays that its programs take: the only file that sees both sequences and arrays."""

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any

import jax
import numpy as np

from preft_jax.adapters.allocator import AdapterPages
from preft_jax.models.batch import PrefillBatch, Span, pack_prefill, pack_rows, rows_of, slots_of
from preft_jax.models.cache import NO_SLOT
from preft_jax.sampling.arrays import PlainSampling, SamplingArrays, sampling_arrays
from preft_jax.sampling.parameters import is_penalised, is_plain
from preft_jax.shapes import PREFIX, RANK_PAGE, SITES
from serve.engine.config import EngineConfig
from serve.engine.plan import Chunk, Step
from serve.engine.programs import Picks, Rows
from serve.engine.sequence import Sequence, Status

MAX_STOP_IDS = 16
"""End tokens of a sequence that the device knows; further ones are found by the host."""

Place = Callable[[Sequence], AdapterPages]
"""Where a sequence's adapter lies in the bank; empty for the base model."""


class Arrays:
    """Makes the arguments of device calls.

    Args:
        config: of the engine, resolved.
        table_width: KV pages of the longest sequence.
        prefill_rows: rows of a packed batch; a gap between two chunks takes one.
        draws_plainly: whether a program of its own draws for rows that have a temperature and a seed only.
        put: sends arrays to the device.
    """

    def __init__(
        self,
        config: EngineConfig,
        table_width: int,
        prefill_rows: int,
        draws_plainly: bool,
        put: Callable[[Any], Any] = jax.device_put,
    ):
        self._config = config
        self._sites = tuple(site for site in config.bank_sites if site in SITES)
        self._table_width = table_width
        self._prefill_rows = prefill_rows
        self._draws_plainly = draws_plainly
        self._put = put
        self._constants: tuple[Any, Any] | None = None

    # Prompts

    def packed(self, chunks: Many[Chunk], place: Place, num_tokens: int) -> PrefillBatch:
        """Return chunks as a packed batch of ``num_tokens`` tokens, padding included."""
        config = self._config
        return pack_prefill(
            [span_of(chunk, place(chunk.sequence)) for chunk in chunks],
            num_tokens=num_tokens,
            num_requests=self._prefill_rows,
            page_table_width=self._table_width,
            page_size=config.page_size or 1,
            tile=config.tile,
            min_entries=config.tile_entries or 1,
            sites=self._sites,
            starts=[chunk.at for chunk in chunks],
        )

    def following(self, chunks: Many[Chunk]) -> np.ndarray:
        """Return each packed token's successor in its prompt, int32 ``[prefill_tokens]``; 0 where there is none."""
        next_T = np.zeros(self._config.prefill_tokens, np.int32)
        for chunk in chunks:
            tokens = chunk.sequence.tokens[chunk.start + 1 : chunk.end + 1]
            next_T[chunk.at : chunk.at + len(tokens)] = tokens
        return next_T

    def prefixes(self, chunks: Many[Chunk], place: Place) -> tuple[np.ndarray, np.ndarray]:
        """Return the learned positions that are written before chunks, in rank pages.

        int32 ``[E]`` rank pages and ``[E, RANK_PAGE]`` slots, ``NO_SLOT`` where a position is in the cache already.
        """
        pages: list[int] = []
        slots: list[np.ndarray] = []
        for chunk in (chunk for chunk in chunks if chunk.prefix):
            sequence, rank_pages = chunk.sequence, place(chunk.sequence)[PREFIX].pages
            slot_T = np.full(len(rank_pages) * RANK_PAGE, NO_SLOT, np.int32)
            positions = np.asarray(chunk.prefix)
            slot_T[positions] = slots_of(positions, sequence.pages, self._config.page_size or 1)
            pages += rank_pages
            slots.append(slot_T.reshape(-1, RANK_PAGE))
        return np.asarray(pages, np.int32), np.concatenate(slots or [np.zeros((0, RANK_PAGE), np.int32)])

    # Rows

    def rows(self, sequences: Many[Sequence], size: int, first: int = 0) -> Rows:
        """Return sequences as rows of a decode step, from row ``first`` of ``size`` on."""
        slots = self._slots(sequences, size, first)
        pages = np.zeros((size, self._table_width), np.int32)
        for row, sequence in enumerate(sequences, first):
            pages[row, : len(sequence.pages)] = sequence.pages
        return Rows(slots, pages)

    def row_pages(self, sequences: Many[Sequence], place: Place, size: int) -> dict[str, np.ndarray]:
        """Return the rank pages of each row's all-token adapter, int32 ``[size, E]`` by site."""
        places: list[AdapterPages] = [place(s) if s.all_token and _runs(s) else {} for s in sequences]
        empty: list[AdapterPages] = [{}] * (size - len(places))
        entries = self._config.tile_entries or 1
        return pack_rows([*places, *empty], min_entries=entries, sites=self._sites)

    def picks(self, sequences: Many[Sequence], index: Many[int], fresh: Many[bool], size: int) -> Picks:
        """Return who draws, each from its row ``index`` of the logits; those that are ``fresh`` draw their first token.

        First means: behind the prompt, or behind what was generated before a preemption.
        """
        index_B = np.zeros(size, np.int32)
        index_B[: len(index)] = index
        row_B5, count = np.zeros((size, 5), np.int32), len(sequences)
        row_B5[:, 0], row_B5[:, 1] = self._slots(sequences, size), -1
        picks = Picks(index_B, row_B5, self.constants(sequences, size)[0])
        begins = zip(sequences, fresh, strict=True)
        picks.position[:count] = [len(s.tokens) - 1 if new else -1 for s, new in begins]
        picks.remaining[:count] = [s.remaining for s in sequences]
        picks.prompt_len[:count] = [s.prompt_len for s in sequences]
        picks.want_tops[:count] = [bool(s.logprobs) for s in sequences]
        return picks

    def constants(
        self, sequences: Many[Sequence], size: int
    ) -> tuple[jax.Array, PlainSampling] | tuple[jax.Array, SamplingArrays]:
        """Return stop ids and sampling parameters, kept on the device while the rows stay the same."""
        key = size, tuple(map(id, sequences))
        if self._constants is None or self._constants[0] != key:
            plainly = self._draws_plainly and draw_plainly(sequences)
            made = self._put(constants_of(sequences, size, plainly=plainly))
            self._constants = (key, (made, list(sequences)))  # The sequences live on, so that an id is one's own.
        return self._constants[1][0]

    def texts(self, sequences: Many[Sequence], fresh: Many[bool], size: int) -> np.ndarray | None:
        """Return the tokens of rows that begin, int32 ``[size, max_model_len]``; None if no penalty needs them."""
        if not any(is_penalised(s.sampling) and new for s, new in zip(sequences, fresh, strict=True)):
            return None
        tokens = np.zeros((size, self._config.max_model_len), np.int32)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence.tokens)] = sequence.tokens
        return tokens

    def _slots(self, sequences: Many[Sequence], size: int, first: int = 0) -> np.ndarray:
        """Return each row's slot; of rows that are empty or ended by the host one that there is not."""
        slots = np.full(size, self._config.max_num_seqs, np.int32)
        for row, sequence in enumerate(sequences, first):
            if _runs(sequence):
                slots[row] = sequence.slot
        return slots


def constants_of(sequences: Many[Sequence], size: int, *, plainly: bool) -> tuple[Any, Any]:
    """Return stop ids, int32 ``[size, MAX_STOP_IDS]`` padded with -1, and ``PlainSampling`` or ``SamplingArrays``."""
    stops = np.full((size, MAX_STOP_IDS), -1, np.int32)
    for row, sequence in enumerate(sequences):
        ids = list(sequence.stop_ids)[:MAX_STOP_IDS]
        stops[row, : len(ids)] = ids
    sampling = sampling_arrays([s.sampling for s in sequences], [s.seed for s in sequences], size)
    return stops, sampling.plain if plainly else sampling


def span_of(chunk: Chunk, adapter_pages: AdapterPages) -> Span:
    """Return a chunk's tokens, with the rows of its sequence's mask."""
    sequence = chunk.sequence
    return Span(
        tokens=np.asarray(sequence.tokens[chunk.start : chunk.end], np.int32),
        start=chunk.start,
        edit_mask=sequence.mask[chunk.start : chunk.end],
        kv_pages=sequence.pages,
        adapter_pages=adapter_pages,
    )


def draw_plainly(sequences: Many[Sequence]) -> bool:
    """Whether nothing but a temperature and a seed is asked for."""
    return all(is_plain(sequence.sampling) and not sequence.logprobs for sequence in sequences)


def picked(step: Step) -> tuple[list[Sequence], list[int], list[bool]]:
    """Return who draws in a prefill step, from which row of its logits, and that all of them begin."""
    rows = rows_of([chunk.at for chunk in step.chunks], [chunk.end - chunk.start for chunk in step.chunks])
    row_of = {chunk.sequence: row for row, chunk in zip(rows, step.chunks, strict=True) if chunk.samples}
    row_of |= {fork.sequence: row_of[fork.leader] for fork in step.forks}
    sequences = [sequence for sequence in step.sampled if sequence in row_of]
    return sequences, [row_of[sequence] for sequence in sequences], [True] * len(sequences)


def _runs(sequence: Sequence) -> bool:
    return sequence.status is not Status.FINISHED and sequence.slot >= 0
