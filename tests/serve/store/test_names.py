"""The registry of names: what is read while the disk hangs, what is true after a write failed, whose a name is."""

import sqlite3
import threading

import pytest
from fake_store import CONFIG, FakeFiles, Later, Now, registered

from serve.server.failures import to_api_error
from serve.store.host import AdapterStore
from serve.store.names import Registered, Registry, RegistryError

pytestmark = pytest.mark.host


def named(name, digest="d", owner=None):
    return Registered(name=name, path=f"/{name}", digest=digest, config=CONFIG, num_bytes=10, owner=owner)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapters.sqlite"


@pytest.fixture
def store(path):
    files = FakeFiles()
    found = AdapterStore(files, Registry(path), host_bytes=1000, loaders=Later(), deleter=Now())
    for name in ("a", "b"):
        registered(found, files, name)
    files.disk["/c"] = ("c-", 10)
    yield found
    found.close()


class Hanging:
    """A disk on which writes of a registry wait, in a thread, until it is left."""

    def __init__(self, path, change):
        self._disk = sqlite3.connect(path, check_same_thread=False)
        self.thread = threading.Thread(target=change)

    def __enter__(self):
        self._disk.execute("BEGIN IMMEDIATE")
        self.thread.start()
        return self

    def __exit__(self, *_):
        self._disk.rollback()
        self._disk.close()
        self.thread.join()


CHANGES = {
    "register": lambda store: store.register("c", "/c"),
    "replace": lambda store: store.register("a", "/c", replace=True),
    "publish": lambda store: store.publish("p", ("p-", 10)),
    "unregister": lambda store: store.unregister("b"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_disk_that_hangs_stops_only_who_writes(store, path, change):
    with Hanging(path, lambda: CHANGES[change](store)) as disk:
        for _ in range(200):  # The writer gets as far as it can.
            adapter = store.get("a")
            assert [one.name for one in store.list()] == ["a", "b"]
            lease = store.lease(adapter)
            assert (lease.digest, lease.known is not None) == ("a-", True)
            store.poll()
            store.tiers()
            store.release(lease)
            disk.thread.join(0.001)
        assert disk.thread.is_alive()
    assert (store.get("a").digest, store.get("b") is None) == (
        "c-" if change == "replace" else "a-",
        change == "unregister",
    )
    assert len(Registry(path).list()) == len(store.list())


def spoil(path):
    """Let every write of a registry fail."""
    with sqlite3.connect(path) as disk:
        for when in ("INSERT", "DELETE"):
            disk.execute(
                f"CREATE TRIGGER no_{when} BEFORE {when} ON adapters BEGIN SELECT RAISE(ABORT, 'disk full'); END"
            )


@pytest.mark.parametrize(
    ("change", "said"),
    [("register", "it is not registered"), ("replace", "its name stands for what it did before"),
     ("publish", "it is not registered"), ("unregister", "it is still registered")],
)  # fmt: skip
def test_a_change_that_fails_says_what_is_true_and_it_is(store, path, change, said):
    spoil(path)
    before, tiers, kept = store.list(), store.tiers(), dict(store._files.kept)
    with pytest.raises(RegistryError, match=f"disk full; nothing was changed: {said}") as caught:
        CHANGES[change](store)
    answer = to_api_error(caught.value)
    assert (answer.status, answer.code) == (503, "not_stored")
    assert said in answer.message
    assert (store.list(), Registry(path).list()) == (before, before)
    assert (store.tiers(), store._files.kept) == (tiers, kept)
    assert store.lease(store.get("b")).known is not None


def test_an_adapter_published_without_a_place_to_keep_it_leaves_nothing_when_its_name_cannot_be_written(path):
    store = AdapterStore(FakeFiles(keeps=False), Registry(path), host_bytes=1000, loaders=Later(), deleter=Now())
    spoil(path)
    with pytest.raises(RegistryError):
        store.publish("p", ("p-", 10))
    assert (store.tiers()["host_bytes"], store.list()) == (0, [])
    store.close()


def test_a_name_keeps_its_owner_while_it_stands_for_nothing(path):
    registry = Registry(path)
    for name, owner in (("a", "ann"), ("b", "bob"), ("c", None), ("d", "dan")):
        registry.put(named(name, owner=owner))
    for name in "abc":
        registry.remove(name, keep_owner=True)
    registry.remove("d")
    for one in (registry, Registry(path)):
        assert [one.owner(name) for name in "abcd"] == ["ann", "bob", None, None]
    registry.put(named("a", owner="eve"))
    registry.put(named("b"))
    for one in (registry, Registry(path)):
        assert [one.owner(name) for name in "abcd"] == ["eve", None, None, None]
    registry.remove("a")
    assert registry.owner("a") is Registry(path).owner("a") is None
