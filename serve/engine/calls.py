"""Calls that the device works on: how a plan becomes one, and what comes of it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from preft_jax.sampling.rows import Drawn
from serve.engine.outputs import fetch
from serve.engine.residency import AdapterBank
from serve.engine.runner import After, Runner
from serve.engine.scheduler import Decode, Prefill, Scheduler
from serve.engine.sequence import Sequence, Status
from serve.engine.staging import Staging


@dataclasses.dataclass(kw_only=True)
class Part:
    """What a call draws for some of its sequences.

    Attributes:
        sequences: one for each row.
        drawn: one after the other along the axis of steps.
        after: where decoding left them.
        adapted: whether they were decoded with all-token adapters.
    """

    sequences: list[Sequence]
    drawn: list[Drawn]
    after: After | None = None
    adapted: bool = False


@dataclasses.dataclass(kw_only=True)
class Call:
    """A call that the device is working on."""

    plan: Prefill | Decode
    parts: list[Part]
    done: Any = None
    scores: Any = None
    started: float = 0.0

    def results(self) -> tuple[list[Drawn], Any]:
        """Wait for it; return what each part drew, and the scores of prompt tokens, on the host."""
        drawn = [fetch(part.drawn, part.sequences) for part in self.parts]
        if not drawn:
            jax.block_until_ready(self.done)
        return drawn, None if self.scores is None else jax.device_get(self.scores)


class Prepared(NamedTuple):
    """A prefill call of which all is done but two things, in this order.

    ``begin_copies`` of later prompts' adapters, which raises ``WriteError`` if it cannot; ``start`` of the call.
    """

    plan: Prefill
    begin_copies: Callable[[], None]
    start: Callable[[], Call]


def _nothing() -> None:
    pass


class Starter:
    """Starts calls."""

    def __init__(self, runner: Runner, scheduler: Scheduler, adapters: AdapterBank, staging: Staging):
        self._runner = runner
        self._scheduler = scheduler
        self._adapters = adapters
        self._staging = staging

    def start(self, plan: Prefill | Decode, before: Call | None, *, copies: bool = True) -> Call:
        """Start a plan.

        Args:
            plan: what is to be done.
            before: the call under way, which a decode plan with ``drawing`` goes on with.
            copies: whether later prompts' adapters may be copied beside a decode call.

        Raises:
            WriteError: if its adapters cannot be brought to the device.
        """
        if isinstance(plan, Prefill):
            prepared = self.prepare(plan)
            prepared.begin_copies()
            return prepared.start()
        if plan.drawing is not None and before is not None:
            return self._further(plan, before)
        return self._decode(plan, copies)

    def prepare(self, plan: Prefill) -> Prepared:
        """Send the arguments of a prefill call to the device, and write its adapters.

        Raises:
            WriteError: as ``start``.
        """
        places = [{} if s.adapter is None else self._adapters.place(s.adapter) for s in plan.sequences]
        scored = any(sequence.score for sequence in plan.sequences)
        tokens = self._runner.config.prefill_tokens if scored else plan.num_tokens
        # Ahead of all copies, which would hold them up.
        batch = self._runner.pack(plan.chunks, places, tokens)
        self._staging.bring({s.adapter for s in plan.sequences if s.adapter is not None})
        copies = self._staging.copies(self._scheduler.next_adapters(2)) or _nothing
        return Prepared(plan, copies, functools.partial(self._prefill, plan, batch, scored))

    def _prefill(self, plan: Prefill, batch: Any, scored: bool) -> Call:
        scores = None
        if scored:
            done, rows, scores = self._runner.score(plan.chunks, batch)
        else:
            done, rows = self._runner.prefill(plan.chunks, batch)
        drawing: list[tuple[int, Sequence]] = []
        for row, chunk in zip(rows, plan.chunks, strict=True):
            if chunk.last:
                forked = self._scheduler.fork(chunk.sequence)
                self._runner.copy_pages([pair for _, pair in forked if pair is not None])
                drawing += [(row, sequence) for sequence in (chunk.sequence, *(s for s, _ in forked))]
        sequences = [sequence for _, sequence in drawing]
        parts = []
        if sequences:
            drawn = self._runner.draw([row for row, _ in drawing], sequences)
            parts.append(Part(sequences=sequences, drawn=[drawn]))
        return Call(plan=plan, parts=parts, done=done, scores=scores)

    def _decode(self, plan: Decode, copies: bool) -> Call:
        adapted = [s for s in plan.sequences if s.all_token]
        plain = [s for s in plan.sequences if not s.all_token]
        if self._go_together(len(plain), len(adapted)):
            adapted, plain = plan.sequences, []
        # A single step is soon over, and the next call's arguments wait for the copies: only for those it needs anyway.
        upcoming = self._scheduler.next_adapters(1 if plan.steps == 1 else 2)
        begin = self._staging.copies(upcoming) if copies else None
        parts = []
        if plain:
            parts.append(self._part(plain, plan.steps, False, begin))
            begin = None
        if adapted:
            parts.append(self._part(adapted, plan.steps, True, begin))
        return Call(plan=plan, parts=parts)

    def _further(self, plan: Decode, before: Call) -> Call:
        parts = [self._part(p.sequences, plan.steps, p.adapted, None, p.after) for p in before.parts]
        return Call(plan=plan, parts=parts)

    def _part(
        self, sequences: list[Sequence], steps: int, adapted: bool, begin: Any, before: After | None = None
    ) -> Part:
        if adapted:
            places = [self._place(sequence) for sequence in sequences]
            drawn, after = self._runner.decode_adapted(sequences, places, steps, begin, before)
        else:
            drawn, after = self._runner.decode(sequences, steps, begin, before)
        return Part(sequences=sequences, drawn=drawn, after=after, adapted=adapted)

    def _place(self, sequence: Sequence) -> Any:
        held = sequence.all_token and sequence.adapter and sequence.status is Status.RUNNING
        return self._adapters.place(sequence.adapter) if held and sequence.adapter else {}

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
