"""Whose turn it is: priority, owners in turn, age."""

import pytest

from serve.jobs import JobRecord, JobSpec
from train.service.turns import Turns

pytestmark = pytest.mark.host


def job(number, owner, priority=0):
    spec = JobSpec(training_file="file", training_path=None, priority=priority)
    return JobRecord(id=f"ftjob-{number:024d}", owner=owner, model="tiny", spec=spec, status="queued", created_at=0)


def order(waiting, held=1):
    """Return the owners and numbers of jobs in the order of their turns; ``held`` of them run at a time."""
    turns, waiting, running, found = Turns(), list(waiting), [], []
    while waiting:
        one = turns.choose(waiting, running[-held + 1 :] if held > 1 else [])
        turns.took(one)
        waiting.remove(one)
        running.append(one)
        found.append((one.owner, int(one.id[6:])))
    return found


def test_owners_take_turns_however_many_jobs_they_have():
    waiting = [*(job(n, "greedy") for n in range(5)), job(5, "ann"), job(6, "bob"), job(7, "ann")]
    assert order(waiting) == [
        ("greedy", 0), ("ann", 5), ("bob", 6), ("greedy", 1), ("ann", 7), ("greedy", 2), ("greedy", 3), ("greedy", 4),
    ]  # fmt: skip


def test_a_higher_priority_comes_first_and_an_owner_with_fewer_running_jobs():
    assert order([job(0, "ann"), job(1, "ann"), job(2, "ann", priority=1)]) == [("ann", 2), ("ann", 0), ("ann", 1)]
    turns = Turns()
    assert turns.choose([job(1, "ann"), job(2, "bob")], [job(0, "ann")]).owner == "bob"
    assert turns.choose([job(1, "ann", priority=1), job(2, "bob")], [job(0, "ann")]).owner == "ann"
    assert turns.choose([]) is None


def test_nobody_waits_for_more_turns_than_there_are_owners(rng):
    """At every turn of any arrivals: an owner's oldest job waits for one turn of each other owner at most."""
    turns, waiting, since = Turns(), [], {}
    for number in range(400):
        for _ in range(rng.integers(0, 3)):
            owner = str(rng.choice(["greedy"] * 8 + ["ann", "bob", "cem"]))
            waiting.append(job(len(since) + number * 10, owner))
            since.setdefault(owner, number)
        one = turns.choose(waiting)
        if one is None:
            continue
        turns.took(one)
        waiting.remove(one)
        assert number - since.pop(one.owner) <= 4
        if any(other.owner == one.owner for other in waiting):
            since[one.owner] = number
