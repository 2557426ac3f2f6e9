"""Where each adapter is: one ``Entry`` per digest, on the host and on the device. Plain Python, no JAX.

An adapter is folded and cut to rank pages once, and kept on the host while a request needs it or the user asked for it.
Its device pages are needed only while a prompt of its is prefilled (an all-token adapter's while it decodes, too); they
stay after that until their room is needed. An entry is on several tiers at once:

    disk          a request's lease waits for the store      ``leases``, and ``copy`` is None
    host          its rank pages are in host memory          ``copy``
    on its way    copied to the device beside the bank       ``on_device``
    bank          it has a place, which is written or not    ``place``, ``written``

``Staging`` decides when copies and writes are done, and notes here what was done.
"""

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from preft_jax.adapters.allocator import AdapterPages, BankAllocator
from preft_jax.errors import RequestError
from preft_jax.shapes import SITES
from serve.engine.recovery import STRIKES
from serve.store.names import Registered

if TYPE_CHECKING:
    from preft_jax.adapters.adapter import Adapter
    from serve.store.copies import Lease
    from serve.store.host import AdapterStore
    from serve.store.host_copy import Known


class Load(NamedTuple):
    """An adapter on its way to the bank: its slabs, of ``Known`` or copies on the device, and its place."""

    digest: str
    slabs: dict[str, list[Any]]
    place: AdapterPages

    @property
    def num_pages(self) -> int:
        """Rank pages of the site with most."""
        return max(map(len, self.slabs.values()), default=0)


@dataclasses.dataclass(eq=False)
class Entry:
    """One adapter, wherever it is.

    Attributes:
        digest: of what it computes.
        copy: its rank pages on the host; kept while somebody holds it, and until an unwritten place is written.
        is_kept: whether the user asked for it to stay on the host.
        requests: those that brought it and are unfinished.
        leases: of the requests that named it and are unfinished.
        on_device: its slabs, copied to the device beside the bank.
        place: in the bank.
        written: whether its place holds its rank pages.
        pins: prompts under way that need its place.
        strikes: failures of bringing it alone to the device, since bringing it with others failed; None: it is trusted.
    """

    digest: str
    copy: "Known | None" = None
    is_kept: bool = False
    requests: set[int] = dataclasses.field(default_factory=set)
    leases: "dict[int, Lease]" = dataclasses.field(default_factory=dict)
    on_device: dict[str, list[Any]] | None = None
    place: AdapterPages | None = None
    written: bool = False
    pins: int = 0
    strikes: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether it must stay on the host."""
        return self.is_kept or bool(self.requests or self.leases)

    @property
    def load(self) -> Load:
        """What is to be brought to the device next: its copy there to its place, or first the host's copy."""
        slabs = self.on_device
        if slabs is None:
            assert self.copy is not None, "it is neither on the host nor on the device"
            slabs = self.copy.slabs
        return Load(self.digest, slabs, self.place or {})


class Residency:
    """The entries of all adapters, and every change of one.

    Args:
        bank_pages: rank pages of the bank at each site, the null page included.
        pack: folds an adapter and cuts it to rank pages; raises ``AdapterError`` if it cannot.
        sites: that the bank holds.
        store: of adapters that requests name; None: there are none.

    Attributes:
        loads: places given in the bank.
    """

    def __init__(
        self,
        bank_pages: int,
        pack: "Callable[[Adapter], Known]",
        sites: Sequence[str] = SITES,
        store: "AdapterStore | None" = None,
    ):
        self._bank_pages = bank_pages
        self._pack = pack
        self._sites = tuple(sites)
        self._store = store
        self._entries: dict[str, Entry] = {}
        # Requests whose leases wait for the store.
        self._loading: dict[Lease, int] = {}
        self.loads = 0
        self._clear_device()

    def _clear_device(self) -> None:
        self._allocator = BankAllocator(self._bank_pages, self._sites)
        # Entries with a place, those used longest ago first; of these the unwritten, in the order of their places; and
        # those with a copy beside the bank.
        self._placed: collections.OrderedDict[str, Entry] = collections.OrderedDict()
        self._unwritten: dict[str, Entry] = {}
        self._copied: dict[str, Entry] = {}

    @property
    def on_host(self) -> set[str]:
        """Adapters that somebody holds and that are there."""
        return {entry.digest for entry in self._entries.values() if entry.is_held and entry.copy is not None}

    @property
    def pinned(self) -> set[str]:
        """Adapters whose places prompts under way need."""
        return {entry.digest for entry in self._placed.values() if entry.pins}

    @property
    def loading(self) -> bool:
        """Whether an adapter is still to come from the store."""
        return bool(self._loading)

    def knows(self, digest: str) -> bool:
        """Whether an adapter is on the host, and stays there."""
        entry = self._entries.get(digest)
        return entry is not None and entry.is_held and entry.copy is not None

    # Host

    def claim(self, request_id: int, adapter: "Adapter | Registered") -> bool:
        """Keep a request's adapter on the host; False if it must be loaded first, of which ``poll`` tells.

        Raises:
            AdapterError: if it cannot be kept.
            RequestError: if it is named and there is no store.
        """
        if not isinstance(adapter, Registered):
            self._packed(adapter).requests.add(request_id)
            return True
        if self._store is None:
            raise RequestError(
                "the adapter is named, and this engine has no store; make it with Engine(..., store=...)"
            )
        entry = self._entry(adapter.digest)
        lease = entry.leases[request_id] = self._store.lease(adapter)
        if lease.known is None:
            self._loading[lease] = request_id
            return False
        entry.copy = lease.known
        return True

    def poll(self) -> Iterator[tuple[int, str | None]]:
        """Yield the requests whose adapters came, or cannot be loaded, for the reason given."""
        for lease, error in self._store.poll() if self._store is not None and self._loading else ():
            request_id = self._loading.pop(lease, None)
            if request_id is not None:
                if error is None:
                    self._entries[lease.digest].copy = lease.known
                yield request_id, error

    def wait(self, seconds: float) -> None:
        """Wait until ``poll`` has something to tell, at most so long."""
        if self._store is not None:
            self._store.wait(seconds)

    def give_back(self, request_id: int, digest: str) -> None:
        """Give up a request's claim."""
        entry = self._entries[digest]
        entry.requests.discard(request_id)
        lease = entry.leases.pop(request_id, None)
        if lease is not None and self._store is not None:
            self._loading.pop(lease, None)
            self._store.release(lease)
        self._tidy(entry)

    def inherit(self, old: "Residency") -> None:
        """Keep on the host what ``old``, which is given up, was told to keep; its leases go back to the store."""
        for entry in old._entries.values():
            for lease in entry.leases.values():
                if self._store is not None:
                    self._store.release(lease)
            if entry.is_kept and entry.copy is not None:
                self.put(entry.digest, entry.copy)
        self.loads = old.loads

    def keep(self, adapter: "Adapter") -> str:
        """Keep an adapter on the host from now on, folding it if it is new; return its digest."""
        entry = self._packed(adapter)
        entry.is_kept = True
        return entry.digest

    def put(self, digest: str, copy: "Known") -> None:
        """Keep an adapter from now on, of which the rank pages are given."""
        entry = self._entry(digest)
        entry.copy, entry.is_kept = copy, True

    # Places in the bank

    def acquire(self, digest: str) -> bool:
        """Keep an adapter's pages in the bank until it is released; False if others occupy the bank now."""
        entry = self._entries[digest]
        if entry.place is None:
            assert entry.copy is not None, "it is not on the host"
            if not self._make_room({site: len(edit.groups) for site, edit in entry.copy.sites.items()}):
                return False
            entry.place = self._allocator.allocate(entry.copy.sites)
            self._placed[digest] = self._unwritten[digest] = entry
            self.loads += 1
        self._placed.move_to_end(digest)
        entry.pins += 1
        return True

    def release(self, digest: str) -> None:
        """Give up one ``acquire``; the pages may then be taken by others."""
        entry = self._entries[digest]
        assert entry.pins, "it is released more often than acquired"
        entry.pins -= 1

    def is_near(self, digest: str) -> bool:
        """Whether an adapter is on the device, or on its way there."""
        entry = self._entries[digest]
        return entry.written or entry.on_device is not None or entry.pins > 0

    def place(self, digest: str) -> AdapterPages:
        """Return an acquired adapter's pages."""
        place = self._entries[digest].place
        assert place is not None, "it was not acquired"
        return place

    def figures(self) -> dict[str, int]:
        """Return how many adapters and rank pages (of the fullest site) are in the bank, and how many pages it has."""
        used: collections.Counter[str] = collections.Counter()
        placed = tuple(self._placed.values())  # Another thread may ask.
        for place in [entry.place for entry in placed]:
            used.update({site: len(own.pages) for site, own in (place or {}).items()})
        return {"adapters": len(placed), "pages_used": max(used.values(), default=0), "pages": self._bank_pages - 1}

    # On the way to the device

    @property
    def unwritten(self) -> list[Entry]:
        """Entries with a place that does not hold them yet, in the order in which places were given."""
        return list(self._unwritten.values())

    @property
    def copied_pages(self) -> int:
        """Rank pages that lie on the device beside the bank."""
        return sum(entry.load.num_pages for entry in self._copied.values())

    def entry(self, digest: str) -> Entry:
        """Return the entry of an adapter that somebody holds, or that is on the device."""
        return self._entries[digest]

    def copied(self, loads: Sequence[Load]) -> None:
        """Note that copies beside the bank have begun."""
        for load in loads:
            entry = self._copied[load.digest] = self._entries[load.digest]
            entry.on_device = load.slabs

    def drop_copies(self, but: Collection[str] = ()) -> None:
        """Free the copies beside the bank, but for some adapters'."""
        for entry in [entry for digest, entry in self._copied.items() if digest not in but]:
            self._drop_copy(entry)
            self._tidy(entry)

    def written(self, digests: Sequence[str]) -> None:
        """Note that places hold what was copied, and that nothing is wrong with it."""
        for digest in digests:
            entry = self._unwritten.pop(digest)
            entry.written, entry.strikes = True, None
            self._drop_copy(entry)
            self._tidy(entry)

    def blame(self, digests: Sequence[str]) -> str | None:
        """Note that adapters could not be brought together; return the one that is to be given up, if it is known.

        Several are tried one by one from now on; one that fails alone twice is given up.
        """
        entries = [self._entries[digest] for digest in digests if digest in self._entries]
        for entry in entries:
            entry.strikes = 0 if len(digests) > 1 else (entry.strikes or 0) + 1
            if entry.strikes == STRIKES:
                entry.strikes = None
                return entry.digest
        return None

    def reset(self) -> None:
        """Forget what is on the device: its state is made anew."""
        entries = list(self._entries.values())
        self._clear_device()
        for entry in entries:
            entry.on_device, entry.place, entry.written, entry.pins = None, None, False, 0
            self._tidy(entry)

    # Entries

    def _entry(self, digest: str) -> Entry:
        return self._entries.setdefault(digest, Entry(digest))

    def _packed(self, adapter: "Adapter") -> Entry:
        entry = self._entries.get(adapter.digest)
        if entry is not None and entry.copy is not None:
            return entry
        copy = self._pack(adapter)
        entry = self._entry(adapter.digest)
        entry.copy = copy
        return entry

    def _make_room(self, counts: dict[str, int]) -> bool:
        """Take places away that no prompt needs, those used longest ago first, if that makes enough room."""
        short = {site: count - self._allocator.free_pages(site) for site, count in counts.items()}
        idle = (entry for entry in self._placed.values() if not entry.pins)
        leaving: list[Entry] = []
        while any(missing > 0 for missing in short.values()):
            entry = next(idle, None)
            if entry is None:
                return False
            leaving.append(entry)
            for site, place in (entry.place or {}).items():
                if site in short:
                    short[site] -= len(place.pages)
        for entry in leaving:
            self._take_place(entry)
        return True

    def _take_place(self, entry: Entry) -> None:
        assert entry.place is not None
        self._allocator.release(entry.place)
        entry.place, entry.written = None, False
        del self._placed[entry.digest]
        self._unwritten.pop(entry.digest, None)
        self._tidy(entry)

    def _drop_copy(self, entry: Entry) -> None:
        entry.on_device = None
        self._copied.pop(entry.digest, None)

    def _tidy(self, entry: Entry) -> None:
        """Forget what nobody needs of an entry: the host's copy, or all of it."""
        if entry.is_held:
            return
        if entry.place is None or entry.written:
            entry.copy = None
        if entry.place is None and entry.on_device is None:
            self._entries.pop(entry.digest, None)
