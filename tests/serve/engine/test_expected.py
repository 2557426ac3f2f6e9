"""Prompts over one context that come at once: one computes it, and the others wait for its pages."""

import pytest
from scheduler_world import World, shape

from serve.engine.sequence import Status

pytestmark = pytest.mark.host

CONTEXT = list(range(8)) * 2
"""Four pages."""


def over_the_context(world, end, **fields):
    fields = {"adapter": "a", "edits_from": 16, "max_tokens": 1} | fields
    return world.add(tokens=[*CONTEXT, *end], **fields)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_context_that_comes_many_times_at_once_is_computed_once(ahead):
    world = World(goes_ahead=ahead, max_num_seqs=8)
    asks = [over_the_context(world, [i, i], adapter=("a", "b", None)[i % 3]) for i in range(7)]
    chunks = [chunk for step in world.run() for chunk in step.chunks]
    assert sum(chunk.end - chunk.start for chunk in chunks) == len(CONTEXT) + 2 * len(asks)
    assert world.scheduler.prefix_hit_tokens == 6 * len(CONTEXT)


def test_who_waits_for_a_context_holds_up_nobody_else():
    world = World()
    leader, follower = over_the_context(world, [1]), over_the_context(world, [2], adapter="b")
    other = world.add(9, max_tokens=1)
    assert shape(world.step())[1] == [(leader.order, 0, 12), (other.order, 0, 9)]
    assert shape(world.step())[1] == [(leader.order, 12, 17)]
    assert shape(world.step())[1] == [(follower.order, 16, 17)]


def test_a_short_part_in_common_is_not_waited_for():
    world = World()
    one, other = (world.add(tokens=[*CONTEXT[:4], *[i] * 6], max_tokens=1) for i in range(2))
    assert shape(world.step())[1] == [(one.order, 0, 10), (other.order, 0, 10)]


@pytest.mark.parametrize("way", ["finish", "fail"])
def test_who_waits_goes_on_alone_if_the_other_one_ends(way):
    world = World()
    leader, follower = over_the_context(world, [1]), over_the_context(world, [2], adapter="b")
    world.step()
    assert world.scheduler.expected.holds_up(follower)
    if way == "finish":
        world.finish(leader)
        assert shape(world.step())[1] == [(follower.order, 12, 17)]
    else:
        world.lose()
        assert shape(world.step())[1][0] == (leader.order, 0, 12)
    world.run()
    assert follower.status is Status.FINISHED


def test_prompts_whose_last_tokens_are_edited_share_with_any_adapter_and_none():
    world = World()
    over_the_context(world, [1, 2])
    world.run()
    for adapter in ("b", None, "a"):
        over_the_context(world, [3, 4], adapter=adapter)
        assert shape(world.step())[1][0][1:] == (16, 18)
    edited = over_the_context(world, [1, 2], edits_from=9)
    assert shape(world.step())[1] == [(edited.order, 8, 18)]
