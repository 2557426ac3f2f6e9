"""The device side of an engine: weights, KV cache, bank and compiled programs; plans in, drawn tokens out.

Calls return at once with arrays that the device is still computing. Every program is compiled once, for one shape: all
of them by ``warm_up``, or each when it is first called.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from preft_jax.adapters.bank import AdapterPages, Bank, init_bank
from preft_jax.device.programs import Programs
from preft_jax.errors import ConfigError
from preft_jax.loading import Model, serving_params
from preft_jax.models.batch import Span, bucket, pack_prefill, pack_rows, round_up, rows_of
from preft_jax.models.cache import KVCache, init_cache, pages_for
from preft_jax.sampling.arrays import sampling_arrays
from preft_jax.sampling.parameters import is_penalised, is_plain
from preft_jax.sampling.rows import Drawn
from preft_jax.shapes import LINEAR_SITES, RANK_PAGE
from serve.engine import memory
from serve.engine import programs as device
from serve.engine.config import EngineConfig
from serve.engine.packing import READS_WEIGHTS, worth_filling
from serve.engine.residency import Load
from serve.engine.scheduler import Chunk
from serve.engine.sequence import Sequence, Status
from serve.store.host_copy import ALL_LINEARS
from serve.store.slabs import slab_width

MAX_STOP_IDS = 16
"""End tokens of a sequence that the device knows; further ones are found by the host."""

COPIES = 8
"""KV pages that one call copies."""

WRITES = 8
"""Rank pages that one call writes to the bank at each site; 1 on a CPU, where nothing is won by more."""


Begin = Callable[[], None] | None
"""Begins copies to the device that are to run beside a call: it is called once the call's arguments are on their way,
which would wait for the copies otherwise, and before the call itself, for which the copies would wait."""


class After(NamedTuple):
    """Where a call left its rows, on the device: what a decode call of the same sequences goes on with.

    ``history_BS``: their texts, where they are drawn from with penalties (``device.draw``), else None.
    """

    rows: device.Rows
    history_BS: Any


class Decoded(NamedTuple):
    """What a decode call gives: what each step drew, and where it left its rows."""

    steps: list[Drawn]
    after: After


class _Write(NamedTuple):
    """A rank page of each site of an adapter, or of all linears, and where they go."""

    slabs: dict[str, Any]
    page: dict[str, int]


class Runner:
    """Runs an engine's calls on the device."""

    def __init__(self, model: Model, config: EngineConfig):
        self.model = model
        self.config = config
        self.params = serving_params(model, config.max_num_seqs)
        self.dtype = self.params["embed"].dtype
        self.table_width = pages_for(config.max_model_len, config.page_size or 1)
        self._adapters = config.bank_pages > 1
        self._writes = 1 if jax.default_backend() == "cpu" else WRITES
        # Rank pages that may be copied ahead: those of a prefill call, fewer where memory is short.
        self.staged_pages = max(config.prefill_seqs * (config.tile_entries or 1), self._writes)
        self.bank = self._new_bank()
        self._choose_programs()
        room = self._room()
        self.staged_pages, self._working_bytes = room.staged_pages, room.working_bytes
        self.num_kv_pages = config.num_kv_pages or room.kv_pages
        self.cache = self._first_cache()
        self._logits = self._new_logits()
        self.step_seconds: dict[str, float] = {}
        self._rows_cache: tuple[Any, Any] | None = None
        self._no_history = {rows: jnp.zeros((rows, config.max_model_len), jnp.int32) for rows in self.draw_counts}
        self._empty_slabs: dict[str, jax.Array] = {}
        self.programs = self._name_programs()

    def _choose_programs(self) -> None:
        """Choose the shapes of the programs: ten of them at most, whatever the engine is for."""
        config, gpu = self.config, jax.default_backend() == "gpu"
        all_token = config.all_token and self._adapters
        self.row_counts = sorted({max(bucket(config.max_num_seqs) // 4, 1), config.max_num_seqs})
        # A GPU's host waits wherever a program branches: a second program draws without branches.
        self.draws_plainly = gpu and not (all_token and config.scoring)
        few = gpu or all_token or config.scoring
        self.draw_counts = self.row_counts[-1:] if few else self.row_counts
        self.adapted_row_counts: list[int] = []
        if all_token:
            self.adapted_row_counts = self.row_counts[-1:] if config.scoring else self.row_counts
            if gpu and not config.scoring:
                # Adapters leave room for few rows: of more plain ones, the program with adapters takes all.
                self.row_counts = self.row_counts[:1]
                self.adapted_row_counts = sorted({max(bucket(config.max_num_seqs) // 2, 1), config.max_num_seqs})
        parts = (4, 1) if all_token or (config.scoring and gpu) else (8, 2, 1)
        self.token_counts = sorted({round_up(config.prefill_tokens // part, config.tile) for part in parts})
        least = 0 if jax.default_backend() == "cpu" else READS_WEIGHTS
        self.filled_counts = worth_filling(self.token_counts, least)
        # A gap between two sequences takes a row of the batch.
        self._prefill_rows = config.prefill_seqs * (2 if self._adapters else 1)
        self._logit_rows = max(config.max_num_seqs, self._prefill_rows)

    # Memory

    def _new_logits(self) -> jax.Array:
        return jnp.zeros((self._logit_rows, self.model.config.vocab_size), jnp.float32)

    def _new_bank(self) -> Bank | None:
        config = self.config
        return (
            init_bank(self.model.config, config.bank_pages, self.dtype, config.bank_sites) if self._adapters else None
        )

    def _new_cache(self) -> KVCache:
        return init_cache(self.model.config, self.num_kv_pages, self.config.page_size or 1, self.dtype)

    def _room(self) -> memory.Room:
        if self.config.num_kv_pages or memory.limit() is None:
            return memory.Room(self.config.max_num_seqs * self.table_width, self.staged_pages, 0)
        return memory.share_out(
            self.model.config, self.config, self.dtype, held=(self.params, self.bank), table_width=self.table_width,
            logit_rows=self._logit_rows, staged_pages=self.staged_pages if self._adapters else 0, writes=self._writes,
        )  # fmt: skip

    def _first_cache(self) -> KVCache:
        """Make the cache, with fewer pages if memory that is free lies in pieces too small for it."""
        while True:
            cache = room = None
            try:
                cache, room = self._new_cache(), jnp.zeros(self._working_bytes, jnp.uint8)
                jax.block_until_ready((cache, room))
                return cache
            except jax.errors.JaxRuntimeError as error:
                fewer = self.num_kv_pages * 31 // 32
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                if self.config.num_kv_pages or fewer < self.table_width:
                    raise ConfigError(
                        f"memory has no room for {self.num_kv_pages} KV pages beside the weights and "
                        f"{self.config.bank_pages} rank pages: lower num_kv_pages, bank_pages, bank_sites, "
                        "max_model_len, prefill_tokens or max_num_seqs"
                    ) from error
            self.num_kv_pages = fewer

    def reset(self) -> None:
        """Make cache and bank anew: a call that failed may have consumed them. The old ones are let go first.

        Raises:
            ConfigError: if memory has no room for them any more, since others took it or it lies in pieces.
        """
        self.release()
        try:
            self.bank = self._new_bank()
            self.cache = self._new_cache()
            self._logits = self._new_logits()
            jax.block_until_ready((self.bank, self.cache, self._logits))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ConfigError(
                f"the {self.num_kv_pages} KV pages that fitted at first have no room any more: lower "
                f"memory_utilization, which is {self.config.memory_utilization:g}, or num_kv_pages"
            ) from error

    def release(self) -> None:
        """Free what calls work on, until ``reset``: the cache, the bank and the logits."""
        for array in jax.tree.leaves((self.cache, self.bank, self._logits)):
            array.delete()

    # Programs

    def warm_up(self) -> None:
        """Compile every program that is not compiled yet, then time what the engine chooses by.

        Without it, programs are compiled when they are first called.
        """
        if self.step_seconds:
            return
        traced = self.programs.trace_missing()
        if traced:
            self.release()  # XLA tries matrix products out while it compiles, and needs memory for it.
            self.programs.compile(traced)
            self.reset()
        self._time_decode()

    def _name_programs(self, key: Any = None) -> Programs:
        """Return the programs by name, shared by ``key``: by default, all that their shapes depend on."""
        abstract = jax.tree.map(lambda x: (x.shape, x.dtype), (self.params, self.cache, self.bank))
        # What shapes do not depend on does not matter.
        config = dataclasses.replace(self.config, memory_utilization=1.0, decode_steps=1)
        traces: dict[str, Callable[[], Any]] = {}
        for tokens in self.token_counts:
            traces[f"prefill-{tokens}"] = functools.partial(self._trace_prefill, tokens)
        if config.scoring:
            traces["score"] = self._trace_score
        for size in self.draw_counts:
            traces[f"draw-{size}"] = functools.partial(self._trace_draw, size)
            if self.draws_plainly:
                traces[f"draw-plain-{size}"] = functools.partial(self._trace_draw_plain, size)
        for count in self.row_counts:
            traces[f"decode-{count}"] = functools.partial(self._trace_decode, count)
        for count in self.adapted_row_counts:
            traces[f"decode-adapted-{count}"] = functools.partial(self._trace_decode_adapted, count)
        traces["copy-pages"] = self._trace_copy
        if self._adapters:
            if ALL_LINEARS in self._slab_widths():
                traces["write-whole-pages"] = functools.partial(self._trace_write, True)
            traces["write-pages"] = functools.partial(self._trace_write, False)
        return Programs(
            traces, key=key or (self.model.config, config, str(abstract)), options=device.compiler_options()
        )

    def _query_len(self, tokens: int) -> int:
        """Return the static bound on one sequence's tokens in a prefill call; a gap is a row of the batch, too."""
        return min(max(self.config.chunk_tokens or tokens, self.config.tile), tokens)

    def _trace_prefill(self, tokens: int) -> Any:
        function = functools.partial(device.prefill, self.model.config, self._query_len(tokens))
        args = self.params, self.bank, self.cache, self._logits, self._pack([], tokens)
        return jax.jit(function, donate_argnums=(2, 3)).trace(*args)

    def _trace_score(self) -> Any:
        tokens = self.config.prefill_tokens
        function = functools.partial(device.score, self.model.config, self._query_len(tokens))
        args = self.params, self.bank, self.cache, self._logits, self._pack([], tokens), np.zeros(tokens, np.int32)
        return jax.jit(function, donate_argnums=(2, 3)).trace(*args)

    def _trace_draw(self, size: int) -> Any:
        rows, *args = self._row_args([], size)
        return jax.jit(device.draw).trace(
            self._logits, np.zeros(size, np.int32), rows, *args, self._no_history[size]
        )  # fmt: skip

    def _trace_draw_plain(self, size: int) -> Any:
        rows, *args = self._row_args([], size)
        return jax.jit(device.draw_plain).trace(self._logits, np.zeros(size, np.int32), rows, *args)

    def _trace_decode(self, count: int) -> Any:
        rows, plan, _ = self._row_args([], self._draw_size(count))
        function = functools.partial(device.decode, self.model.config, count)
        args = self.params, self.cache, self._logits, rows, plan
        return jax.jit(function, donate_argnums=(1, 2)).trace(*args)

    def _trace_decode_adapted(self, count: int) -> Any:
        rows, plan, _ = self._row_args([], self._draw_size(count))
        function = functools.partial(device.decode_adapted, self.model.config, count)
        args = self.params, self.bank, self._row_pages([], count), self.cache, self._logits, rows, plan
        return jax.jit(function, donate_argnums=(3, 4)).trace(*args)

    def _trace_copy(self) -> Any:
        none = np.zeros(COPIES, np.int32)
        return jax.jit(device.copy_pages, donate_argnums=0).trace(self.cache, none, none)

    def _trace_write(self, whole: bool) -> Any:
        slabs, page = self._no_writes()
        linears = slabs.pop(ALL_LINEARS, None)
        function, slabs = (device.write_whole_slabs, linears) if whole else (device.write_slabs, slabs)
        return jax.jit(function, donate_argnums=0).trace(self.bank, slabs, page)

    def _time_decode(self) -> None:
        """Measure a step of each decode program, all rows busy, before any page holds anything."""
        for name in [name for name in self.programs if name.startswith("decode")]:
            times = []
            for _ in range(3):
                start = time.perf_counter()
                jax.device_get(self._call_decode(name, [], [], 1, pretend=True).steps)
                times.append(time.perf_counter() - start)
            self.step_seconds[name] = min(times)

    # Prefill

    def pack(self, chunks: Many[Chunk], places: Many[AdapterPages], num_tokens: int) -> Any:
        """Return what ``prefill`` and ``score`` take, on its way to the device."""
        tokens = next(count for count in self.token_counts if count >= num_tokens)
        return jax.device_put(self._pack(self._spans(chunks, places), tokens, [chunk.at for chunk in chunks]))

    def prefill(self, chunks: Many[Chunk], batch: Any) -> tuple[jax.Array, list[int]]:
        """Compute chunks; return something to wait for, and the row of the logits of each chunk's last token."""
        tokens = len(batch.tokens_T)
        self.cache, self._logits, done = self.programs[f"prefill-{tokens}"](
            self.params, self.bank, self.cache, self._logits, batch
        )
        return done, rows_of([c.at for c in chunks], [c.end - c.start for c in chunks])

    def score(
        self, chunks: Many[Chunk], batch: Any
    ) -> tuple[jax.Array, list[int], tuple[jax.Array, jax.Array, jax.Array]]:
        """``prefill`` that also returns the log-probability of each token's successor, and the most likely ones.

        ``batch`` has room for ``prefill_tokens``.
        """
        next_T = np.zeros(self.config.prefill_tokens, np.int32)
        for chunk in chunks:
            following = chunk.sequence.tokens[chunk.start + 1 : chunk.end + 1]
            next_T[chunk.at : chunk.at + len(following)] = following
        self.cache, self._logits, done, (logprob_T, tops) = self.programs["score"](
            self.params, self.bank, self.cache, self._logits, batch, next_T
        )
        return done, rows_of([c.at for c in chunks], [c.end - c.start for c in chunks]), (logprob_T, *tops)

    def draw(self, rows: Many[int], sequences: Many[Sequence]) -> Drawn:
        """Draw the first token of each sequence from a row of the logits that prefill left."""
        size = self._draw_size(len(sequences))
        index = np.zeros(size, np.int32)
        index[: len(rows)] = rows
        args = self._row_args(sequences, size)
        return self._draw(index, *args, self._history(sequences, size))[0]

    def _draw(self, index: Any, rows: device.Rows, plan: Any, sampling: Any, history: Any) -> tuple[Drawn, After]:
        """Draw from the logits that the last call left; ``history`` None: plainly."""
        size = len(index)
        if history is None:
            after, drawn = self.programs[f"draw-plain-{size}"](self._logits, index, rows, plan, sampling)
        else:
            args = self._logits, index, rows, plan, sampling, history
            after, history, drawn = self.programs[f"draw-{size}"](*args)
        return drawn, After(after, history)

    def _draw_size(self, count: int) -> int:
        """Return the rows of the program that draws for ``count`` sequences."""
        return next(size for size in self.draw_counts if size >= count)

    def copy_pages(self, pairs: Many[tuple[int, int]]) -> None:
        """Copy KV pages, ``(from, to)`` each."""
        for at in range(0, len(pairs), COPIES):
            some = pairs[at : at + COPIES]
            source, target = np.zeros(COPIES, np.int32), np.full(COPIES, self.num_kv_pages, np.int32)
            source[: len(some)], target[: len(some)] = zip(*some, strict=True)
            self.cache = self.programs["copy-pages"](self.cache, source, target)

    def _spans(self, chunks: Many[Chunk], places: Many[AdapterPages]) -> list[Span]:
        return [
            Span(
                tokens=np.asarray(chunk.sequence.tokens[chunk.start : chunk.end], np.int32),
                start=chunk.start,
                edit_mask=chunk.sequence.mask[chunk.start : chunk.end],
                kv_pages=chunk.sequence.pages,
                adapter_pages=place,
            )
            for chunk, place in zip(chunks, places, strict=True)
        ]

    def _pack(self, spans: Many[Span], num_tokens: int, starts: Many[int] | None = None) -> Any:
        config = self.config
        return pack_prefill(
            spans,
            num_tokens=num_tokens,
            num_requests=self._prefill_rows,
            page_table_width=self.table_width,
            page_size=config.page_size or 1,
            tile=config.tile,
            min_entries=config.tile_entries or 1,
            sites=config.bank_sites,
            starts=starts,
        )

    # Decode

    def plain_program(self, count: int) -> str:
        """Return the name of the decode program that serves ``count`` sequences without adapters."""
        return f"decode-{next(rows for rows in self.row_counts if rows >= count)}"

    def adapted_program(self, count: int) -> str:
        """Return the name of the decode program that serves ``count`` sequences, some with all-token adapters."""
        return f"decode-adapted-{next(rows for rows in self.adapted_row_counts if rows >= count)}"

    def decode(self, sequences: Many[Sequence], steps: int, begin: Begin = None, after: After | None = None) -> Decoded:
        """Run decode steps of the plain base model.

        ``begin``: see ``Begin``. ``after``: where a call of the same sequences that may still run left their rows.
        """
        return self._call_decode(self.plain_program(len(sequences)), sequences, [], steps, begin, after)

    def decode_adapted(
        self,
        sequences: Many[Sequence],
        places: Many[AdapterPages],
        steps: int,
        begin: Begin = None,
        after: After | None = None,
    ) -> Decoded:
        """The same with the adapters at ``places``, an empty one being the base model."""
        return self._call_decode(self.adapted_program(len(sequences)), sequences, places, steps, begin, after)

    def _call_decode(
        self,
        name: str,
        sequences: Many[Sequence],
        places: Many[AdapterPages],
        steps: int,
        begin: Begin = None,
        after: After | None = None,
        *,
        pretend: bool = False,
    ) -> Decoded:
        count = int(name.rpartition("-")[2])
        size = self._draw_size(count)
        rows, plan, sampling = self._row_args(sequences, size)
        if pretend:
            rows = rows._replace(remaining_B=np.full(size, steps, np.int32))
            plan = plan._replace(alive_B=np.arange(size) < count)
        state = After(rows, self._history(sequences, size)) if after is None else after
        pages = self._row_pages(places, count) if name.startswith("decode-adapted") else None
        # Here once for all steps, and ahead of copies.
        index = np.arange(size, dtype=np.int32)
        state, plan, sampling, index, pages = jax.device_put((state, plan, sampling, index, pages))
        if begin is not None:
            begin()
        program, steps_drawn = self.programs[name], []
        for _ in range(steps):
            bank = () if pages is None else (self.bank, pages)
            self.cache, self._logits = program(self.params, *bank, self.cache, self._logits, state.rows, plan)
            drawn, state = self._draw(index, state.rows, plan, sampling, state.history_BS)
            steps_drawn.append(drawn)
        return Decoded(steps_drawn, state)

    def _row_pages(self, places: Many[AdapterPages], rows: int) -> dict[str, np.ndarray]:
        empty: list[AdapterPages] = [{}] * (rows - len(places))
        config = self.config
        return pack_rows([*places, *empty], min_entries=config.tile_entries or 1, sites=config.bank_sites)

    def _row_args(self, sequences: Many[Sequence], size: int) -> tuple[device.Rows, device.RowPlan, Any]:
        """Return what the host knows of rows, what it says of them, and their sampling parameters."""
        stops, sampling = self._row_constants(sequences, size)
        pages = np.zeros((size, self.table_width), np.int32)
        token, position, remaining, prompt_len = np.zeros((4, size), np.int32)
        alive = np.zeros(size, np.bool_)
        for row, sequence in enumerate(sequences):
            alive[row] = sequence.status is not Status.FINISHED
            pages[row, : len(sequence.pages)] = sequence.pages
            token[row], position[row] = sequence.tokens[-1], len(sequence.tokens) - 1
            remaining[row], prompt_len[row] = sequence.remaining, sequence.prompt_len
        want_tops = np.asarray(any(s.info.logprobs for s in sequences))
        plan = device.RowPlan(alive, pages, stops, prompt_len, want_tops)
        return device.Rows(token, position, remaining), plan, sampling

    def _row_constants(self, sequences: Many[Sequence], rows: int) -> tuple[Any, Any]:
        """Return stop ids and sampling parameters, kept on the device while the rows stay the same."""
        key = rows, tuple(map(id, sequences))
        if self._rows_cache is None or self._rows_cache[0] != key:
            stops = np.full((rows, MAX_STOP_IDS), -1, np.int32)
            for row, sequence in enumerate(sequences):
                ids = list(sequence.stop_ids)[:MAX_STOP_IDS]
                stops[row, : len(ids)] = ids
            params, seeds = [s.info.sampling for s in sequences], [s.info.seed for s in sequences]
            made = jax.device_put((stops, sampling_arrays(params, seeds, rows)))
            self._rows_cache = (key, (made, list(sequences)))
        return self._rows_cache[1][0]

    def _history(self, sequences: Many[Sequence], size: int) -> Any:
        """Return the sequences' tokens, which penalties need, empty ones if none has any; None: all draw plainly."""
        if self.draws_plainly and all(is_plain(s.info.sampling) and not s.info.logprobs for s in sequences):
            return None
        if not any(is_penalised(s.info.sampling) for s in sequences):
            return self._no_history[size]
        tokens = np.zeros((size, self.config.max_model_len), np.int32)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence.tokens)] = sequence.tokens
        return tokens

    # Bank

    def copy_adapters(self, loads: Many[Load]) -> list[Load]:
        """Begin to copy adapters' rank pages to the device; returns the loads with the copies."""
        on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="device")
        copied = jax.device_put([load.slabs for load in loads], on_device)
        return [load._replace(slabs=slabs) for load, slabs in zip(loads, copied, strict=True)]

    def write_adapters(self, loads: Many[Load]) -> None:
        """Write the copied rank pages of adapters to the bank, ``writes`` of them in a call."""
        whole: list[_Write] = []
        apart: list[_Write] = []
        for load in loads:
            for n in range(load.num_pages):
                slabs = {site: own[n] for site, own in load.slabs.items() if n < len(own)}
                page = {site: place.pages[n] for site, place in load.place.items() if n < len(place.pages)}
                (whole if ALL_LINEARS in slabs else apart).append(_Write(slabs, page))
        for name, writes in (("write-whole-pages", whole), ("write-pages", apart)):
            for at in range(0, len(writes), self._writes):
                slabs, page = self._no_writes()
                for n, write in enumerate(writes[at : at + self._writes]):
                    for site, slab in write.slabs.items():
                        slabs[site][n] = slab
                    for site, number in write.page.items():
                        page[site][n] = number
                linears = slabs.pop(ALL_LINEARS, None)
                self.bank = self.programs[name](self.bank, linears if name == "write-whole-pages" else slabs, page)

    def _no_writes(self) -> tuple[dict[str, list[Any]], dict[str, np.ndarray]]:
        """Return arguments of calls that write nothing but zeros to the null page."""
        if not self._empty_slabs:
            layers, widths = self.model.config.num_hidden_layers, self._slab_widths()
            self._empty_slabs = jax.device_put({s: np.zeros((layers, w), self.dtype) for s, w in widths.items()})
        nowhere = {site: np.zeros(self._writes, np.int32) for site in self.config.bank_sites}
        return {site: [slab] * self._writes for site, slab in self._empty_slabs.items()}, nowhere

    def _slab_widths(self) -> dict[str, int]:
        """Return the width of the slabs of each site, and of all linears if the bank holds them."""
        model = self.model.config
        widths = {s: slab_width(*model.site_shape(s), RANK_PAGE, self.dtype) for s in self.config.bank_sites}
        if set(LINEAR_SITES) <= set(widths):
            widths[ALL_LINEARS] = sum(widths[site] for site in LINEAR_SITES)
        return widths
