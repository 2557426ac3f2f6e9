"""The scheduler in random runs, with one call under way at a time and with more."""

import dataclasses
import random

import pytest
from scheduler_world import World

from serve.engine.scheduler import Decode, Prefill

BEHIND = (
    "steps_behind_prefill", "prefills_behind_decode", "further_steps", "prefills_behind_both",
    "prefills_behind_prefill", "cancelled_beside", "failed_beside",
)  # fmt: skip
"""What happens with several calls under way only."""


@dataclasses.dataclass
class Sum:
    """What happened in all random runs."""

    ended: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    forked: int = 0
    resets: int = 0
    cancelled: int = 0
    steps_behind_prefill: int = 0
    prefills_behind_decode: int = 0
    further_steps: int = 0
    prefills_behind_both: int = 0
    prefills_behind_prefill: int = 0
    cancelled_beside: int = 0
    failed_beside: int = 0

    def count(self, world, plan):
        """Count what a call that was just started is."""
        if isinstance(plan, Prefill):
            self.forked += len(world.calls[-1].drawn) - sum(chunk.last for chunk in plan.chunks)
        if len(world.calls) == 2:
            first = world.calls[0].plan
            self.prefills_behind_decode += isinstance(plan, Prefill) and isinstance(first, Decode)
            self.prefills_behind_prefill += isinstance(plan, Prefill) and isinstance(first, Prefill)
            self.steps_behind_prefill += isinstance(plan, Decode) and isinstance(first, Prefill)
            self.further_steps += isinstance(plan, Decode) and plan.drawing is not None
        self.prefills_behind_both += len(world.calls) == 3


def run_at_random(draw, total, goes_ahead):
    """Adds, calls, cancels and lost devices in random order, then whatever is left runs to its end."""
    world = World(
        num_pages=draw.choice((7, 10, 40)),
        room=draw.choice((1, 2, 4)),
        max_num_seqs=draw.choice((1, 3, 6)),
        chunk_tokens=draw.choice((3, 8, 32)),
        prefill_seqs=draw.choice((1, 3)),
        tile_entries=draw.choice((3, 5)),
        decode_steps=draw.choice((1, 4)),
        prefill_sizes=draw.choice(((), (4, 16, 32))),
        goes_ahead=goes_ahead,
    )
    arriving = draw.choice((0.1, 0.3))
    for _ in range(draw.randint(30, 90)):
        action = draw.random()
        if action < arriving:
            world.add(
                draw.choice((1, 3, 4, 5, 8, 13)), adapter=draw.choice((None, "a", "b", "c", "everywhere")),
                max_tokens=draw.randint(1, 12), n=draw.choice((1, 1, 1, 3)), priority=draw.choice((0, 0, 1, -1)),
                seed=draw.randint(0, 3), score=draw.random() < 0.1, stop_ids=draw.choice(((), (), (3,), (5, 6))),
            )  # fmt: skip
        elif action < 0.9 or not world.live:
            if world.may_fill and draw.random() < 0.5:
                plan = world.fill()
            else:
                plan = world.ahead() if world.may_go_ahead and draw.random() < 0.7 else world.collect()
            if plan is not None:
                total.count(world, plan)
        elif action < 0.97:
            world.finish(draw.choice(world.live))
            total.cancelled += 1
            total.cancelled_beside += len(world.calls) > 1
        else:
            # One that is fetched fails, or one that is started.
            plans = [call.plan for call in world.calls][:1]
            total.failed_beside += len(world.calls) > 1
            if world.may_go_ahead and draw.random() < 0.5:
                plans.append(world.scheduler.ahead(plans[0]))
            world.fail([plan for plan in plans if plan is not None])
            total.resets += 1
        world.check()
    while world.calls:
        world.commit()
    world.run()
    total.ended += world.order
    total.preemptions += world.scheduler.preemptions
    total.prefix_hit_tokens += world.scheduler.prefix_hit_tokens


@pytest.mark.parametrize("goes_ahead", [False, True])
def test_random_runs_keep_every_page_and_end_every_sequence(goes_ahead, rng):
    draw, total = random.Random(int(rng.integers(2**31))), Sum()
    for _ in range(400):
        run_at_random(draw, total, goes_ahead)
    assert total.ended > 1000, total
    happened = dataclasses.asdict(total)
    behind = [happened.pop(name) for name in BEHIND]
    assert min(happened.values()) > 100, total
    assert min(behind) > 15 if goes_ahead else not any(behind), total
