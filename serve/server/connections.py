"""The open connections of a server: so many that descriptors are left for others, and who has to go for whom.

A connection is idle while no whole request of it is there: it says nothing, sends slowly, or is kept alive. Idle ones
make room for new ones, the oldest first, of the address that has most.
"""

import collections
import ipaddress
import os
from collections.abc import Hashable
from pathlib import Path

from preft_jax.errors import ConfigError

AT_ONCE = 8
"""Connections that are accepted before any of them is counted."""

RESERVED = 96
"""Descriptors for all but connections: adapters, the registry, compiled programs, and four times ``AT_ONCE``."""

_MOST = 16384
_FEWEST = 16


def allowed_connections() -> int:
    """Return how many connections the process's descriptors allow; their limit is raised as far as it may be."""
    try:
        import resource
    except ImportError:  # Windows has no such limit.
        return _MOST
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST + 2 * RESERVED if hard == resource.RLIM_INFINITY else min(hard, _MOST + 2 * RESERVED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY:
        return _MOST
    here = Path("/proc/self/fd")
    used = len(os.listdir(here)) if here.exists() else RESERVED
    return max(_FEWEST, min(_MOST, soft - used - RESERVED))


class Connections[C: Hashable]:
    """The book of connections.

    Args:
        most: of all addresses.
        per_address: of one; an IPv6 network of 64 bits counts as one.
    """

    def __init__(self, most: int, per_address: int):
        if not 1 <= per_address <= most:
            raise ConfigError(f"connections are limited to {most}, and {per_address} of an address; give 1 to {most}")
        self.most = most
        self.per_address = per_address
        self._address: dict[C, str] = {}
        self._counts: collections.Counter[str] = collections.Counter()
        self._idle: dict[str, dict[C, None]] = {}

    def __len__(self) -> int:
        return len(self._address)

    def open(self, connection: C, host: str | None) -> C | None:
        """Note a new connection; return the one that has to be closed for it, itself if no other can be, or None."""
        address = _network(host)
        chosen: C | None = None
        if self._counts[address] >= self.per_address:
            chosen = self._oldest([address], connection)
        elif len(self._address) >= self.most:
            chosen = self._oldest(self._idle, connection)
        self._address[connection] = address
        self._counts[address] += 1
        self._idle.setdefault(address, {})[connection] = None
        if chosen is not None:
            self.close(chosen)
        return chosen

    def idle(self, connection: C) -> None:
        """Note that no whole request of a connection is there any more."""
        if connection in self._address:
            self._idle.setdefault(self._address[connection], {}).setdefault(connection)

    def busy(self, connection: C) -> None:
        """Note that a whole request of a connection is there: it stays until that is answered."""
        idle = self._idle.get(self._address.get(connection, ""), {})
        idle.pop(connection, None)

    def close(self, connection: C) -> None:
        """Note that a connection is closed; once is enough, more often does no harm."""
        if connection not in self._address:
            return
        self.busy(connection)
        address = self._address.pop(connection)
        self._counts[address] -= 1
        if not self._counts[address]:
            del self._counts[address]
            self._idle.pop(address, None)

    def _oldest(self, addresses: "list[str] | dict[str, dict[C, None]]", new: C) -> C:
        found = [address for address in addresses if self._idle.get(address)]
        if not found:
            return new
        return next(iter(self._idle[max(found, key=self._counts.__getitem__)]))


def _network(host: str | None) -> str:
    try:
        address = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        return host or ""
    if address.version == 4 or address.ipv4_mapped is not None:
        return str(address if address.version == 4 else address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
