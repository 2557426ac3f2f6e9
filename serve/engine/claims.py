"""What running requests claim of adapters in host memory: those that they bring, and leases from a store."""

from collections.abc import Iterator

from preft_jax.adapters.adapter import Adapter
from preft_jax.errors import RequestError
from serve.engine.residency import AdapterBank
from serve.store.host import AdapterStore, Lease
from serve.store.names import Registered


class Claims:
    """Keeps each request's adapter on the host until the request gives it back.

    Args:
        bank: the books of adapters on the host and the device.
        store: of adapters that requests name; None: there are none.
    """

    def __init__(self, bank: AdapterBank, store: AdapterStore | None):
        self._bank = bank
        self._store = store
        self._held: dict[int, str] = {}
        self._leases: dict[int, Lease] = {}
        self._loading: dict[Lease, int] = {}

    @property
    def loading(self) -> bool:
        """Whether an adapter is still to come."""
        return bool(self._loading)

    def __len__(self) -> int:
        return len(self._held.keys() | self._leases.keys())

    def claim(self, request_id: int, adapter: Adapter | Registered | None) -> bool:
        """Keep a request's adapter; False if it must be loaded first, of which ``poll`` tells.

        Raises:
            AdapterError: if it cannot be kept.
            RequestError: if it is named and there is no store.
        """
        if isinstance(adapter, Adapter):
            self._held[request_id] = self._bank.hold(adapter)
        elif adapter is not None:
            if self._store is None:
                raise RequestError(
                    "the adapter is named, and this engine has no store; make it with Engine(..., store=...)"
                )
            lease = self._leases[request_id] = self._store.lease(adapter)
            if lease.known is None:
                self._loading[lease] = request_id
                return False
            self._hold(request_id, lease)
        return True

    def poll(self) -> Iterator[tuple[int, str | None]]:
        """Yield the requests whose adapters came, or cannot be loaded, for the reason given."""
        for lease, error in self._store.poll() if self._store is not None and self._loading else ():
            request_id = self._loading.pop(lease, None)
            if request_id is not None:
                if error is None:
                    self._hold(request_id, lease)
                yield request_id, error

    def wait(self, seconds: float) -> None:
        """Wait until ``poll`` has something to tell, at most so long."""
        if self._store is not None:
            self._store.wait(seconds)

    def give_back(self, request_id: int) -> None:
        """Give up what a request claimed, if anything."""
        digest = self._held.pop(request_id, None)
        if digest is not None:
            self._bank.let_go(digest)
        lease = self._leases.pop(request_id, None)
        if lease is not None and self._store is not None:
            self._loading.pop(lease, None)
            self._store.release(lease)

    def _hold(self, request_id: int, lease: Lease) -> None:
        assert lease.known is not None
        self._bank.put(lease.digest, lease.known)
        self._held[request_id] = lease.digest
