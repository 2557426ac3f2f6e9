"""The host's book of KV pages: who holds which page of the device pools, and which pages later requests can reuse.

A page holds ``page_size`` tokens and is in one of three states:

free      nobody holds it and its content means nothing
used      at least one request holds a reference
reusable  nobody holds it, but its content is known by a key; it stays until its room is needed

Only full pages get a key, and what a key says is the caller's business (``serve.engine.prefix``). Everything here is
plain Python and takes constant time per page. Not thread-safe: one scheduler owns it.
"""

import collections
from collections.abc import Sequence


class OutOfPages(RuntimeError):  # noqa: N818 (a reason to wait or to preempt, seldom an error)
    """Fewer pages are available than were wanted; nothing was allocated.

    ``wanted`` and ``available`` are the two numbers of pages.
    """

    def __init__(self, wanted: int, available: int) -> None:
        super().__init__(f"{wanted} KV pages wanted, {available} available; release some or wait for a request to end")
        self.wanted = wanted
        self.available = available


class PageManager:
    """Reference counts, content keys and the least-recently-used order of ``num_pages`` pages.

    A method that raises has changed nothing.

    Args:
        num_pages: pages of the device pools, numbered from 0; at least 1.
        page_size: tokens in a page, at least 1.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages {num_pages} and page_size {page_size} must both be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self.forget()

    def forget(self) -> None:
        """Drop all keys and all references, as after the device pools were rebuilt: every page is free."""
        self._references = [0] * self.num_pages
        self._free = collections.deque(range(self.num_pages))
        self._reusable: collections.OrderedDict[int, None] = collections.OrderedDict()  # least recently used first
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that ``allocate`` can give: free and reusable ones."""
        return len(self._free) + len(self._reusable)

    @property
    def num_used(self) -> int:
        """Pages with at least one reference."""
        return self.num_pages - self.num_available

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Return the pages of the longest prefix of ``keys`` that is cached.

        No reference is taken: ``acquire`` the pages before the next ``allocate``, which may evict them. Until then
        the reusable ones among them still count as available.
        """
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def acquire(self, pages: Sequence[int]) -> None:
        """Add one reference to each page: a match, or a fork that shares another request's pages.

        Raises:
            ValueError: for an unknown page, and for a free one, whose content means nothing.
        """
        for page in pages:
            if not self._num_references(page) and page not in self._reusable:
                raise ValueError(f"page {page} is free; acquire only pages that are held or matched, or allocate some")
        for page in pages:
            self._references[page] += 1
            self._reusable.pop(page, None)

    def allocate(self, count: int) -> list[int]:
        """Return ``count`` pages of unspecified content with one reference each.

        Free pages go first, then the least recently used reusable ones, whose keys are forgotten.

        Raises:
            OutOfPages: if fewer are available.
            ValueError: if ``count`` is negative.
        """
        if count < 0:
            raise ValueError(f"cannot allocate {count} pages; give 0 or more")
        if count > self.num_available:
            raise OutOfPages(count, self.num_available)
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.popleft()
            else:
                page, _ = self._reusable.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._references[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference of each page; ``pages`` are a request's, in the order of its tokens.

        A page without references becomes reusable if it has a key and free if not.

        Raises:
            ValueError: for an unknown page, and for one that has fewer references than are dropped.
        """
        for page, count in collections.Counter(pages).items():
            held = self._num_references(page)
            if held < count:
                raise ValueError(f"page {page} has {held} references, cannot release {count}; was it released before?")
        # A later page is found only through those before it, so it is the first to go.
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._key_of:
                self._reusable[page] = None
            else:
                self._free.append(page)

    def register(self, page: int, key: bytes) -> None:
        """Make a full page of known content findable under ``key``.

        If another page has the key already, that one keeps it and this one stays without. The same page and key again
        change nothing.

        Raises:
            ValueError: for an unknown or unreferenced page, and for one that has another key.
        """
        if not self._num_references(page):
            raise ValueError(f"page {page} has no reference; register a page while its request holds it")
        given = self._key_of.get(page)
        if given is not None and given != key:
            raise ValueError(f"page {page} is registered under {given.hex()}, cannot change it to {key.hex()}")
        if key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def unregister(self, pages: Sequence[int]) -> None:
        """Forget the keys of pages whose content is not to be used again; those that nobody holds become free.

        Raises:
            ValueError: for an unknown page.
        """
        for page in pages:
            self._num_references(page)
        for page in pages:
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._page_of[key]
                if page in self._reusable:
                    del self._reusable[page]
                    self._free.append(page)

    def _num_references(self, page: int) -> int:
        if not 0 <= page < self.num_pages:
            raise ValueError(f"page {page} does not exist; pages are 0 to {self.num_pages - 1}")
        return self._references[page]
