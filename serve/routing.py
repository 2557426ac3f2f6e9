"""Which replica of a fleet a request goes to: by turns, or where its adapter or its prompt's beginning was before.

Plain Python on names and counts, for routers and for simulations of them.
"""

import hashlib
import itertools
import math
from collections.abc import Mapping
from typing import Protocol


class Policy(Protocol):
    """A way to choose."""

    def choose(self, key: str | None, loads: Mapping[str, int]) -> str:
        """Return the replica for a request.

        Args:
            key: what requests share that a replica should see together, such as the adapter's name; None: nothing.
            loads: requests that each replica has; at least one replica.
        """
        ...


class RoundRobin:
    """Replicas take turns, whatever the request."""

    def __init__(self) -> None:
        self._turns = itertools.count()

    def choose(self, key: str | None, loads: Mapping[str, int]) -> str:
        """See ``Policy``."""
        return sorted(loads)[next(self._turns) % len(loads)]


class Affinity:
    """A key goes to the same few replicas while they are not busier than others.

    Each key ranks the replicas by a hash of its own (rendezvous hashing, Thaler and Ravishankar, 1998), so that a fleet
    that grows or shrinks by one moves few keys. A request goes to the first of its key's replicas that has fewer
    requests than ``slack`` times the mean (bounded loads, Mirrokni et al., arXiv 1608.01350); if all of these have
    more, to the least busy one of all, so that none is idle while others queue.

    Args:
        most: replicas of a key.
        slack: times the mean load that a replica may have, above 1.
        least: requests that a replica may have in any case: a few more than others' hold nobody up.
    """

    def __init__(self, most: int = 2, slack: float = 1.25, least: int = 8):
        if most < 1 or not slack > 1:
            raise ValueError(f"most is {most} and slack {slack}; give at least 1, and more than 1")
        self._most = most
        self._slack = slack
        self._least = least

    def choose(self, key: str | None, loads: Mapping[str, int]) -> str:
        """See ``Policy``."""
        if key is not None:
            bound = max(self._least, math.ceil(self._slack * (sum(loads.values()) + 1) / len(loads)))
            for name in self.replicas(key, loads):
                if loads[name] < bound:
                    return name
        return min(loads, key=lambda name: (loads[name], name))

    def replicas(self, key: str, loads: Mapping[str, int]) -> list[str]:
        """Return the replicas of a key, the first choice first."""
        return sorted(loads, key=lambda name: _rank(key, name))[: self._most]


def _rank(key: str, name: str) -> bytes:
    text = f"{len(key)}:{key}{name}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=8).digest()
