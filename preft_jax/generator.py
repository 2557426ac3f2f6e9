"""The static-batch generator: host loop, KV pages and adapter bank behind ``preft_jax.generate``.

A batch is prefilled in packed chunks, with every request's edits, then decoded together to its end. Prompt-only
adapters leave decoding to the plain base model; a batch that holds an all-token adapter is decoded by the program that
knows adapters.
"""

import dataclasses
import numbers
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from preft_jax.adapters.adapter import Adapter, check_fits
from preft_jax.adapters.bank import AdapterPages, BankAllocator, init_bank, write_adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.edit_mask import extend_edit_mask, make_edit_mask
from preft_jax.adapters.pages import PackedSite, adapter_page_counts, pack_adapter
from preft_jax.errors import AdapterError, ConfigError, RequestError
from preft_jax.loading import Model, serving_params
from preft_jax.models.batch import Span, bucket, max_entries, pack_prefill, pack_rows, plan_chunks
from preft_jax.models.cache import KVCache, init_cache, pages_for
from preft_jax.programs import DecodeState, programs
from preft_jax.sampling.arrays import sampling_arrays
from preft_jax.sampling.device import INVALID
from preft_jax.sampling.logits import History
from preft_jax.sampling.parameters import SamplingParams
from preft_jax.text.chat import EncodedPrompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes of a ``Generator``; all in tokens or counts.

    Attributes:
        max_num_seqs: requests decoded together.
        max_model_len: prompt plus generated tokens of one request.
        page_size: tokens of a KV page.
        prefill_tokens: tokens of one prefill call; longer prompts are cut.
        prefill_seqs: requests in one prefill call.
        tile: tokens that share one list of rank pages.
        decode_steps: decode steps of one call.
        bank_pages: rank pages for each layer and site, the null page included.
    """

    max_num_seqs: int = 16
    max_model_len: int = 512
    page_size: int = 16
    prefill_tokens: int = 512
    prefill_seqs: int = 8
    tile: int = 64
    decode_steps: int = 16
    bank_pages: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field.name} is {value!r}; it must be an integer of at least 1")
        if self.prefill_tokens % self.tile:
            raise ConfigError(f"prefill_tokens {self.prefill_tokens} is not a multiple of tile {self.tile}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One text to generate: encoded prompt, adapter or none, how to sample and how much."""

    prompt: EncodedPrompt
    adapter: Adapter | None = None
    sampling: SamplingParams = SamplingParams()
    seed: int = 0
    max_tokens: int = 64

    @property
    def draw_seed(self) -> int:
        """The seed of its draws: its sampling parameters', or its own where they have none."""
        return self.seed if self.sampling.seed is None else self.sampling.seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What was generated for one prompt.

    Attributes:
        text: decoded tokens, special tokens and the end token left out; empty without a tokenizer.
        token_ids: generated tokens, the end token included.
        logprobs: raw log-probability of each, temperature 1.
        sampling_logprobs: log-probability of each under the distribution that it was drawn from.
        finish_reason: ``"stop"`` (an end token), ``"length"``, or ``"error"``: the model's logits were not numbers (its
            weights or the adapter overflow); the other requests of the batch are not affected.
        token_times: clock reading when each token reached the host, in seconds.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    finish_reason: str
    token_times: list[float]


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A request while it runs."""

    request: Request
    edit_mask: np.ndarray
    kv_pages: list[int]
    adapter_pages: AdapterPages
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    sampling_logprobs: list[float] = dataclasses.field(default_factory=list)
    token_times: list[float] = dataclasses.field(default_factory=list)
    failed: bool = False

    @property
    def tokens(self) -> list[int]:
        """Prompt and generated tokens."""
        return [*self.request.prompt.token_ids, *self.token_ids]

    def span(self, start: int, end: int) -> Span:
        """Return the span of tokens ``start`` to ``end``, their edits decided by the request's own mask."""
        request = self.request
        positions = "prompt" if request.adapter is None else request.adapter.config.positions
        mask = extend_edit_mask(self.edit_mask, len(self.token_ids), positions)
        return Span(
            tokens=np.asarray(self.tokens[start:end], np.int32),
            start=start,
            edit_mask=mask[start:end],
            kv_pages=self.kv_pages,
            adapter_pages=self.adapter_pages,
        )


class HasConfig(Protocol):
    """What an edit mask needs to know of an adapter."""

    @property
    def config(self) -> AdapterConfig:
        """Its configuration."""
        ...


def prompt_edit_mask(prompt: EncodedPrompt, adapter: HasConfig | AdapterConfig | None) -> np.ndarray:
    """Return the edit mask of a prompt under an adapter or a config, bool ``[P, NUM_GROUPS]``.

    It is all false for the base model, ``None``.

    Raises:
        RequestError: if the adapter skips earlier answers and the chat template does not say where they are.
    """
    count = len(prompt.token_ids)
    if adapter is None:
        return np.zeros_like(make_edit_mask(count, "prompt"))
    config = adapter if isinstance(adapter, AdapterConfig) else adapter.config
    spans: tuple[tuple[int, int], ...] = ()
    if config.assistant_turns == "skip" and config.prefill_only:
        if prompt.unedited_spans is None:
            raise RequestError(
                "the adapter leaves earlier answers un-edited (assistant_turns 'skip'), but this chat template renders "
                "them differently in later turns, so their tokens cannot be told; use assistant_turns 'edit'"
            )
        spans = prompt.unedited_spans
    return make_edit_mask(count, config.positions, groups=config.groups, unedited_spans=spans)


def request_edit_mask(request: Request) -> np.ndarray:
    """Return ``prompt_edit_mask`` of a request."""
    return prompt_edit_mask(request.prompt, request.adapter)


class RunShape(NamedTuple):
    """Static sizes of a run's programs.

    Prefill has padded tokens, a bound on one request's tokens, and rank pages of a tile; decode has rows, and rank
    pages and end tokens of a row.
    """

    num_tokens: int
    max_query_len: int
    tile_entries: int = 1
    rows: int = 1
    row_entries: int = 1
    stop_ids: int = 4


class Generator:
    """Generates for lists of requests on one model.

    Owns the KV cache, the adapter bank and the loop between host and device.
    """

    def __init__(self, model: Model, limits: Limits = Limits(), *, clock: Callable[[], float] = time.perf_counter):
        if limits.max_model_len > model.config.max_position_embeddings:
            raise ConfigError(
                f"max_model_len {limits.max_model_len} is longer than the model's "
                f"{model.config.max_position_embeddings} positions"
            )
        self.model = model
        self.limits = limits
        self.params = serving_params(model, limits.max_num_seqs)
        self.programs = programs(model.config)
        self._clock = clock
        self._table_width = pages_for(limits.max_model_len, limits.page_size)
        self._dtype = self.params["embed"].dtype
        self.cache = self._new_cache()
        self._new_bank()

    def _new_bank(self) -> None:
        self.bank = init_bank(self.model.config, self.limits.bank_pages, self._dtype)
        self._allocator = BankAllocator(self.limits.bank_pages)
        self._resident: dict[str, AdapterPages] = {}

    def _new_cache(self) -> KVCache:
        limits = self.limits
        return init_cache(self.model.config, limits.max_num_seqs * self._table_width, limits.page_size, self._dtype)

    def check(self, request: Request) -> None:
        """Raise if a request cannot be served."""
        check_request(request)
        ids, vocab = request.prompt.token_ids, self.model.config.vocab_size
        if len(ids) + request.max_tokens > self.limits.max_model_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and max_tokens is {request.max_tokens}: together more than "
                f"max_model_len {self.limits.max_model_len}; shorten the prompt, or raise max_model_len"
            )
        if not 0 <= min(ids) <= max(ids) < vocab:
            raise RequestError(f"the prompt holds token ids outside 0 to {vocab - 1}, the model's vocabulary")
        if request.adapter is not None:
            check_base(request.adapter, self.model)
        request_edit_mask(request)

    def load_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Make adapters resident in the bank; those not named are evicted if room is needed.

        Raises:
            AdapterError: if they do not fit the bank together; it then holds what it held before.
        """
        wanted = {adapter.digest: adapter for adapter in adapters}
        self._check_room(adapters)
        packed = {
            digest: pack_adapter(adapter, self.model.config, self._dtype)
            for digest, adapter in wanted.items()
            if digest not in self._resident
        }
        for digest, edits in packed.items():
            self._make_room(edits, keep=wanted)
            where = self._allocator.allocate(edits)
            try:
                self.bank = write_adapter(self.bank, edits, where)
            except BaseException:
                # The donated bank may be gone: begin again with an empty one.
                self._new_bank()
                raise
            self._resident[digest] = where

    def _check_room(self, adapters: Sequence[Adapter]) -> None:
        need: dict[str, int] = {}
        distinct = {adapter.digest: adapter for adapter in adapters}
        for adapter in distinct.values():
            for site, count in adapter_page_counts(adapter.config, self.model.config).items():
                need[site] = need.get(site, 0) + count
        for site, count in need.items():
            if count > self.limits.bank_pages - 1:
                raise AdapterError(
                    f"{len(distinct)} adapters need {count} rank pages at {site!r}, the bank has "
                    f"{self.limits.bank_pages - 1}; give it more (bank_pages) or serve fewer adapters at once"
                )

    def _make_room(self, edits: dict[str, PackedSite], keep: dict[str, Adapter]) -> None:
        for victim in [digest for digest in self._resident if digest not in keep]:
            if all(self._allocator.free_pages(site) >= len(edit.groups) for site, edit in edits.items()):
                return
            self._allocator.release(self._resident.pop(victim))

    def run_shape(self, requests: Sequence[Request]) -> RunShape:
        """Return the smallest shape that serves every batch of these requests: each program is then compiled once."""
        limits, size = self.limits, self.limits.max_num_seqs
        tokens, query, tile_entries, row_entries = 1, 1, 1, 1
        for at in range(0, len(requests), size):
            batch = requests[at : at + size]
            lengths = [len(request.prompt.token_ids) for request in batch]
            counts = [
                max(adapter_page_counts(r.adapter.config, self.model.config).values(), default=0) if r.adapter else 0
                for r in batch
            ]
            for call in plan_chunks(lengths, budget=limits.prefill_tokens, max_requests=limits.prefill_seqs):
                sizes = [end - start for _, start, end in call]
                tokens, query = max(tokens, sum(sizes)), max(query, *sizes)
                tile_entries = max(tile_entries, max_entries(sizes, [counts[row] for row, _, _ in call], limits.tile))
            row_entries = max(row_entries, *counts)
        tokens = min(bucket(tokens, limits.tile), bucket(limits.prefill_tokens, limits.tile))
        return RunShape(
            num_tokens=tokens,
            max_query_len=min(bucket(query, limits.tile), tokens),
            tile_entries=bucket(tile_entries),
            rows=min(bucket(len(requests)), size),
            row_entries=bucket(row_entries),
            stop_ids=bucket(max((len(self._stop_ids(request)) for request in requests), default=0), 4),
        )

    def run(
        self, requests: Sequence[Request], *, shape: RunShape | None = None, base_only: bool = False
    ) -> Iterator[tuple[int, Completion]]:
        """Generate for every request, in static batches; yields ``(index, completion)`` as batches finish.

        Args:
            requests: all checked before any work starts.
            shape: of the compiled programs; by default the smallest that serves these requests.
            base_only: run the prefill program that knows no adapters; no request may name one.

        Raises:
            RequestError, AdapterError: naming what cannot be served; the generator stays usable.
        """
        for request in requests:
            self.check(request)
            if base_only and request.adapter is not None:
                raise RequestError("base_only was asked for, but a request names an adapter")
        size = self.limits.max_num_seqs
        for at in range(0, len(requests), size):
            self._check_room([r.adapter for r in requests[at : at + size] if r.adapter is not None])
        least = self.run_shape(requests)
        shape = shape or least
        for name, value, needed in zip(RunShape._fields, shape, least, strict=True):
            if value < needed:
                raise ConfigError(f"the run's shape has {name} {value}; these requests need {needed}")
        for at in range(0, len(requests), size):
            try:
                sequences = self._admit(requests[at : at + size])
                self._prefill(sequences, shape, base_only)
                self._decode(sequences, shape)
            except BaseException:
                # A failed device call may have consumed the donated cache.
                self.cache = self._new_cache()
                raise
            for row, sequence in enumerate(sequences):
                yield at + row, self._complete(sequence)

    def _admit(self, requests: Sequence[Request]) -> list[_Sequence]:
        self.load_adapters([r.adapter for r in requests if r.adapter is not None])
        width = self._table_width
        return [
            _Sequence(
                request=request,
                edit_mask=request_edit_mask(request),
                kv_pages=list(range(row * width, (row + 1) * width)),
                adapter_pages={} if request.adapter is None else self._resident[request.adapter.digest],
            )
            for row, request in enumerate(requests)
        ]

    def prefill_spans(
        self, spans: Sequence[Span], *, shape: RunShape | None = None, base_only: bool = False
    ) -> jax.Array:
        """Run one prefill call on spans of different requests; return float32 ``logits_BV`` of their last tokens."""
        limits = self.limits
        sizes = [len(span.tokens) for span in spans]
        if shape is None:
            tokens = bucket(sum(sizes), limits.tile)
            shape = RunShape(tokens, min(bucket(max(sizes), limits.tile), tokens))
        batch = pack_prefill(
            spans,
            num_tokens=shape.num_tokens,
            num_requests=limits.prefill_seqs,
            page_table_width=self._table_width,
            page_size=limits.page_size,
            tile=limits.tile,
            min_entries=shape.tile_entries,
        )
        bank = None if base_only else self.bank
        logits_BV, self.cache = self.programs.prefill(
            self.params, bank, self.cache, batch, max_query_len=shape.max_query_len
        )
        return logits_BV

    def _prefill(self, sequences: list[_Sequence], shape: RunShape, base_only: bool) -> None:
        """Prefill every sequence to its end, chunk by chunk, and draw its first token."""
        limits = self.limits
        lengths = [len(sequence.tokens) for sequence in sequences]
        for call in plan_chunks(lengths, budget=limits.prefill_tokens, max_requests=limits.prefill_seqs):
            spans = [sequences[row].span(start, end) for row, start, end in call]
            logits_BV = self.prefill_spans(spans, shape=shape, base_only=base_only)
            done = [(i, sequences[row]) for i, (row, _, end) in enumerate(call) if end == lengths[row]]
            if done:
                self._draw_first(logits_BV, done)

    def _draw_first(self, logits_BV: jax.Array, done: list[tuple[int, _Sequence]]) -> None:
        size = logits_BV.shape[0]
        params, seeds = [SamplingParams(temperature=0.0)] * size, [0] * size
        positions = np.zeros(size, np.int32)
        for row, sequence in done:
            params[row], seeds[row] = sequence.request.sampling, sequence.request.draw_seed
            positions[row] = len(sequence.tokens)
        by_row: list[_Sequence | None] = [None] * size
        for row, sequence in done:
            by_row[row] = sequence
        drawn = self.programs.sample(logits_BV, positions, sampling_arrays(params, seeds, size), self._history(by_row))
        drawn = jax.device_get(drawn)
        for row, sequence in done:
            self._append(sequence, *(array[row] for array in drawn), now=self._clock())

    def _history(self, rows: Sequence[_Sequence | None]) -> History:
        """Return the tokens of each row, for penalties; rows without any stay empty."""
        history = History(
            np.zeros((len(rows), self.limits.max_model_len), np.int32),
            np.zeros(len(rows), np.int32),
            np.zeros(len(rows), np.int32),
        )
        for row, sequence in enumerate(rows):
            if sequence is not None:
                tokens = sequence.tokens
                history.token_BS[row, : len(tokens)] = tokens
                history.prompt_len_B[row] = len(sequence.request.prompt.token_ids)
                history.length_B[row] = len(tokens)
        return history

    @staticmethod
    def _append(sequence: _Sequence, token: Any, logprob: Any, sampling_logprob: Any, *, now: float) -> None:
        if int(token) == INVALID:
            sequence.failed = True
            return
        sequence.token_ids.append(int(token))
        sequence.logprobs.append(float(logprob))
        sequence.sampling_logprobs.append(float(sampling_logprob))
        sequence.token_times.append(now)

    def _stop_ids(self, request: Request) -> tuple[int, ...]:
        eos = () if request.sampling.ignore_eos else self.model.config.eos_token_ids
        return (*eos, *request.sampling.stop_token_ids)

    def _finished(self, sequence: _Sequence) -> bool:
        request, ids = sequence.request, sequence.token_ids
        return sequence.failed or len(ids) >= request.max_tokens or ids[-1] in self._stop_ids(request)

    def _decode_state(self, sequences: list[_Sequence], shape: RunShape) -> DecodeState:
        size = shape.rows
        stops = [self._stop_ids(s.request) for s in sequences]
        state = DecodeState(
            np.zeros(size, np.int32),
            np.zeros(size, np.int32),
            np.zeros(size, np.int32),
            np.zeros((size, self._table_width), np.int32),
            np.full((size, shape.stop_ids), -1, np.int32),
        )
        for row, sequence in enumerate(sequences):
            state.token_B[row] = sequence.tokens[-1]
            state.position_B[row] = len(sequence.tokens) - 1
            left = sequence.request.max_tokens - len(sequence.token_ids)
            state.remaining_B[row] = 0 if self._finished(sequence) else left
            state.page_table_BP[row] = sequence.kv_pages
            state.stop_BE[row, : len(stops[row])] = stops[row]
        return jax.tree.map(jnp.asarray, state)

    def _decode(self, sequences: list[_Sequence], shape: RunShape) -> None:
        """Decode all rows to their end, a fixed number of steps a call."""
        state = self._decode_state(sequences, shape)
        size = shape.rows
        sampling = sampling_arrays(
            [s.request.sampling for s in sequences], [s.request.draw_seed for s in sequences], size
        )
        adapted = [s.adapter_pages if _all_token(s.request.adapter) else {} for s in sequences]
        pages = None
        if any(adapted):
            pages = pack_rows(adapted + [{}] * (size - len(adapted)), min_entries=shape.row_entries)
        steps = self.limits.decode_steps
        while not all(map(self._finished, sequences)):
            history = self._history([*sequences, *[None] * (size - len(sequences))])
            if pages is None:
                out = self.programs.decode(self.params, self.cache, state, sampling, history, num_steps=steps)
            else:
                out = self.programs.decode_adapted(
                    self.params, self.bank, pages, self.cache, state, sampling, history, num_steps=steps
                )
            self.cache, state, drawn = out
            drawn = jax.device_get(drawn)
            now = self._clock()
            for row, sequence in enumerate(sequences):
                for step in np.flatnonzero(drawn.token_NB[:, row] != -1):
                    self._append(sequence, *(array[step, row] for array in drawn[:3]), now=now)

    def _complete(self, sequence: _Sequence) -> Completion:
        stopped = not sequence.failed and sequence.token_ids[-1] in self._stop_ids(sequence.request)
        shown = sequence.token_ids[:-1] if stopped else sequence.token_ids
        tokenizer = self.model.tokenizer
        return Completion(
            text="" if tokenizer is None else tokenizer.decode(shown, skip_special_tokens=True),
            token_ids=sequence.token_ids,
            logprobs=sequence.logprobs,
            sampling_logprobs=sequence.sampling_logprobs,
            finish_reason="error" if sequence.failed else "stop" if stopped else "length",
            token_times=sequence.token_times,
        )


def _all_token(adapter: Adapter | None) -> bool:
    return adapter is not None and not adapter.config.prefill_only


def check_request(request: Request) -> None:
    """Raise ``RequestError`` if a request could not be served by any generator."""

    def check(name: str, value: Any, low: int, high: int) -> None:
        if not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
            raise RequestError(f"{name} is {value!r}; allowed: an integer from {low} to {high}")

    if not request.prompt.token_ids:
        raise RequestError("the prompt is empty; give at least one token")
    check("max_tokens", request.max_tokens, 1, 2**31 - 1)
    check("seed", request.seed, 0, 2**32 - 1)
    if request.adapter is not None and not isinstance(request.adapter, Adapter):
        raise RequestError(f"adapter is {request.adapter!r}; give an Adapter (load_adapter makes one), or None")
    if not isinstance(request.sampling, SamplingParams):
        raise RequestError(f"sampling is {request.sampling!r}; give SamplingParams(...)")


def check_base(adapter: Adapter, model: Model) -> None:
    """Raise ``AdapterError`` if an adapter was made for another base model or does not fit this one."""
    expected, given = model.digest, adapter.config.base_model_digest
    if expected is not None and given is not None and expected != given:
        raise AdapterError(
            f"the adapter was made for the base model {given[:12]}..., this one is {expected[:12]}...; "
            "load the right base model"
        )
    check_fits(adapter, model.config)
