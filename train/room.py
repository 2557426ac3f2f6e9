"""The device's memory that a micro-batch holds, leased from an engine's budget."""

import logging
from collections.abc import Callable
from typing import Any

import jax

from preft_jax.device.memory import Budget, Lease
from preft_jax.errors import ConfigError
from train.micro import MicroBatch
from train.window import Windowed

_log = logging.getLogger("preft.train")


class Room:
    """Leases what each micro-batch takes; what was leased serves later ones that take no more.

    Args:
        ask_back: called if others need what is leased; the budget expects it to be given back.

    Attributes:
        budget: of which is leased; None: nothing is leased, as on a CPU.
        waits: why there is no room, or None.
    """

    def __init__(self, ask_back: Callable[[], object]):
        self.budget: Budget | None = None
        self.waits: str | None = None
        self._ask_back = ask_back
        self._lease: Lease | None = None

    @property
    def is_held(self) -> bool:
        """Whether something is leased."""
        return self._lease is not None

    def has(self, windowed: Windowed, micro: MicroBatch, dtype: Any) -> bool:
        """Lease what a micro-batch takes over a base of that dtype, if there is room."""
        if self.budget is None:
            return True
        params = sum(leaf.size for leaf in jax.tree.leaves(micro.params))
        rows, length = micro.batch.tokens_BS.shape
        needed = windowed.held_bytes(rows, length, params, dtype)
        if self._lease is not None and self._lease.num_bytes >= needed:
            return True
        self.give_back()
        try:
            self._lease = self.budget.lease("training", needed, ask_back=self._ask_back)
        except ConfigError as error:
            if self.waits is None:
                _log.warning("training waits for memory: %s", error)
            self.waits = str(error)
            return False
        self.waits = None
        return True

    def give_back(self) -> None:
        """Give back what is leased."""
        if self._lease is not None:
            self._lease.give_back()
            self._lease = None
