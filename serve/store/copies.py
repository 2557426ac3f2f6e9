"""Copies of adapters in host memory, and claims on them."""

import dataclasses
import weakref

from serve.store.host_copy import Known


@dataclasses.dataclass(eq=False)
class Copy:
    """The copy of an adapter in host memory, or the wish for one.

    Attributes:
        digest: of the adapter.
        path: the directory that it is read from; empty: it has none.
        num_bytes: of its rank pages.
        known: its rank pages; None: they are not there yet.
        reserved: whether its room is taken.
        leases: of those who still hold them: a lease whose holder was cut off before it got it keeps nothing.
    """

    digest: str
    path: str
    num_bytes: int
    known: Known | None = None
    reserved: bool = False
    leases: "weakref.WeakSet[Lease]" = dataclasses.field(default_factory=weakref.WeakSet)


class Lease:
    """A claim on an adapter's copy in host memory."""

    def __init__(self, copy: Copy):
        self.copy = copy
        self.digest = copy.digest

    @property
    def known(self) -> Known | None:
        """The rank pages, or None while they are loaded."""
        return self.copy.known


Told = list[tuple[Lease, str | None]]
"""Claims whose wait is over, each with the reason if its load failed."""
