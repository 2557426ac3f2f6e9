"""The scheduler in random runs, with one call under way at a time and with two."""

import dataclasses
import random

import pytest
from scheduler_world import World

from serve.scheduler import Decode, Prefill

BEHIND = (
    "steps_behind_prefill", "prefills_behind_decode", "further_steps", "cancelled_in_two_calls", "failed_in_two_calls"
)  # fmt: skip
"""What happens with two calls under way only."""


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
    cancelled_in_two_calls: int = 0
    failed_in_two_calls: int = 0

    def count(self, world, plan):
        """Count what a call that was just started is."""
        if isinstance(plan, Prefill):
            self.forked += len(world.calls[-1].drawn) - sum(chunk.last for chunk in plan.chunks)
        if len(world.calls) == 2:
            self.prefills_behind_decode += isinstance(plan, Prefill)
            self.steps_behind_prefill += isinstance(world.calls[0].plan, Prefill)
            self.further_steps += isinstance(plan, Decode) and plan.drawing is not None


def run_at_random(draw, total, two_calls):
    """Adds, calls, cancels and lost devices in random order, then whatever is left runs to its end."""
    world = World(
        num_pages=draw.choice((7, 10, 40)),
        room=draw.choice((1, 2, 4)),
        max_num_seqs=draw.choice((1, 3, 6)),
        chunk_tokens=draw.choice((3, 8, 32)),
        prefill_seqs=draw.choice((1, 3)),
        tile_entries=draw.choice((3, 5)),
        decode_steps=draw.choice((1, 4)),
        two_calls=two_calls,
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
            plan = world.ahead() if world.may_go_ahead and draw.random() < 0.7 else world.collect()
            if plan is not None:
                total.count(world, plan)
        elif action < 0.97:
            world.finish(draw.choice(world.live))
            total.cancelled += 1
            total.cancelled_in_two_calls += len(world.calls) == 2
        else:
            # One that is fetched fails, or one that is started.
            plans = [call.plan for call in world.calls][:1]
            total.failed_in_two_calls += len(world.calls) == 2
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


@pytest.mark.parametrize("two_calls", [False, True])
def test_random_runs_keep_every_page_and_end_every_sequence(two_calls, rng):
    draw, total = random.Random(int(rng.integers(2**31))), Sum()
    for _ in range(400):
        run_at_random(draw, total, two_calls)
    assert total.ended > 1000, total
    happened = dataclasses.asdict(total)
    behind = [happened.pop(name) for name in BEHIND]
    assert min(happened.values()) > 100, total
    assert min(behind) > 15 if two_calls else not any(behind), total
