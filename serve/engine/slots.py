"""What the scheduler asks of the adapters on the device. Plain Python, no JAX."""

from typing import Protocol


class AdapterSlots(Protocol):
    """What the scheduler knows of adapters: whether one can be on the device for the next prefill."""

    def acquire(self, digest: str) -> bool:
        """Keep an adapter on the device until it is released; False if that cannot be now."""
        ...

    def release(self, digest: str) -> None:
        """Give up one ``acquire``."""
        ...

    def is_near(self, digest: str) -> bool:
        """Whether an adapter is on the device, or on its way there."""
        ...
