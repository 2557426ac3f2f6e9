"""Plans a step while others are under way, so that the device never waits for the host. Plain Python, no JAX.

Nobody is preempted for such a step, and nothing in it depends on what the steps under way draw: a row's newest token
may be still on its way.
"""

import itertools

from serve.engine.plan import Step
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Sequence, Status


def ahead(scheduler: Scheduler, under_way: Step) -> Step | None:
    """Return a step to start behind the one under way; None: wait for it.

    After a prefill: one decode step for the running rows, if prompt tokens still wait. After a decode: prefill or, if
    no prompt waits, more steps of the same rows. A prompt whose adapter must be copied yet is left to the step after
    this one, beside which that is done, if rows or other prompts have something to do meanwhile.
    """
    if scheduler.mixes:
        return scheduler.plan_mixed(defers=True) or _unmixed(scheduler, under_way)
    if under_way.chunks:
        step = None
        if scheduler.prefilling or scheduler.may_admit():
            ends = {chunk.sequence for chunk in under_way.chunks if chunk.samples}
            ends |= {fork.sequence for fork in under_way.forks}
            step = scheduler.plan_rows([sequence for sequence in scheduler.running if sequence not in ends], 1)
    else:
        step = scheduler.plan_prefill(defers=True)
        if step is None:
            step = _meanwhile(scheduler, under_way) if scheduler.has_deferred else _further(scheduler, under_way)
    if step is not None:
        scheduler.take_turns(step)
    return step


def _unmixed(scheduler: Scheduler, under_way: Step) -> Step | None:
    """Return a step behind one under way where prompts and rows share steps, but no prompt finds room now.

    Sequences whose prompts end with the step under way take part.
    """
    going = [sequence for sequence in scheduler.running if sequence.undrawn > 0]
    if not going:
        return scheduler.plan_prefill()
    if under_way.kind == "decode" and 2 * len(going) < len(under_way.rows):
        return None
    return scheduler.plan_rows(going, scheduler.repeats_for(sequence.undrawn for sequence in going))


def full_prefill(scheduler: Scheduler) -> Step | None:
    """Return a prefill step to go behind prefill that is under way, and a decode step after it, if it is a full one.

    Nothing that is under way changes what would be in it: prompts that wait fill it, pages and adapters have room
    beside what is under way. A step that is not full is planned as late as possible, for prompts that may come.
    """
    step = scheduler.plan_prefill() if not scheduler.mixes and _is_filled(scheduler) else None
    if step is not None:
        scheduler.take_turns(step)
    return step


def _further(scheduler: Scheduler, under_way: Step) -> Step | None:
    """Return more steps of the same rows, if they are all that is to be done, and half of them go on at least.

    While somebody waits for room, all of them: one that ends makes room.
    """
    rows = [row.sequence for row in under_way.rows]
    alive = [sequence for sequence in rows if sequence.status is Status.RUNNING]
    if scheduler.prefilling or scheduler.may_admit() or len(alive) < len(scheduler.running):
        return None
    going = [sequence for sequence in alive if sequence.undrawn > 0]
    if not going or (len(going) < len(rows) if scheduler.num_waiting else 2 * len(going) < len(rows)):
        return None
    return scheduler.plan_rows(going, scheduler.repeats_for(sequence.undrawn for sequence in going))


def _meanwhile(scheduler: Scheduler, under_way: Step) -> Step | None:
    """Return one decode step, beside which adapters are copied, if half of the rows under way go on at least."""
    going = [sequence for sequence in scheduler.running if sequence.undrawn > 0]
    return None if 2 * len(going) < len(under_way.rows) else scheduler.plan_rows(going, 1)


def _is_filled(scheduler: Scheduler) -> bool:
    """Whether the prompts of the queue fill a prefill step, and there is room for all of them.

    Their adapters, which are needed next in any case, are given places in the bank on the way.
    """
    tokens, count = 0, 0
    new: list[Sequence] = []
    for sequence in itertools.chain(scheduler.prefilling, scheduler.waiting):
        if sequence.status is Status.WAITING and scheduler.expected.holds_up(sequence):
            continue
        tokens, count = tokens + scheduler.chunk_of(sequence), count + 1
        if sequence.status is Status.WAITING:
            new.append(sequence)
        if scheduler.fills(tokens, count):
            return scheduler.has_room_for(new)
    return False
