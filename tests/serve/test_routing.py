"""Routers: what a key's replicas are, what load does to it, and what a change of the fleet moves."""

import collections

import pytest

from serve.routing import Affinity, RoundRobin

pytestmark = pytest.mark.host

FLEET = [f"replica-{i}" for i in range(8)]
KEYS = [f"adapter-{i}" for i in range(2000)]


def idle(fleet=FLEET):
    return dict.fromkeys(fleet, 0)


def test_turns_are_equal():
    policy = RoundRobin()
    assert collections.Counter(policy.choose("one", idle()) for _ in range(80)) == dict.fromkeys(FLEET, 10)


def test_a_key_stays_where_it_was_and_keys_are_spread():
    policy, other = Affinity(), Affinity()
    chosen = {key: policy.choose(key, idle()) for key in KEYS}
    assert chosen == {key: other.choose(key, dict(reversed(idle().items()))) for key in KEYS}
    counts = collections.Counter(chosen.values())
    assert len(counts) == len(FLEET)
    assert max(counts.values()) < 1.3 * len(KEYS) / len(FLEET)


def test_a_fleet_that_grows_moves_few_keys_and_only_to_the_new_one():
    policy = Affinity()
    before = {key: policy.choose(key, idle()) for key in KEYS}
    after = {key: policy.choose(key, idle([*FLEET, "new"])) for key in KEYS}
    moved = {key for key in KEYS if before[key] != after[key]}
    assert {after[key] for key in moved} == {"new"}
    assert len(moved) < 1.3 * len(KEYS) / (len(FLEET) + 1)


def test_a_busy_replica_is_left_for_the_keys_next_one():
    policy = Affinity(most=2, slack=1.25)
    first, second = policy.replicas("hot", idle())
    loads = {**idle(), first: 8}
    assert policy.choose("hot", {**idle(), first: 7}) == first
    assert policy.choose("hot", loads) == second


def test_one_hot_key_leaves_no_replica_idle():
    """All requests are of one adapter: its own replicas fill up to the bound, then the least busy one is next."""
    policy, loads = Affinity(most=2), idle()
    for _ in range(400):
        loads[policy.choose("hot", loads)] += 1
    assert max(loads.values()) <= 1.25 * 401 / len(FLEET) + 1
    assert min(loads.values()) > 0.7 * 400 / len(FLEET)


def test_a_request_without_a_key_goes_to_the_least_busy():
    loads = {**dict.fromkeys(FLEET, 3), "replica-5": 2}
    assert Affinity().choose(None, loads) == "replica-5"


@pytest.mark.parametrize("options", [{"most": 0}, {"slack": 1.0}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match="give at least 1, and more than 1"):
        Affinity(**options)
