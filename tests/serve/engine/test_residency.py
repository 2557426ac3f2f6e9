"""The entry of an adapter from its first claim until nothing is left of it. Real book, a store that is played."""

import dataclasses
import types

import pytest

from preft_jax.adapters.config import AdapterConfig
from preft_jax.errors import RequestError
from serve.engine.recovery import STRIKES
from serve.engine.residency import Residency
from serve.store.host_copy import Columns, Known
from serve.store.names import Registered

COPY = Known({"q": Columns((0,))}, {"q": ["a page"]})


def brought(digest):
    """Return an adapter that comes with its request."""
    return types.SimpleNamespace(digest=digest)


def named(digest):
    return Registered(
        name=digest, path="", digest=digest, config=AdapterConfig(rank=8), num_bytes=1, created=0.0
    )  # fmt: skip


@dataclasses.dataclass(eq=False)
class Lease:
    digest: str
    known: Known | None = None


class Store:
    """Leases that a test loads."""

    def __init__(self):
        self.leases, self.told = [], []

    def lease(self, adapter):
        self.leases.append(Lease(adapter.digest))
        return self.leases[-1]

    def release(self, lease):
        self.leases.remove(lease)

    def load(self, lease, error=None):
        lease.known = None if error else COPY
        self.told.append((lease, error))

    def poll(self):
        told, self.told = self.told, []
        return told


def make(pages=3, store=None):
    """Return a book and the digests of what it folded, one after the other."""
    folded = []

    def pack(adapter):
        folded.append(adapter.digest)
        return COPY

    return Residency(pages, pack, store=store), folded


def bring(book, digest):
    """Write an adapter to the bank, as staging does."""
    assert book.acquire(digest)
    (load,) = [entry.load for entry in book.unwritten if entry.digest == digest]
    book.copied([load])
    book.written([digest])


def test_an_adapter_is_folded_once_while_somebody_holds_it():
    book, folded = make()
    assert book.claim(1, brought("a"))
    assert book.claim(2, brought("a"))
    book.give_back(1, "a")
    assert book.knows("a")
    book.give_back(2, "a")
    assert not book.knows("a")
    assert book.claim(3, brought("a"))
    assert folded == ["a", "a"]
    book.keep(brought("b"))
    book.claim(4, brought("b"))
    book.give_back(4, "b")
    assert book.on_host == {"a", "b"}


def test_the_device_keeps_what_no_request_holds_until_its_room_is_needed():
    book, _ = make(pages=2)
    book.claim(1, brought("a"))
    bring(book, "a")
    book.release("a")
    book.give_back(1, "a")
    assert book.entry("a").copy is None
    book.claim(2, brought("a"))
    assert book.acquire("a")
    assert (book.loads, book.unwritten) == (1, [])
    book.claim(3, brought("b"))
    assert not book.acquire("b"), "a prompt needs the only page"
    book.release("a")
    book.give_back(2, "a")
    assert book.acquire("b")
    with pytest.raises(KeyError):
        book.entry("a")


def test_a_place_that_is_not_written_yet_keeps_the_hosts_copy_of_a_request_that_ended():
    book, _ = make()
    book.claim(1, brought("a"))
    assert book.acquire("a")
    book.release("a")
    book.give_back(1, "a")
    assert not book.knows("a")
    assert [entry.load.slabs for entry in book.unwritten] == [COPY.slabs]
    bring(book, "a")
    assert book.entry("a").copy is None


def test_a_named_adapter_comes_to_each_request_that_waits_for_it_and_leases_go_back():
    store = Store()
    book, folded = make(store=store)
    assert not book.claim(1, named("a"))
    assert not book.claim(2, named("a"))
    assert not book.claim(3, named("b"))
    assert not book.claim(4, named("b"))
    book.give_back(2, "a")
    one, other, given_up = store.leases
    store.load(one)
    store.load(other, "its file is gone")
    book.give_back(4, "b")
    store.load(given_up)
    assert list(book.poll()) == [(1, None), (3, "its file is gone")]
    assert (book.loading, book.on_host, folded) == (False, {"a"}, [])
    book.give_back(1, "a")
    book.give_back(3, "b")
    assert (store.leases, book.on_host) == ([], set())
    with pytest.raises(RequestError, match="this engine has no store"):
        make()[0].claim(1, named("a"))


def test_nothing_is_left_of_an_adapter_that_could_not_be_folded():
    def fails(adapter):
        raise ValueError("it is not finite")

    book = Residency(3, fails)
    with pytest.raises(ValueError, match="it is not finite"):
        book.claim(1, brought("a"))
    with pytest.raises(KeyError):
        book.entry("a")


def test_strikes_end_with_a_write_that_succeeds_and_with_the_last_request():
    book, _ = make()
    for number, digest in enumerate("ab"):
        book.claim(number, brought(digest))
    for _ in range(3):
        assert book.blame(["a", "b"]) is None
        assert [book.blame(["a"]) for _ in range(STRIKES)] == [None] * (STRIKES - 1) + ["a"]
    assert book.entry("a").strikes is None, "its requests end; another that brings it begins anew"
    bring(book, "b")
    assert book.entry("b").strikes is None
    book.release("b")
    book.give_back(0, "a")
    assert book.blame(["a"]) is None
