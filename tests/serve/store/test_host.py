"""The adapter store against a simple account of what it must hold: names, leases, budgets, files."""

import collections
import random
from typing import Any

import pytest
from fake_store import FakeFiles, Later, Now, registered

from preft_jax.errors import AdapterError
from serve.store.host import AdapterStore
from serve.store.names import Registered, Registry

pytestmark = pytest.mark.host


def make(host_bytes=100, registry=None, keeps=True):
    files, later = FakeFiles(keeps), Later()
    store = AdapterStore(files, registry or Registry(), host_bytes=host_bytes, loaders=later, deleter=Now())
    return store, files, later


def fill(store, files, later, count=10, size=10):
    """Register as many as fill host memory, and one request's worth of each."""
    return [registered(store, files, f"a{i}", size) for i in range(count)]


def test_a_registered_adapter_is_in_host_memory_while_there_is_room():
    store, files, _later = make()
    lease = store.lease(registered(store, files, "a"))
    assert lease.known is not None
    assert files.loads == 0
    assert store.tiers()["hits"] == 1


def test_requests_for_one_adapter_load_it_once():
    store, files, later = make()
    fill(store, files, later)
    cold = registered(store, files, "cold")
    leases = [store.lease(cold) for _ in range(5)]
    assert [lease.known for lease in leases] == [None] * 5
    assert len(later.waiting) == 1
    later.run()
    assert files.loads == 1
    assert {lease for lease, error in store.poll() if error is None} == set(leases)
    assert all(lease.known is leases[0].known for lease in leases)
    assert store.poll() == []


def test_a_load_waits_for_room_and_others_are_served_meanwhile():
    store, files, later = make()
    held = [store.lease(one) for one in fill(store, files, later)]
    cold = registered(store, files, "cold")
    waits = store.lease(cold)
    assert later.waiting == []
    store.release(held[3])
    assert len(later.waiting) == 1
    later.run()
    assert [lease for lease, _ in store.poll()] == [waits]
    assert store.tiers()["host_bytes"] == 100
    assert all(lease.known is not None for lease in held[4:])


def test_what_was_used_longest_ago_is_evicted():
    store, files, later = make()
    adapters = fill(store, files, later)
    for one in adapters[1:]:
        store.release(store.lease(one))
    store.lease(registered(store, files, "cold"))
    later.run()
    assert store.lease(adapters[1]).known is not None
    assert store.lease(adapters[0]).known is None


def test_a_failed_load_is_told_and_may_be_tried_again():
    store, files, later = make()
    fill(store, files, later)
    cold = registered(store, files, "cold")
    files.broken.add("/cold")
    lease = store.lease(cold)
    later.run()
    assert store.poll() == [(lease, "OSError: /cold is gone")]
    store.release(lease)
    files.broken.clear()
    again = store.lease(cold)
    later.run()
    assert store.poll() == [(again, None)]
    assert again.known is not None


def test_a_pinned_adapter_whose_load_failed_is_pinned_once_it_can_be_loaded():
    store, files, later = make()
    fill(store, files, later)
    pinned = registered(store, files, "cold", pinned=True)
    files.broken.add("/cold")
    later.run()
    files.broken.clear()
    lease = store.lease(pinned)
    later.run()
    assert store.poll() == [(lease, None)]
    store.release(lease)
    for i in range(10):
        other = store.lease(store.get(f"a{i}"))
        while later.waiting:
            later.run()
        assert other.known is not None
        store.release(other)
    assert store.lease(pinned).known is not None, "others did not take its room"


def test_a_lease_given_back_is_not_told_of():
    store, files, later = make()
    fill(store, files, later)
    lease = store.lease(registered(store, files, "cold"))
    later.run()
    store.release(lease)
    assert store.poll() == []


def test_a_replaced_adapter_keeps_serving_those_that_asked_for_it():
    store, files, later = make()
    fill(store, files, later)
    old = registered(store, files, "a", digest="old")
    lease = store.lease(old)
    new = registered(store, files, "a", digest="new", replace=True)
    later.run()
    assert (lease.digest, store.get("a"), new.digest) == ("old", new, "new")
    assert lease.known is not None
    assert bytes(lease.known.slabs["q"][0]).startswith(b"old")
    assert "old" in files.kept
    store.release(lease)
    assert "old" not in files.kept
    assert "new" in files.kept


def test_a_bad_replacement_changes_nothing():
    store, files, _later = make()
    old = registered(store, files, "a")
    files.broken.add("/a")
    with pytest.raises(AdapterError, match="cannot be read"):
        store.register("a", "/a", replace=True)
    assert store.get("a") == old
    assert store.lease(old).known is not None


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 257, 3, None])
def test_strange_names_are_refused(name):
    store, files, _ = make()
    files.disk["/a"] = ("digest", 10)
    with pytest.raises(AdapterError, match="is not allowed"):
        store.register(name, "/a")


def test_a_taken_name_is_refused():
    store, files, _ = make()
    registered(store, files, "a")
    with pytest.raises(AdapterError, match="the name 'a' is taken"):
        registered(store, files, "a")


def test_names_that_are_not_registered_are_refused():
    store, _, _ = make()
    with pytest.raises(AdapterError, match="no adapter is registered as 'a'"):
        store.unregister("a")


def test_pinned_adapters_stay_and_take_at_most_half():
    store, files, later = make()
    pinned = [registered(store, files, f"p{i}", pinned=True) for i in range(5)]
    with pytest.raises(AdapterError, match="pinned adapters would take 60 bytes"):
        registered(store, files, "p9", pinned=True)
    for i in range(12):
        lease = store.lease(registered(store, files, f"a{i}"))
        while later.waiting:
            later.run()
        store.release(lease)
    assert all(store.lease(one).known is not None for one in pinned)
    registered(store, files, "p0", pinned=False, replace=True)
    registered(store, files, "p5", pinned=True)


def test_an_adapter_larger_than_half_of_host_memory_is_refused():
    store, files, _ = make()
    with pytest.raises(AdapterError, match="takes 51 bytes"):
        registered(store, files, "large", 51)
    assert store.get("large") is None
    assert files.kept == {}


def test_an_adapter_that_the_engine_can_never_serve_is_refused():
    store, files, _ = make()

    def check(config):
        raise AdapterError("too wide")

    store.check = check
    with pytest.raises(AdapterError, match="too wide"):
        registered(store, files, "a")


def test_after_a_restart_names_and_pins_are_there_and_other_files_are_not_needed(tmp_path):
    path = tmp_path / "adapters.sqlite"
    store, files, later = make(registry=Registry(path))
    registered(store, files, "a", owner="ann")
    registered(store, files, "b", pinned=True)
    files.disk.clear()
    later = Later()
    again = AdapterStore(files, Registry(path), host_bytes=100, loaders=later)
    assert again.list() == store.list()
    assert len(later.waiting) == 1
    later.run()
    assert again.lease(again.list()[1]).known is not None


def touch(store, later, adapters):
    """Let requests use adapters, one after the other."""
    for one in adapters:
        lease = store.lease(one)
        while later.waiting:
            later.run()
        assert lease.known is not None
        store.release(lease)


def test_a_published_adapter_is_in_host_memory_and_needs_no_file():
    store, files, later = make()
    others = fill(store, files, later)
    new = store.publish("new", ("new-", 10), owner="ann")
    assert (new.path, new.digest, new.owner) == ("", "new-", "ann")
    assert store.get("new") == new
    lease = store.lease(new)
    assert bytes(lease.known.slabs["q"][0]).startswith(b"new-")
    assert (files.loads, store.tiers()["evictions"], store.tiers()["host_bytes"]) == (0, 1, 100)
    store.release(lease)
    touch(store, later, others)
    lease = store.lease(new)
    assert lease.known is None, "it was evicted"
    later.run()
    assert bytes(lease.known.slabs["q"][0]).startswith(b"new-"), "it was kept"


@pytest.mark.parametrize("keeps", [True, False])
def test_requests_keep_what_a_name_stood_for_before_it_was_published_anew(keeps):
    store, _files, _later = make(keeps=keeps)
    lease = store.lease(store.publish("a", ("old-", 10)))
    store.publish("a", ("new-", 10))
    assert store.lease(store.get("a")).digest == "new-"
    assert bytes(lease.known.slabs["q"][0]).startswith(b"old-")
    store.release(lease)
    assert "old-" not in store._copies
    with pytest.raises(AdapterError, match="the name 'a' is taken"):
        store.publish("a", ("other-", 10), replace=False)
    with pytest.raises(AdapterError, match="the name '' is not allowed"):
        store.publish("", ("other-", 10))


def test_a_published_adapter_that_nothing_keeps_stays_in_host_memory_while_it_has_a_name():
    store, files, later = make(keeps=False)
    published = [store.publish(f"p{i}", (f"p{i}-", 10)) for i in range(5)]
    with pytest.raises(AdapterError, match=r"pinned adapters \(those published from memory .* would take 60 bytes"):
        store.publish("p5", ("p5-", 10))
    touch(store, later, [registered(store, files, f"a{i}") for i in range(12)])
    assert all(store.lease(one).known is not None for one in published)
    assert not any(one.pinned for one in store.list())
    registered(store, files, "p0", replace=True)
    store.unregister("p1")
    store.publish("p5", ("p5-", 20))


def test_an_adapter_that_must_stay_and_finds_no_room_is_refused():
    store, files, later = make(keeps=False)
    leases = [store.lease(one) for one in fill(store, files, later)]
    with pytest.raises(AdapterError, match="takes 10 bytes of host memory and must stay there"):
        store.publish("new", ("new-", 10))
    assert store.get("new") is None
    store.release(leases.pop())
    assert store.lease(store.publish("new", ("new-", 10))).known is not None


@pytest.mark.parametrize("fails", [False, True])
def test_requests_that_wait_for_a_load_are_served_by_what_is_published(fails):
    """Of the same content; however the load ends, nothing changes any more."""
    store, files, later = make(keeps=False)
    fill(store, files, later)
    cold = registered(store, files, "cold")
    lease = store.lease(cold)
    store.publish("same", ("cold-", 10))
    assert store.poll() == [(lease, None)]
    assert lease.known is not None
    files.broken |= {"/cold"} if fails else set()
    later.run()
    assert store.poll() == []
    assert lease.known is not None
    assert store.tiers()["host_bytes"] == 100


def test_a_published_adapter_that_the_engine_can_never_serve_is_refused():
    store, files, _ = make()

    def check(config):
        raise AdapterError("too wide")

    store.check = check
    with pytest.raises(AdapterError, match="too wide"):
        store.publish("a", ("a-", 10))
    assert (store.get("a"), files.kept) == (None, {})


OPERATIONS = 50_000


@pytest.mark.parametrize("keeps", [True, False])
def test_a_hundred_thousand_random_operations(keeps):
    """Nothing leaks, the budget is never exceeded, and a leased adapter is the one that was leased, to the end."""
    rng = random.Random(0)
    store, files, later = make(host_bytes=100, keeps=keeps)
    names: dict[str, Registered] = {}
    open_leases: dict[Any, Registered] = {}
    ended = collections.Counter()
    versions = 0
    for _ in range(OPERATIONS):
        name, what = f"n{rng.randrange(25)}", rng.random()
        if what < 0.12:
            versions += 1
            files.disk[f"/{name}"] = (f"{rng.choice([name, 'shared'])}-{versions % 3}", rng.choice([5, 10, 30, 60]))
            # One content has one size.
            digest, _ = files.disk[f"/{name}"]
            files.disk[f"/{name}"] = (digest, 5 + 9 * (sum(digest.encode()) % 7))
            in_memory = rng.random() < 0.3
            enter, content = (store.publish, files.disk[f"/{name}"]) if in_memory else (store.register, f"/{name}")
            try:
                names[name] = enter(
                    name,
                    content,
                    replace=rng.random() < 0.8,
                    pinned=rng.random() < 0.1,
                    owner=rng.choice([None, "x"]),
                )
            except AdapterError:
                ended["refused"] += 1
        elif what < 0.16 and names:
            gone = rng.choice(list(names))
            store.unregister(gone)
            del names[gone]
        elif what < 0.18 and names:
            some = rng.choice(list(names))
            try:
                names[some] = store.register(some, f"/{some}", replace=True, pinned=rng.random() < 0.5)
            except AdapterError:
                ended["unpinned"] += 1
        elif what < 0.5 and names:
            one = names[rng.choice(list(names))]
            if len(open_leases) < 40:
                try:
                    open_leases[store.lease(one)] = one
                except AdapterError:
                    ended["too large"] += 1
        elif what < 0.8 and open_leases:
            lease = rng.choice(list(open_leases))
            del open_leases[lease]
            store.release(lease)
        elif what < 0.95 and later.waiting:
            which = rng.randrange(len(later.waiting))
            broken = rng.random() < 0.3
            files.broken = {f"/n{i}" for i in range(25)} if broken else set()
            later.run(which)
            files.broken = set()
        else:
            for lease, error in store.poll():
                ended["failed" if error else "loaded"] += 1
                assert (lease.known is None) == (error is not None)
                if error:
                    del open_leases[lease]
                    store.release(lease)
        assert store._used <= store.host_bytes
        assert store._used == sum(copy.num_bytes for copy in store._copies.values() if copy.reserved)
        loading = [args[0].digest for _, args in later.waiting]
        assert len(loading) == len(set(loading))
        if rng.random() < 0.02:
            if keeps:
                assert {one.digest for one in names.values()} <= files.kept.keys()
            else:
                published = [store._copies[one.digest] for one in names.values() if not one.path]
                assert all(copy.known is not None and copy.leases for copy in published)
            for lease, one in open_leases.items():
                assert lease.digest == one.digest
                if lease.known is not None:
                    assert bytes(lease.known.slabs["q"][0]).startswith(one.digest.encode())
            assert sorted(names) == [one.name for one in store.list()]
    assert min(ended["loaded"], ended["failed"], ended["refused"]) > 100
    for lease in open_leases:
        store.release(lease)
    for name in list(names):
        store.unregister(name)
    while later.waiting:
        later.run()
    assert (store._used, store._copies, len(store._wanted), files.kept) == (0, {}, 0, {})
    assert store.tiers()["registered"] == store.tiers()["leased"] == 0
