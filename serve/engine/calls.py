"""Calls that the device works on: how a step becomes one, and what comes of it."""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any, NamedTuple

import jax

from preft_jax.adapters.allocator import AdapterPages
from preft_jax.device.packed import Packed, pack
from preft_jax.models.batch import round_up
from preft_jax.models.cache import pages_for
from preft_jax.sampling.rows import Drawn
from serve.engine.arrays import picked
from serve.engine.observer import Observer
from serve.engine.outputs import fetch
from serve.engine.plan import Import, Step
from serve.engine.residency import Residency
from serve.engine.runner import Runner
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Sequence
from serve.engine.staging import Staging


@dataclasses.dataclass(kw_only=True)
class Part:
    """What a call draws for some of its sequences: ``drawn`` has one entry for each repeat."""

    sequences: list[Sequence]
    drawn: list[Drawn]


@dataclasses.dataclass(kw_only=True)
class Call:
    """A call that the device is working on."""

    step: Step
    parts: list[Part]
    done: Any = None
    scores: Any = None
    prompt_kv: dict[Sequence, list[Any]] = dataclasses.field(default_factory=dict)
    started: float = 0.0

    def results(self) -> tuple[list[Drawn], Any, dict[Sequence, list[Any]]]:
        """Wait for it; return what each part drew, the scores of prompt tokens, and prompts' KV, on the host."""
        drawn = [fetch(part.drawn, part.sequences) for part in self.parts]
        if not drawn:
            jax.block_until_ready(self.done)
        scores = None if self.scores is None else jax.device_get(self.scores)
        return drawn, scores, {sequence: jax.device_get(parts) for sequence, parts in self.prompt_kv.items()}


class Prepared(NamedTuple):
    """A prefill call of which all is done but two things, in this order.

    ``begin_copies`` of later prompts' adapters, which raises ``WriteError`` if it cannot; ``start`` of the call.
    """

    step: Step
    begin_copies: Callable[[], None]
    start: Callable[[], Call]


def _nothing() -> None:
    pass


class Starter:
    """Starts calls."""

    def __init__(self, runner: Runner, scheduler: Scheduler, adapters: Residency, staging: Staging, observer: Observer):
        self._runner = runner
        self._arrays = runner.arrays
        self._scheduler = scheduler
        self._adapters = adapters
        self._staging = staging
        self._observer = observer

    def start(self, step: Step, *, copies: bool = True) -> Call:
        """Start a step.

        Args:
            step: what is to be done.
            copies: whether later prompts' adapters may be copied beside a decode call.

        Raises:
            WriteError: if its adapters cannot be brought to the device.
        """
        if step.chunks:
            prepared = self.prepare(step)
            prepared.begin_copies()
            return prepared.start()
        return self._decode(step, copies)

    def prepare(self, step: Step) -> Prepared:
        """Send the arguments of a prefill call to the device, and write its adapters.

        Raises:
            WriteError: as ``start``.
        """
        for new in step.imports:
            self._import(new)
        if step.rows:
            return self._prepare_mixed(step)
        scored = any(chunk.sequence.score for chunk in step.chunks)
        tokens = self._runner.config.prefill_tokens if scored else self._runner.prefill_size(step.num_tokens)
        # Ahead of all copies, which would hold them up.
        batch = self._arrays.packed(step.chunks, self._place, tokens)
        packed = self._runner.put(pack((batch, self._arrays.following(step.chunks)) if scored else batch))
        wanted = {chunk.sequence.adapter for chunk in step.chunks if chunk.sequence.adapter is not None}
        self._staging.bring(wanted)
        copies = self._staging.copies(self._scheduler.next_adapters(2)) or _nothing
        return Prepared(step, copies, functools.partial(self._prefill, step, tokens, packed, scored))

    def _prepare_mixed(self, step: Step) -> Prepared:
        """``prepare`` of a step with chunks and rows."""
        sequences, tile = [row.sequence for row in step.rows], self._runner.config.tile
        beside = round_up(len(sequences), tile)
        tokens = self._runner.mixed_size(step.num_tokens + beside)
        # Rows take the last tiles.
        size = self._runner.mixed_rows(tokens)
        first = size - beside
        batch = self._arrays.packed(step.chunks, self._place, tokens)
        packed = self._runner.put(pack((self._arrays.rows(sequences, size, first), batch)))
        self._staging.bring({c.sequence.adapter for c in step.chunks if c.sequence.adapter is not None})
        copies = self._staging.copies(self._scheduler.next_adapters(2)) or _nothing
        return Prepared(step, copies, functools.partial(self._mixed, step, first, tokens, packed))

    def _mixed(self, step: Step, first: int, tokens: int, packed: Packed) -> Call:
        self._write_prefixes(step)
        self._observer.calling("mixed", step.sequences)
        self._runner.mixed(tokens, packed)
        self._copy_forks(step)
        ends, index, fresh = picked(step)
        sequences, size = [row.sequence for row in step.rows] + ends, self._runner.mixed_rows(tokens)
        index = [*range(first, first + len(step.rows)), *(size + row for row in index)]
        fresh = [False] * len(step.rows) + fresh
        picks = self._arrays.picks(sequences, index, fresh, self._runner.draw_size(len(sequences)))
        part = Part(sequences=sequences, drawn=[self._draw(sequences, fresh, picks)])
        return Call(step=step, parts=[part])

    def _prefill(self, step: Step, tokens: int, packed: Packed, scored: bool) -> Call:
        scores = None
        self._write_prefixes(step)
        self._observer.calling("score" if scored else "prefill", step.sequences)
        if scored:
            done, scores = self._runner.score(packed)
        else:
            done = self._runner.prefill(tokens, packed)
        self._copy_forks(step)
        prompt_kv = self._take_prompts(step) if self._runner.config.role == "prefill" else {}
        sequences, index, fresh = picked(step)
        parts = []
        if sequences:
            size = self._runner.draw_size(len(sequences))
            picks = self._arrays.picks(sequences, index, fresh, size)
            parts.append(Part(sequences=sequences, drawn=[self._draw(sequences, fresh, picks)]))
        return Call(step=step, parts=parts, done=done, scores=scores, prompt_kv=prompt_kv)

    def _import(self, new: Import) -> None:
        sequence, size = new.sequence, self._runner.config.page_size or 1
        assert sequence.prompt_kv is not None
        pages = sequence.pages[new.start // size : pages_for(sequence.given, size)]
        self._observer.calling("put_pages", [sequence])
        self._runner.put_kv(pages, sequence.prompt_kv.kv[new.start :])

    def _take_prompts(self, step: Step) -> dict[Sequence, list[Any]]:
        """Read the KV of prompts that end with a step, before a later call may write to their pages."""
        taken = {}
        for sequence in [chunk.sequence for chunk in step.chunks if chunk.samples and chunk.sequence.index == 0]:
            self._observer.calling("take_pages", [sequence])
            taken[sequence] = self._runner.take_kv(sequence.pages)
        return taken

    def _write_prefixes(self, step: Step) -> None:
        begun = [chunk.sequence for chunk in step.chunks if chunk.prefix]
        if begun:
            self._observer.calling("write_prefix", begun)
            self._runner.write_prefixes(*self._arrays.prefixes(step.chunks, self._place))

    def _copy_forks(self, step: Step) -> None:
        copies = [fork.copy for fork in step.forks if fork.copy is not None]
        if copies:
            self._observer.calling("copy_pages", [fork.sequence for fork in step.forks])
            self._runner.copy_pages(copies)

    def _decode(self, step: Step, copies: bool) -> Call:
        sequences = [row.sequence for row in step.rows]
        adapted = [sequence for sequence in sequences if sequence.all_token]
        plain = [sequence for sequence in sequences if not sequence.all_token]
        if self._go_together(len(plain), len(adapted)):
            adapted, plain = sequences, []
        # A single step is soon over, and the next call's arguments wait for the copies: only for those it needs anyway.
        upcoming = self._scheduler.next_adapters(1 if step.repeats == 1 else 2)
        begin = (self._staging.copies(upcoming) if copies else None) or _nothing
        parts = []
        if plain:
            parts.append(self._part(plain, step.repeats, begin, adapted=False))
            begin = _nothing
        if adapted:
            parts.append(self._part(adapted, step.repeats, begin, adapted=True))
        return Call(step=step, parts=parts)

    def _part(self, sequences: list[Sequence], repeats: int, begin: Callable[[], None], *, adapted: bool) -> Part:
        """Decode sequences with one program; ``begin``: copies that run beside it."""
        runner, count = self._runner, len(sequences)
        name = runner.adapted_program(count) if adapted else runner.plain_program(count)
        rows_of_program = int(name.rpartition("-")[2])
        size, fresh = runner.draw_size(rows_of_program), [False] * count
        rows, picks = self._arrays.rows(sequences, size), self._arrays.picks(sequences, range(count), fresh, size)
        pages = self._arrays.row_pages(sequences, self._place, rows_of_program) if adapted else None
        # Here once for all repeats, and ahead of copies: these would hold them up, and the call would hold up copies.
        rows, picks, pages = runner.put((rows, picks, pages))
        begin()
        drawn = []
        for _ in range(repeats):
            self._observer.calling("decode_adapted" if adapted else "decode", sequences)
            runner.decode(name, rows, pages)
            drawn.append(self._draw(sequences, fresh, picks))
        return Part(sequences=sequences, drawn=drawn)

    def _draw(self, sequences: Many[Sequence], fresh: Many[bool], picks: Any) -> Drawn:
        self._observer.calling("draw", sequences)
        size = len(picks.index_B)
        _, sampling = self._arrays.constants(sequences, size)
        texts = self._arrays.texts(sequences, fresh, size)
        return self._runner.draw(picks, sampling, texts)

    def _place(self, sequence: Sequence) -> AdapterPages:
        return {} if sequence.adapter is None else self._adapters.place(sequence.adapter)

    def _go_together(self, plain: int, adapted: int) -> bool:
        """Whether all rows go to a program that knows adapters.

        That is if those without are too many for their own, or if one call is quicker than two, by the times measured
        at warm-up; without these, one call is taken.
        """
        runner = self._runner
        if plain > runner.row_counts[-1]:
            return True
        if not plain or not adapted:
            return False
        if not runner.step_seconds:
            return True
        together = runner.step_seconds[runner.adapted_program(plain + adapted)]
        apart = runner.step_seconds[runner.plain_program(plain)] + runner.step_seconds[runner.adapted_program(adapted)]
        return together < apart
