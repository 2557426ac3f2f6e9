"""Which adapters the engine knows, and which lie in the device's bank of rank pages: host state.

An adapter is folded and cut to rank pages once, and kept on the host while a request needs it or the user asked for it.
Its device pages are needed only while a prompt of its is prefilled (an all-token adapter's while it decodes, too); they
stay after that until their room is needed.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.bank import AdapterPages, BankAllocator
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.pages import adapter_page_counts
from preft_jax.config import ModelConfig
from preft_jax.errors import AdapterError
from preft_jax.shapes import SITES
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


class AdapterBank:
    """Books of the adapters on the host and of the bank's pages; ``pending`` is what must be written to the device."""

    def __init__(
        self,
        model: ModelConfig,
        bank_pages: int,
        max_pages: int,
        pack: Callable[[Adapter], Known],
        sites: Sequence[str] = SITES,
    ):
        self._model = model
        self._sites = tuple(sites)
        self._bank_pages = bank_pages
        self._max_pages = max_pages
        self._pack = pack
        self._known: dict[str, Known] = {}
        self._users: collections.Counter[str] = collections.Counter()
        self.reset()

    def reset(self) -> None:
        """Forget what is on the device."""
        self._allocator = BankAllocator(self._bank_pages, self._sites)
        self._places: collections.OrderedDict[str, AdapterPages] = collections.OrderedDict()
        self._pins: collections.Counter[str] = collections.Counter()
        self.pending: list[Load] = []
        self.loads = getattr(self, "loads", 0)

    def check(self, config: AdapterConfig) -> int:
        """Return how many rank pages an adapter puts on a tile's list.

        Raises:
            AdapterError: if it can never be served with this bank.
        """
        counts = adapter_page_counts(config, self._model)
        if missing := [site for site in counts if site not in self._sites]:
            raise AdapterError(
                f"the adapter edits {', '.join(missing)} and the engine serves edits of {', '.join(self._sites)}; name "
                "them in bank_sites (a server's --bank-sites)"
            )
        most = max(counts.values(), default=0)
        if most > self._max_pages:
            raise AdapterError(
                f"the adapter takes {most} rank pages of 16 and the engine serves up to {self._max_pages}; raise "
                "max_rank (a server's --max-lora-rank), or use an adapter of lower rank"
            )
        if most > self._bank_pages - 1:
            raise AdapterError(
                f"the adapter takes {most} rank pages and the bank has {self._bank_pages - 1}; raise bank_pages (a "
                "server's --bank-pages)"
            )
        return most

    def hold(self, adapter: Adapter) -> str:
        """Keep an adapter on the host, folding it if it is new, until it is let go; return its digest."""
        digest = adapter.digest
        if digest not in self._known:
            self.check(adapter.config)
            self._known[digest] = self._pack(adapter)
        self._users[digest] += 1
        return digest

    def put(self, digest: str, known: Known) -> None:
        """Make an adapter known by its rank pages, and keep it."""
        self._known[digest] = known
        self._users[digest] += 1

    def knows(self, digest: str) -> bool:
        """Whether an adapter is on the host."""
        return digest in self._known

    def let_go(self, digest: str) -> None:
        """Give up one ``hold``; the last one frees the host's copy."""
        self._users[digest] -= 1
        if self._users[digest] <= 0:
            del self._users[digest]
            self._known.pop(digest, None)

    def acquire(self, digest: str) -> bool:
        """Keep an adapter's pages in the bank until it is released; False if others occupy the bank now."""
        if digest not in self._places:
            known = self._known[digest]
            if not self._make_room({site: len(edit.groups) for site, edit in known.sites.items()}):
                return False
            self._places[digest] = self._allocator.allocate(known.sites)
            self.pending.append(self.load(digest))
            self.loads += 1
        self._places.move_to_end(digest)
        self._pins[digest] += 1
        return True

    def release(self, digest: str) -> None:
        """Give up one ``acquire``; the pages may then be taken by others."""
        self._pins[digest] -= 1
        if not self._pins[digest]:
            del self._pins[digest]

    def place(self, digest: str) -> AdapterPages:
        """Return an acquired adapter's pages."""
        return self._places[digest]

    def holds(self, digest: str) -> bool:
        """Whether an adapter has a place."""
        return digest in self._places

    def load(self, digest: str) -> Load:
        """Return what is to be written of an adapter that is on the host, and where to if it has a place."""
        return Load(digest, self._known[digest].slabs, self._places.get(digest, {}))

    def is_at(self, digest: str, place: AdapterPages) -> bool:
        """Whether an adapter still has the place that it was given."""
        return self._places.get(digest) is place

    def take_pending(self) -> list[Load]:
        """Return what must be written to the device before the next prefill."""
        pending, self.pending = self.pending, []
        return pending

    def figures(self) -> dict[str, int]:
        """Return how many adapters and rank pages (of the fullest site) are in the bank, and how many pages it has."""
        used: collections.Counter[str] = collections.Counter()
        for place in tuple(self._places.values()):
            used.update({site: len(own.pages) for site, own in place.items()})
        return {
            "adapters": len(self._places),
            "pages_used": max(used.values(), default=0),
            "pages": self._bank_pages - 1,
        }

    def _make_room(self, counts: dict[str, int]) -> bool:
        short = {site: count - self._allocator.free_pages(site) for site, count in counts.items()}
        idle = (digest for digest in self._places if digest not in self._pins)
        leaving: list[str] = []
        while any(missing > 0 for missing in short.values()):
            digest = next(idle, None)
            if digest is None:
                return False
            leaving.append(digest)
            for site, place in self._places[digest].items():
                if site in short:
                    short[site] -= len(place.pages)
        for digest in leaving:
            self._allocator.release(self._places.pop(digest))
        if leaving:
            self.pending = [load for load in self.pending if load.digest not in leaving]
        return True
