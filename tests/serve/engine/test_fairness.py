"""Turns between tenants: in the queue alone, and in a scheduler with no device."""

import collections
import itertools
import random

import numpy as np
import pytest
from scheduler_world import World

from serve.engine.fairness import Waiting
from serve.engine.sequence import Sequence, Status

pytestmark = pytest.mark.host


ORDERS = itertools.count()


def waiting(*tenants, queue=None):
    """Return a queue, and a sequence of each tenant in the order of arrival."""
    queue = Waiting() if queue is None else queue
    mask = np.zeros((1, 1), bool)
    group = [
        Sequence(request_id=i, order=i, tenant=tenant, tokens=[1], prompt_len=1, mask=mask, max_tokens=1)
        for i, tenant in zip(ORDERS, tenants, strict=False)
    ]
    for sequence in group:
        queue.add(sequence)
    return queue, group


def served(queue, count=None):
    """Let the first in the queue in, one after the other; return their tenants."""
    found = []
    while len(queue) and len(found) != count:
        first = next(iter(queue))
        queue.remove(first)
        queue.serve(first)
        found.append(first.tenant)
    return "".join(found)


def test_tenants_take_turns_and_each_keeps_its_order():
    queue, group = waiting(*"aaaaaabbc")
    assert "".join(s.tenant for s in queue) == "abcabaaaa"
    assert [s.order for s in queue if s.tenant == "a"] == [s.order for s in group[:6]]
    assert len(queue) == len(group)
    assert served(queue) == "abcabaaaa"


def test_without_tenants_it_is_first_come_first_served():
    queue, group = waiting(*[None] * 6)
    assert list(queue) == group


def test_who_comes_later_has_the_next_turn_but_no_credit():
    queue, _ = waiting(*"a" * 20)
    assert served(queue, 9) == "a" * 9
    waiting(*"bbb", queue=queue)
    assert served(queue, 6) == "bababa"
    assert served(queue) == "a" * 8
    waiting(*"aabb", queue=queue)
    assert sorted(served(queue, 2)) == ["a", "b"], "an empty queue forgets"


def test_samples_that_fork_count_as_turns():
    queue, (first, *_) = waiting(*"aaab")
    queue.remove(first)
    for _ in range(3):
        queue.serve(first)
    assert served(queue) == "baa"


def test_priority_comes_before_turns():
    queue, group = waiting(*"aab")
    queue.remove(group[2])
    group[2].priority = 1
    queue.add(group[2])
    assert served(queue) == "aab"


def test_of_tenants_that_always_wait_none_is_served_twice_as_often():
    rng = random.Random(0)
    queue, counts = Waiting(), collections.Counter()
    for _ in range(300):
        waiting(*rng.choices("aaaaaaabbc", k=3), *"abc", queue=queue)
        for tenant in served(queue, 3):
            counts[tenant] += 1
    assert max(counts.values()) - min(counts.values()) <= 3
    assert len(queue._served) <= 3


def test_a_body_of_many_samples_leaves_the_next_free_place_to_others():
    """128 prompts of 128 samples each: another's prompt goes in as soon as one sample has ended."""
    world = World(max_num_seqs=4, num_pages=200)
    for _ in range(8):
        world.add(8, max_tokens=3, n=16, tenant="a")
    for _ in range(6):
        world.step()
    (other,) = [world.add(8, max_tokens=3, tenant="b")]
    ended = 0
    while other.status in (Status.NEW, Status.WAITING):
        before = sum(s.status is Status.FINISHED for s in world.live if s.tenant == "a")
        world.step()
        ended += sum(s.status is Status.FINISHED for s in world.live if s.tenant == "a") - before
        assert ended <= 8
    world.run()
    assert all(s.status is Status.FINISHED for s in world.live)


def test_samples_do_not_take_the_place_that_another_waits_for():
    world = World(max_num_seqs=4, num_pages=200, prefill_seqs=1)
    world.add(8, max_tokens=9, n=16, tenant="a")
    other = world.add(8, max_tokens=2, tenant="b")
    for _ in range(3):  # A prefill, a decode step, the other's prefill.
        world.step()
    assert other.status is not Status.WAITING
    assert not any(s.status is Status.FINISHED for s in world.live), "nobody had to end for it"
    world.run()


def test_who_holds_most_gives_its_room_up_first():
    world = World(max_num_seqs=4, num_pages=12)
    many = [world.add(12, max_tokens=16, tenant="a") for _ in range(3)]
    other = world.add(12, max_tokens=16, tenant="b")
    preempted = []
    while world.live:
        world.step()
        preempted += [s.tenant for s in (*many, other) if s.status is Status.WAITING and s.generated]
    assert preempted[0] == "a", "the newest is b's only one"
