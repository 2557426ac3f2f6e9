"""The device side of an engine: weights, KV cache, bank, slots and compiled programs; arrays in, arrays out.

Calls return at once with arrays that the device is still computing. Every program is compiled once, for one shape: all
of them by ``warm_up``, or each when it is first called.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from preft_jax.adapters.allocator import AdapterPages
from preft_jax.adapters.bank import Bank, bank_axes, init_bank
from preft_jax.config import ModelConfig
from preft_jax.device.memory import Budget, devices_of
from preft_jax.device.packed import Packed, pack
from preft_jax.device.programs import Programs
from preft_jax.errors import ConfigError
from preft_jax.loading import Model, serving_params
from preft_jax.models import fused
from preft_jax.models.batch import bucket, round_up
from preft_jax.models.cache import NO_SLOT, KVCache, cache_axes, init_cache, pages_for
from preft_jax.sampling.arrays import PlainSampling, SamplingArrays
from preft_jax.sampling.rows import Drawn
from preft_jax.shapes import KV_DTYPES, PREFIX, RANK_PAGE
from serve.engine import memory
from serve.engine import programs as device
from serve.engine.arrays import Arrays, constants_of
from serve.engine.config import EngineConfig
from serve.engine.kv_pages import KVPages, prefix_calls
from serve.engine.packing import READS_WEIGHTS, worth_filling
from serve.engine.rank_pages import RankPages
from serve.engine.residency import Load
from serve.engine.spread import WHOLE, Spread, bytes_of

_log = logging.getLogger("preft.engine")

COPIES = 8
"""KV pages that one call copies."""

WRITES = 8
"""Rank pages that one call writes to the bank at each site; 1 on a CPU, where nothing is won by more."""

_NO_PREFIX = np.zeros(1, np.int32), np.full((1, RANK_PAGE), NO_SLOT, np.int32)


class Runner:
    """Runs an engine's calls on the device."""

    def __init__(self, model: Model, config: EngineConfig):
        self.model = model
        self.config = config
        self.params = serving_params(model, config.max_num_seqs)
        self.dtype = self.params["embed"].dtype
        self.spread = Spread(model.placement, model.config)
        self.kv_dtype = jnp.dtype(KV_DTYPES[config.kv_dtype or self.dtype.name])
        self.bank_dtype = jnp.dtype(config.bank_dtype or self.dtype)
        self.adapter_dtype = jnp.dtype(KV_DTYPES[config.adapter_dtype or self.bank_dtype.name])
        self.stored_adapters = f"{self.adapter_dtype}, {self.bank_dtype}"
        if reason := fused.why_not(self.params):
            level = logging.WARNING if jax.default_backend() == "gpu" else logging.INFO
            _log.log(level, "layers run over plain operations, not over fused kernels: %s", reason)
        self.table_width = pages_for(config.max_model_len, config.page_size or 1)
        self._adapters = config.bank_pages > 1
        self._has_prefixes = self._adapters and PREFIX in config.bank_sites
        self._writes = 1 if jax.default_backend() == "cpu" else WRITES
        # Rank pages that may be copied ahead: those of a prefill call, fewer where memory is short.
        self.staged_pages = max(config.prefill_seqs * (config.tile_entries or 1), self._writes)
        self.rank_pages = RankPages(model.config, self.spread, config.bank_sites, self.adapter_dtype, self._writes)
        page_size = config.page_size or 1
        self.kv_pages = KVPages(model.config, self.spread, page_size, self.kv_dtype, config.role)
        self._new_bank = self._bank_maker()
        self.bank = self._new_bank()
        self._choose_programs()
        room = self._room()
        self.staged_pages, self._working_bytes = room.staged_pages, room.call_bytes + room.staged_bytes
        self.num_kv_pages = config.num_kv_pages or room.kv_pages
        self.cache = self._first_cache()
        self._new_drawing = self._drawing_maker()
        self._logits, self.slots, self.texts_SL = self._new_drawing()
        self.arrays = Arrays(config, self.table_width, self._prefill_rows, self.draws_plainly, self.put)
        self.step_seconds: dict[str, float] = {}
        self._no_texts = {rows: self.put(np.zeros((rows, config.max_model_len), np.int32)) for rows in self.draw_counts}
        self.programs = self._name_programs()

    def _choose_programs(self) -> None:
        """Choose the shapes of the programs that prefill, decode and draw."""
        config, gpu = self.config, jax.default_backend() == "gpu"
        # On a CPU a bank changes no sizes: engines with and without one share programs, which take long to compile.
        all_token = config.all_token and (self._adapters or not gpu)
        self.row_counts = sorted({max(bucket(config.max_num_seqs) // 4, 1), config.max_num_seqs})
        # A GPU's host waits wherever a program branches: a second program draws without branches.
        self.draws_plainly = gpu and not (all_token and config.scoring)
        few = gpu or all_token or config.scoring
        self.draw_counts = self.row_counts[-1:] if few else self.row_counts
        self.adapted_row_counts: list[int] = []
        if all_token and self._adapters:
            self.adapted_row_counts = self.row_counts[-1:] if config.scoring else self.row_counts
            if gpu and not config.scoring:
                # Adapters leave room for few rows: of more plain ones, the program with adapters takes all.
                self.row_counts = self.row_counts[:1]
                self.adapted_row_counts = sorted({max(bucket(config.max_num_seqs) // 2, 1), config.max_num_seqs})
        parts = (4, 1) if all_token or (config.scoring and gpu) else (8, 2, 1)
        self.mixed_counts: list[int] = []
        if config.mixed_tokens:
            parts = (2, 1)
            self.mixed_counts = [config.mixed_tokens * part // 4 for part in (1, 2, 3, 4)]
            self.row_counts = sorted({*self.row_counts, max(bucket(config.max_num_seqs) // 2, 1)})
        self.token_counts = sorted({round_up(config.prefill_tokens // part, config.tile) for part in parts})
        least = 0 if jax.default_backend() == "cpu" else READS_WEIGHTS
        self.filled_counts = worth_filling(self.token_counts, least)
        # A gap between two sequences takes a row of the batch.
        self._prefill_rows = config.prefill_seqs * (2 if self._adapters else 1)
        self._logit_rows = max(config.max_num_seqs, self._prefill_rows)
        if self.mixed_counts:
            self._logit_rows = self.mixed_rows(self.mixed_counts[-1]) + self._prefill_rows

    # Memory

    def _bank_maker(self) -> Callable[[], Bank | None]:
        config = self.config

        def make(model: ModelConfig) -> Bank:
            return init_bank(model, config.bank_pages, self.bank_dtype, config.bank_sites)

        return self.spread.make(make, bank_axes(config.bank_sites)) if self._adapters else lambda: None

    def _cache_maker(self) -> Callable[[], KVCache]:
        def make(model: ModelConfig) -> KVCache:
            return init_cache(model, self.num_kv_pages, self.config.page_size or 1, self.kv_dtype)

        return self.spread.make(make, cache_axes(self.model.config))

    def _drawing_maker(self) -> Callable[[], tuple[jax.Array, device.Slots, jax.Array]]:
        """Return what makes room for logits, the places of sequences that run, and room for their texts."""
        count = self.config.max_num_seqs

        def make(model: ModelConfig) -> tuple[jax.Array, device.Slots, jax.Array]:
            logits_RV = jnp.zeros((self._logit_rows, model.vocab_size), jnp.float32)
            return logits_RV, device.Slots.empty(count), jnp.zeros((count, self.config.max_model_len), jnp.int32)

        return self.spread.make(make)

    def put(self, tree: Any) -> Any:
        """Send arrays of the host to every device."""
        return self.spread.put(tree)

    def _room(self) -> memory.Room:
        """Share the device's memory out, and lease what the engine takes of it; on a CPU there is nothing to share."""
        jax.block_until_ready((self.params, self.bank))
        devices = devices_of(self.params)
        self.memory = Budget.of(devices, self.config.memory_utilization)
        if self.config.num_kv_pages or self.memory is None:
            return memory.Room(self.config.max_num_seqs * self.table_width, self.staged_pages)
        room = memory.share_out(
            self.model.config, self.config, self.memory.free, dtype=self.dtype, kv_dtype=self.kv_dtype,
            adapter_dtype=self.adapter_dtype, table_width=self.table_width, logit_rows=self._logit_rows,
            staged_pages=self.staged_pages if self._adapters else 0, writes=self._writes,
            num_devices=self.spread.num_devices,
        )  # fmt: skip
        self.memory.lease("calls", room.call_bytes)
        self.memory.lease("adapters on their way", room.staged_bytes)
        return room

    def _first_cache(self) -> KVCache:
        """Make the cache, with fewer pages if memory that is free lies in pieces too small for it."""
        while True:
            cache = room = None
            self._new_cache = self._cache_maker()
            try:
                cache, room = self._new_cache(), self._new_room()
                jax.block_until_ready((cache, room))
                if self.memory is not None:
                    size = bytes_of(cache)
                    self.memory.lease("KV cache", size if self._working_bytes else min(size, self.memory.free))
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

    def _new_room(self) -> jax.Array:
        return self.spread.make(lambda _: jnp.zeros(self._working_bytes, jnp.uint8))()

    def reset(self) -> None:
        """Make cache and bank anew: a call that failed may have consumed them. The old ones are let go first.

        Raises:
            ConfigError: if memory has no room for them any more, since others took it or it lies in pieces.
        """
        self.release()
        try:
            self.bank = self._new_bank()
            self.cache = self._new_cache()
            self._logits, self.slots, self.texts_SL = self._new_drawing()
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
        """Compile every program that is not compiled yet, use each, and time those that the engine chooses between.

        Without it, programs are compiled when they are first called.
        """
        if self.step_seconds:
            return
        if self.programs.missing:
            self.release()  # XLA tries matrix products out while it compiles, and needs memory for it.
            self.programs.compile_missing()
            self.reset()
        self._use_all()
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
        for count in self.row_counts if config.role != "prefill" else ():
            traces[f"decode-{count}"] = functools.partial(self._trace_decode, count)
        for count in self.adapted_row_counts:
            traces[f"decode-adapted-{count}"] = functools.partial(self._trace_decode_adapted, count)
        for tokens in self.mixed_counts:
            traces[f"mixed-{tokens}"] = functools.partial(self._trace_mixed, tokens)
        traces["copy-pages"] = self._trace_copy
        if self._has_prefixes:
            traces["write-prefix"] = self._trace_prefix
        for name in self.kv_pages.programs:
            traces[name] = functools.partial(self._trace_kv, name)
        for name in self.rank_pages.programs if self._adapters else ():
            traces[name] = functools.partial(self._trace_write, name)
        key = key or (self.model.config, config, self.model.placement, str(abstract))
        return Programs(traces, key=key, options=device.compiler_options())

    def _query_len(self, tokens: int) -> int:
        """Return the static bound on one sequence's tokens in a prefill call; a gap is a row of the batch, too."""
        return min(max(self.config.chunk_tokens or tokens, self.config.tile), tokens)

    def _trace_prefill(self, tokens: int) -> Any:
        function = functools.partial(device.prefill, self.spread.config, self._query_len(tokens))
        args = self.params, self.bank, self.cache, self._logits, self._no_chunks(tokens)
        return self.spread.trace(function, args, out=(self.cache, WHOLE, WHOLE), donate=(2, 3))

    def _trace_score(self) -> Any:
        tokens = self.config.prefill_tokens
        function = functools.partial(device.score, self.spread.config, self._query_len(tokens))
        args = self.params, self.bank, self.cache, self._logits, self._no_scores()
        return self.spread.trace(function, args, out=(self.cache, WHOLE, WHOLE, WHOLE), donate=(2, 3))

    def _trace_draw(self, size: int) -> Any:
        picks, (_, sampling) = self.arrays.picks([], [], [], size), constants_of([], size, plainly=False)
        args = self._logits, self.slots, self.texts_SL, picks, sampling, self._no_texts[size]
        return self.spread.trace(device.draw, args, out=WHOLE)

    def _trace_draw_plain(self, size: int) -> Any:
        picks, (_, sampling) = self.arrays.picks([], [], [], size), constants_of([], size, plainly=True)
        return self.spread.trace(device.draw_plain, (self._logits, self.slots, picks, sampling), out=WHOLE)

    def _trace_decode(self, count: int) -> Any:
        rows = self.arrays.rows([], self.draw_size(count))
        function = functools.partial(device.decode, self.spread.config, count)
        args = self.params, self.cache, self._logits, self.slots, rows
        return self.spread.trace(function, args, out=(self.cache, WHOLE), donate=(1, 2))

    def _trace_decode_adapted(self, count: int) -> Any:
        rows, pages = self.arrays.rows([], self.draw_size(count)), self.arrays.row_pages([], _nowhere, count)
        function = functools.partial(device.decode_adapted, self.spread.config, count)
        args = self.params, self.bank, pages, self.cache, self._logits, self.slots, rows
        return self.spread.trace(function, args, out=(self.cache, WHOLE), donate=(3, 4))

    def _trace_mixed(self, tokens: int) -> Any:
        count = self.mixed_rows(tokens)
        function = functools.partial(device.mixed, self.spread.config, count, self._query_len(tokens))
        args = self.params, self.bank, self.cache, self._logits, self.slots, self._no_rows(tokens)
        return self.spread.trace(function, args, out=(self.cache, WHOLE), donate=(2, 3))

    def _no_chunks(self, tokens: int) -> Packed:
        return pack(self.arrays.packed([], _nowhere, tokens))

    def _no_scores(self) -> Packed:
        tokens = self.config.prefill_tokens
        return pack((self.arrays.packed([], _nowhere, tokens), self.arrays.following([])))

    def _no_rows(self, tokens: int) -> Packed:
        return pack((self.arrays.rows([], self.mixed_rows(tokens)), self.arrays.packed([], _nowhere, tokens)))

    def _trace_copy(self) -> Any:
        none = np.zeros(COPIES, np.int32)
        return self.spread.trace(device.copy_pages, (self.cache, none, none), out=self.cache, donate=(0,))

    def _trace_prefix(self) -> Any:
        (nothing,) = prefix_calls(*_NO_PREFIX)
        function = functools.partial(device.write_prefix, self.spread.config, self.dtype)
        return self.spread.trace(function, (self.bank, self.cache, *nothing), out=self.cache, donate=(1,))

    def _trace_kv(self, name: str) -> Any:
        return self.kv_pages.trace(name, self.cache)

    def _trace_write(self, name: str) -> Any:
        assert self.bank is not None
        return self.rank_pages.trace(name, self.bank)

    def _use_all(self) -> None:
        """Call every program on nothing: on a GPU the first calls of one are slow (a second, for a large prefill)."""
        for _ in range(2):
            for tokens in self.token_counts:
                self.prefill(tokens, self.put(self._no_chunks(tokens)))
            if self.config.scoring:
                self.score(self.put(self._no_scores()))
            for tokens in self.mixed_counts:
                self.mixed(tokens, self.put(self._no_rows(tokens)))
            for size in self.draw_counts:
                picks = self.arrays.picks([], [], [], size)
                for plainly in {False, self.draws_plainly}:
                    self.draw(picks, self.put(constants_of([], size, plainly=plainly))[1])
            self.copy_pages([(0, self.num_kv_pages)])
            if self._has_prefixes:
                self.write_prefixes(*_NO_PREFIX)
            for name, size in self.kv_pages.programs.items():
                if name.startswith("take"):
                    self.take_kv([0] * size)
                else:
                    kv = np.zeros((size * (self.config.page_size or 1), *self.kv_pages.token_shape), self.kv_dtype)
                    self.put_kv([self.num_kv_pages] * size, kv)
            for name in self.rank_pages.programs if self._adapters else ():
                self.bank = self.programs[name](self.bank, *self.rank_pages.nothing(name))
        jax.block_until_ready((self.cache, self.bank, self.slots))

    def _time_decode(self) -> None:
        """Measure a step of each decode program, all rows busy, before any page holds anything."""
        measured = {}
        for name in [name for name in self.programs if name.startswith("decode")]:
            count = int(name.rpartition("-")[2])
            size, adapted = self.draw_size(count), name.startswith("decode-adapted")
            rows, picks = self.arrays.rows([], size), self.arrays.picks([], range(size), [], size)
            rows.slot_B[:count] = picks.slot[:count] = np.arange(count, dtype=np.int32)
            picks.position[:], picks.remaining[:] = 0, 2
            pages = self.arrays.row_pages([], _nowhere, count) if adapted else None
            _, sampling = self.arrays.constants([], size)
            times = []
            for _ in range(3):
                self.draw(picks, sampling)  # Now each row has a token to go on from.
                jax.block_until_ready(self.slots)
                start = time.perf_counter()
                self.decode(name, rows, pages)
                jax.device_get(self.draw(picks, sampling))
                times.append(time.perf_counter() - start)
            measured[name] = min(times)
        self.step_seconds = measured

    # Calls

    def prefill_size(self, num_tokens: int) -> int:
        """Return the tokens of the program that prefills so many."""
        return next(count for count in self.token_counts if count >= num_tokens)

    def prefill(self, tokens: int, batch: Packed) -> jax.Array:
        """Compute packed chunks; return something to wait for. The logits of each row's last token stay here.

        ``batch`` holds a ``PrefillBatch`` of so many ``tokens``.
        """
        self.cache, self._logits, done = self.programs[f"prefill-{tokens}"](
            self.params, self.bank, self.cache, self._logits, batch
        )
        return done

    def score(self, batch: Packed) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        """``prefill`` that also returns the log-probability of each token's successor, and the most likely ones.

        ``batch`` holds a ``PrefillBatch`` of ``prefill_tokens``, and each token's successor.
        """
        self.cache, self._logits, done, (logprob_T, tops) = self.programs["score"](
            self.params, self.bank, self.cache, self._logits, batch
        )
        return done, (logprob_T, *tops)

    def plain_program(self, count: int) -> str:
        """Return the name of the decode program that serves ``count`` sequences without adapters."""
        return f"decode-{next(rows for rows in self.row_counts if rows >= count)}"

    def adapted_program(self, count: int) -> str:
        """Return the name of the decode program that serves ``count`` sequences, some with all-token adapters."""
        return f"decode-adapted-{next(rows for rows in self.adapted_row_counts if rows >= count)}"

    def decode(self, name: str, rows: device.Rows, pages: Any = None) -> None:
        """Run one step of a decode program; the logits of its rows stay here.

        ``pages``: where rows' all-token adapters lie, for a program that knows adapters.
        """
        bank = () if pages is None else (self.bank, pages)
        self.cache, self._logits = self.programs[name](self.params, *bank, self.cache, self._logits, self.slots, rows)

    def mixed_size(self, num_tokens: int) -> int:
        """Return the tokens of the program that takes so many, rows counted."""
        return next(count for count in self.mixed_counts if count >= num_tokens)

    def mixed_rows(self, tokens: int) -> int:
        """Return how many of the last tokens of a mixed program may be rows."""
        return min(round_up(self.config.max_num_seqs, self.config.tile), tokens)

    def mixed(self, tokens: int, batch: Packed) -> None:
        """Run a decode step of rows and compute packed chunks; the logits of rows, then of chunks, stay here.

        ``batch`` holds ``Rows`` and a ``PrefillBatch`` of so many ``tokens``.
        """
        self.cache, self._logits = self.programs[f"mixed-{tokens}"](
            self.params, self.bank, self.cache, self._logits, self.slots, batch
        )

    def draw_size(self, count: int) -> int:
        """Return the rows of the program that draws for ``count`` sequences."""
        return next(size for size in self.draw_counts if size >= count)

    def draw(self, picks: device.Picks, sampling: PlainSampling | SamplingArrays, texts: Any = None) -> Drawn:
        """Draw from the logits that the last call left.

        ``sampling`` says which program draws. ``texts``: of rows that begin, if penalties need them.
        """
        size = len(picks.index_B)
        if isinstance(sampling, PlainSampling):
            self.slots, drawn = self.programs[f"draw-plain-{size}"](self._logits, self.slots, picks, sampling)
        else:
            texts = self._no_texts[size] if texts is None else texts
            args = self._logits, self.slots, self.texts_SL, picks, sampling, texts
            self.slots, self.texts_SL, drawn = self.programs[f"draw-{size}"](*args)
        return drawn

    def copy_pages(self, pairs: Many[tuple[int, int]]) -> None:
        """Copy KV pages, ``(from, to)`` each."""
        for at in range(0, len(pairs), COPIES):
            some = pairs[at : at + COPIES]
            source, target = np.zeros(COPIES, np.int32), np.full(COPIES, self.num_kv_pages, np.int32)
            source[: len(some)], target[: len(some)] = zip(*some, strict=True)
            self.cache = self.programs["copy-pages"](self.cache, source, target)

    def write_prefixes(self, page_E: np.ndarray, slot_EI: np.ndarray) -> None:
        """Write learned positions to the KV cache: those of rank pages, each to its slot; ``NO_SLOT`` for none."""
        for pages, slots in prefix_calls(page_E, slot_EI):
            self.cache = self.programs["write-prefix"](self.bank, self.cache, pages, slots)

    def take_kv(self, pages: Many[int]) -> list[jax.Array]:
        """Return the KV of pages, by token, in parts: ``[n, L, 2 * KV heads, head dim]`` each."""
        return [self.programs[name](self.cache, page_M) for name, page_M in self.kv_pages.takes(pages)]

    def put_kv(self, pages: Many[int], kv_TLJC: np.ndarray) -> None:
        """Write the KV of tokens, whole pages of them but for the last, to pages."""
        for name, kv, page_M in self.kv_pages.puts(pages, kv_TLJC):
            self.cache = self.programs[name](self.cache, kv, page_M)

    # Bank

    def copy_adapters(self, loads: Many[Load]) -> list[Load]:
        """Begin to copy adapters' rank pages to the device; returns the loads with the copies."""
        return self.rank_pages.copied(loads)

    def write_adapters(self, loads: Many[Load]) -> None:
        """Write the copied rank pages of adapters to the bank, ``writes`` of them in a call."""
        for name, slabs, page_SK in self.rank_pages.calls(loads):
            self.bank = self.programs[name](self.bank, slabs, page_SK)


def _nowhere(_: Any) -> AdapterPages:
    return {}
