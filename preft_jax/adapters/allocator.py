"""The host's book of the adapter bank: which rank pages are free, and where each adapter lies. Knows no device."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from preft_jax.errors import AdapterError
from preft_jax.shapes import SITES


class SitePages(NamedTuple):
    """An adapter's pages at one site, and for each page the column of the edit mask that switches it."""

    pages: tuple[int, ...]
    groups: tuple[int, ...]


AdapterPages = dict[str, SitePages]
"""Where an adapter lies in the bank: its pages by site; sites that it does not edit are absent."""


class HasGroups(Protocol):
    """What the allocator needs to know of an adapter at one site: a ``PackedSite``, for one."""

    @property
    def groups(self) -> tuple[int, ...]:
        """The mask column of each rank page."""
        ...


class BankAllocator:
    """Which rank pages are free, a list for each site."""

    def __init__(self, num_pages: int, sites: Sequence[str] = SITES):
        self.num_pages = num_pages
        self._free = {site: list(range(num_pages - 1, 0, -1)) for site in sites}

    def free_pages(self, site: str) -> int:
        """Return how many pages of a site are free."""
        return len(self._free[site])

    def allocate(self, packed: Mapping[str, HasGroups]) -> AdapterPages:
        """Take the pages that an adapter needs, one for each of a site's ``groups``.

        Raises:
            AdapterError: if the bank lacks one of its sites or enough free pages; nothing is taken then.
        """
        for site, edit in packed.items():
            if site not in self._free:
                raise AdapterError(
                    f"the adapter edits {site!r}, which this bank does not hold; it holds {', '.join(self._free)}"
                )
            need, free = len(edit.groups), len(self._free[site])
            if need > free:
                raise AdapterError(
                    f"the adapter needs {need} rank pages at {site!r} and {free} of {self.num_pages - 1} are free; "
                    "give the bank more pages or serve fewer adapters at once"
                )
        return {
            site: SitePages(tuple(self._free[site].pop() for _ in edit.groups), edit.groups)
            for site, edit in packed.items()
        }

    def release(self, where: AdapterPages) -> None:
        """Give an adapter's pages back."""
        for site, place in where.items():
            self._free[site].extend(place.pages)
