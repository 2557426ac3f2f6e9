"""One budget of a device's memory: shares are leased by name, and given back.

budget = Budget(80 << 30, used=16 << 30)
with budget.lease("KV cache", 40 << 30):
    budget.lease("training", 8 << 30, ask_back=training.stop)
"""

import threading
from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol

import jax

from preft_jax.errors import ConfigError

_GIB = 1 << 30


class Device(Protocol):
    """What is asked of a ``jax.Device``."""

    @property
    def platform(self) -> str:
        """``cpu``, ``gpu`` or ``tpu``."""
        ...

    def memory_stats(self) -> dict[str, int] | None:
        """Return what is known of its memory."""
        ...


def devices_of(tree: Any) -> set[Device]:
    """Return the devices that arrays lie on; the default one if there is no array."""
    found = {device for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) for device in leaf.devices()}
    return found or set(jax.local_devices()[:1])


def limit(devices: Iterable[Device]) -> int | None:
    """Return the bytes that the process may take of each of some devices; None if that means nothing, as on a CPU."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices if device.platform != "cpu"]
    return min((found for found in limits if found is not None), default=None)


def in_use(devices: Iterable[Device]) -> int:
    """Return the bytes that the process uses of that of some devices on which it uses most."""
    return max((device.memory_stats() or {}).get("bytes_in_use", 0) for device in devices)


class Lease:
    """A share of a budget. A context manager: it is given back at the end."""

    def __init__(self, budget: "Budget", name: str, num_bytes: int, ask_back: Callable[[], object] | None):
        self.name = name
        self.num_bytes = num_bytes
        self._budget = budget
        self._ask_back = ask_back

    def give_back(self) -> None:
        """Return the share to the budget; once is enough."""
        self._budget._leave(self)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()


class Budget:
    """The bytes of a device that may be leased. Thread-safe.

    Args:
        total: what the process may take.
        used: what of it is gone already.
    """

    def __init__(self, total: int, used: int = 0):
        self.total = total
        self.used = used
        self._leases: list[Lease] = []
        self._lock = threading.RLock()

    @classmethod
    def of(cls, devices: Collection[Device], utilization: float) -> "Budget | None":
        """Return the budget of a part of the memory of some devices, cut alike; None where memory is not counted."""
        most = limit(devices)
        return None if most is None else cls(int(most * utilization), in_use(devices))

    @property
    def free(self) -> int:
        """Bytes that nobody has."""
        with self._lock:
            return self.total - self.used - sum(lease.num_bytes for lease in self._leases)

    def shares(self) -> dict[str, int]:
        """Return the bytes that are leased under each name."""
        with self._lock:
            found: dict[str, int] = {}
            for lease in self._leases:
                found[lease.name] = found.get(lease.name, 0) + lease.num_bytes
            return found

    def lease(self, name: str, num_bytes: int, ask_back: Callable[[], object] | None = None) -> Lease:
        """Lease a share.

        Args:
            name: whose it is.
            num_bytes: of the share.
            ask_back: called when others need memory that is not there; it gives the lease back, at once if it can.

        Raises:
            ConfigError: there is no room, after all that can be asked back was.
        """
        with self._lock:
            for other in reversed(self._leases):
                if self.free >= num_bytes:
                    break
                if other._ask_back is not None:
                    other._ask_back()
            if num_bytes < 0 or self.free < num_bytes:
                held = ", ".join(f"{own} {size / _GIB:.2f}" for own, size in self.shares().items())
                raise ConfigError(
                    f"{name} needs {num_bytes / _GIB:.2f} GiB of device memory and {max(self.free, 0) / _GIB:.2f} of "
                    f"{self.total / _GIB:.2f} are free (GiB leased: {held or 'none'}; in use before: "
                    f"{self.used / _GIB:.2f}); make what has a lease smaller, or raise memory_utilization"
                )
            lease = Lease(self, name, num_bytes, ask_back)
            self._leases.append(lease)
            return lease

    def _leave(self, lease: Lease) -> None:
        with self._lock:
            if lease in self._leases:
                self._leases.remove(lease)
