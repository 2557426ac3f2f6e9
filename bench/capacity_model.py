"""A fleet of engines on a simulated clock: what each request waits for, under a policy of routing.

Each replica is the engine's own scheduler over ``bench.trace_model``'s times of a device, as a process of simpy. To
these come the costs of adapters, fitted to committed measurements (``Costs``): edits of prompts, all-token adapters'
bytes in each decode step, places in the bank, and the way of an adapter from a store over the network to host memory.
Milliseconds and bytes.
"""

import collections
import dataclasses
import itertools
import json
from collections.abc import Generator
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import numpy as np
import simpy

from bench.table_parts import RESULTS
from bench.trace_model import GPUS, KV_BYTES, MIXED, Flight, Variant, World
from preft_jax.config import PRESETS
from preft_jax.shapes import LINEAR_SITES
from serve.engine.plan import Step
from serve.engine.sequence import Sequence, Status
from serve.routing import Policy

KINDS = ("base", "prefill-only", "all-token")
PAGE_TOKENS = 64
RANK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """What adapters (LoRA of rank 16 on all linears of ``llama3-8b``) cost a device.

    Attributes:
        edit_call: of a call that edits tokens, ms.
        edit_token: of each of its tokens, ms.
        row: of each row of a decode step of all-token adapters, ms.
        adapter: of each distinct adapter in it, whose bytes are read, ms.
        adapter_bytes: of one adapter.
        kv_pages: of the cache without adapters.
        staging_pages: of the cache, that adapters on their way take.
    """

    edit_call: float
    edit_token: float
    row: float
    adapter: float
    adapter_bytes: int
    kv_pages: int
    staging_pages: int

    @classmethod
    def measured(cls, results: Path = RESULTS) -> "Costs":
        """Return the costs on an H200, from committed result files.

        Edits: two sizes of a prefill call. All-token: a decode step of 64 adapters beside that of the base on an H100,
        less the adapters' bytes at that machine's rate; on an H200 the bytes come at its own.
        """

        def read(name: str) -> dict[str, Any]:
            return json.loads((results / f"{name}.json").read_text())

        def only(figures: dict[str, Any], mode: str) -> dict[str, Any]:
            return next(row for row in figures["rows"] if row["mode"] == mode)

        config = PRESETS["llama3-8b"]
        size = 2 * RANK * config.num_hidden_layers * sum(map(sum, map(config.site_shape, LINEAR_SITES)))
        small, large = sorted(read("h200-prefill-small")["cases"], key=lambda case: case["tokens"])
        edit_small, edit_large = (case["ms"] - case["base_ms"] for case in (small, large))
        per_token = (edit_large - edit_small) / (large["tokens"] - small["tokens"])
        adapted, base = read("h100-all-token"), read("h100-headline")
        row = only(adapted, "all-token")
        rows = row["most_running"]
        extra = row["decode_step_ms"] - only(base, "base")["decode_step_ms"]
        bytes_ms = size / (1e6 * adapted["ceilings"]["copy_gb_per_s"])
        trace = read("h200-trace-adapters")
        pages, with_bank = only(trace, "base")["kv_pages"], only(trace, "prefill-only")
        per_page = PAGE_TOKENS * KV_BYTES
        return cls(
            edit_call=edit_small - per_token * small["tokens"],
            edit_token=per_token,
            row=(extra - row["num_adapters"] * bytes_ms) / rows,
            adapter=size / (1e6 * read("h200-headline")["ceilings"]["copy_gb_per_s"]),
            adapter_bytes=size,
            kv_pages=pages,
            staging_pages=pages - with_bank["kv_pages"] - with_bank["bank_adapters"] * size // per_page,
        )

    def pages_beside(self, bank_adapters: int) -> int:
        """Return the KV pages beside a bank of so many adapters; none: the base model alone."""
        if not bank_adapters:
            return self.kv_pages
        return self.kv_pages - self.staging_pages - bank_adapters * self.adapter_bytes // (PAGE_TOKENS * KV_BYTES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """One replica's sizes.

    Attributes:
        bank_adapters: on the device: prompts under way (prefill-only), all that run (all-token).
        host_adapters: in host memory.
        fetch_ms: of an adapter that is not there, over the replica's link; one comes at a time.
        max_num_seqs: sequences that run together.
    """

    bank_adapters: int = 64
    host_adapters: int
    fetch_ms: float
    max_num_seqs: int = 256


class Cache:
    """The most recently used keys, of which those that are held stay; ``AdapterSlots`` of a bank."""

    def __init__(self, size: int, keys: Many[str] = ()):
        self._size = size
        self._held: collections.Counter[str] = collections.Counter()
        self._keys: collections.OrderedDict[str, None] = collections.OrderedDict.fromkeys(keys[:size])
        self.loads = 0

    def acquire(self, digest: str) -> bool:
        """Hold a key, brought in if it is not there; False if others hold all places."""
        if digest not in self._keys:
            if len(self._keys) >= self._size:
                free = next((key for key in self._keys if not self._held[key]), None)
                if free is None:
                    return False
                del self._keys[free]
            self.loads += 1
        self._keys[digest] = None
        self._keys.move_to_end(digest)
        self._held[digest] += 1
        return True

    def release(self, digest: str) -> None:
        """Give up one ``acquire``."""
        self._held[digest] -= 1
        if not self._held[digest]:
            del self._held[digest]

    def is_near(self, digest: str) -> bool:
        """Whether a key is there. One that comes into a bank is copied beside the call before: nothing waits."""
        return True

    def __contains__(self, digest: str) -> bool:
        return digest in self._keys


class Replica(World):
    """One engine, and its host's memory.

    Args:
        env: the clock.
        kind: of ``KINDS``.
        machine: its sizes.
        costs: of adapters.
        hot: adapters that host memory holds at first, the most wanted last.
    """

    def __init__(self, env: simpy.Environment, kind: str, machine: Machine, costs: Costs, hot: Many[str] = ()):
        bank = machine.max_num_seqs if kind == "all-token" else machine.bank_adapters if kind != "base" else 0
        gpu = dataclasses.replace(GPUS["h200"], num_pages=costs.pages_beside(bank))
        self.bank = Cache(bank)
        super().__init__(variant_of(kind, machine), gpu, self.bank)
        self.env, self.kind, self.costs, self.machine = env, kind, costs, machine
        self.memory = Cache(machine.host_adapters, hot)
        self.link = simpy.Resource(env)
        self.open = 0
        self.done: list[Flight] = []
        self._users: dict[int, str] = {}
        self._work = env.event()
        env.process(self._run())

    def serve(self, number: int, prompt: int, output: int, user: str) -> Generator[Any]:
        """Take a request now: its adapter is brought to host memory, and then the engine has it."""
        arrival = self.env.now
        self.open += 1
        if self.kind != "base" and user not in self.memory:
            with self.link.request() as turn:
                yield turn
                if user not in self.memory:
                    yield self.env.timeout(self.machine.fetch_ms)
        if self.kind != "base" and self.memory.acquire(user):
            self.memory.release(user)
        self._users[number] = user
        self.add(number, (arrival, prompt, output))
        if not self._work.triggered:
            self._work.succeed()

    def _run(self) -> Generator[Any]:
        while True:
            if not self.flights:
                self._work = self.env.event()
                yield self._work
                self.now = max(self.now, self.env.now)
            ended = self.tell(self.turn())
            self.open -= len(ended)
            self.done += ended
            yield self.env.timeout(max(0.0, self.now - self.env.now))

    # See ``World``.

    def sequence(self, number: int, request: tuple[float, int, int]) -> Sequence:
        """See ``World``: with the user's adapter."""
        sequence, user = super().sequence(number, request), self._users.pop(number)
        if self.kind != "base":
            sequence.adapter, sequence.entries, sequence.all_token = user, 1, self.kind == "all-token"
        return sequence

    def call_ms(self, step: Step, repeat: int) -> float:
        """See ``World``: with what adapters add."""
        took, costs = super().call_ms(step, repeat), self.costs
        if self.kind != "base" and step.chunks:
            took += costs.edit_call + costs.edit_token * (step.num_tokens + len(step.rows))
        if self.kind == "all-token" and step.rows:
            rows = [row.sequence for row in step.rows if row.sequence.status is not Status.FINISHED]
            took += costs.row * len(rows) + costs.adapter * len({sequence.adapter for sequence in rows})
        return took


def variant_of(kind: str, machine: Machine) -> Variant:
    """Return the engine that serves a kind: all-token adapters have no mixed calls."""
    mixed = () if kind == "all-token" else (256, 512, 768, 1024)
    sizes = (256, 1024, 2048)
    return dataclasses.replace(
        MIXED, max_num_seqs=machine.max_num_seqs, mixed_sizes=mixed, prefill_sizes=sizes, step_ms=float("inf")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Requests: when they come (ms), their tokens, and whose they are."""

    arrivals: np.ndarray
    prompts: Many[int]
    outputs: Many[int]
    users: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """What a simulated fleet did with a load; requests that are not done count as outside the bounds.

    Attributes:
        flights: of the requests that ended.
        offered: requests.
        seconds: from the first arrival to the last.
        replicas: after it.
    """

    flights: list[Flight]
    offered: int
    seconds: float
    replicas: list[Replica]

    @property
    def ttft_ms(self) -> np.ndarray:
        """To the first token of each request that ended."""
        return np.array([flight.first - flight.arrival for flight in self.flights])

    @property
    def tpot_ms(self) -> np.ndarray:
        """Mean time between tokens of each."""
        return np.array([(f.last - f.first) / max(1, f.sequence.generated - 1) for f in self.flights])

    def within(self, ttft_ms: float, tpot_ms: float) -> float:
        """Return the part of requests whose times are within bounds."""
        return float(np.sum((self.ttft_ms <= ttft_ms) & (self.tpot_ms <= tpot_ms))) / self.offered

    @property
    def host_misses(self) -> int:
        """Adapters that came over the network."""
        return sum(replica.memory.loads for replica in self.replicas)

    @property
    def device_loads(self) -> int:
        """Adapters that were copied to a device."""
        return sum(replica.bank.loads for replica in self.replicas)


_GRACE_MS = 30_000.0
"""After the last arrival; what is not done then is late in any case."""


def simulate(
    load: Load, replicas: int, kind: str, policy: Policy, machine: Machine, costs: Costs, hot: Many[Many[str]] = ()
) -> Served:
    """Serve a load with a fleet; ``hot``: the adapters in each replica's memory at first."""
    env = simpy.Environment()
    memory = itertools.chain(hot, itertools.repeat(()))
    fleet = {str(i): Replica(env, kind, machine, costs, next(memory)) for i in range(replicas)}

    def source() -> Generator[Any]:
        requests = zip(load.arrivals, load.prompts, load.outputs, load.users, strict=True)
        for number, (arrival, prompt, output, user) in enumerate(requests):
            yield env.timeout(max(0.0, float(arrival) - env.now))
            name = policy.choose(str(user), {name: replica.open for name, replica in fleet.items()})
            env.process(fleet[name].serve(number, prompt, output, str(user)))

    env.process(source())
    end = float(load.arrivals[-1])
    env.run(until=end + _GRACE_MS)
    return Served(
        flights=[flight for replica in fleet.values() for flight in replica.done],
        offered=len(load.arrivals),
        seconds=(end - float(load.arrivals[0])) / 1e3,
        replicas=list(fleet.values()),
    )
