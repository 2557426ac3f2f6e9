"""``python -m bench.capacity --trace CONV.csv``: how many replicas so many users need, each with an own adapter.

A discrete-event simulation (``bench.capacity_model``): requests come as in a trace, replicas are the engine's scheduler
over measured times of an H200 that serves ``llama3-8b``, LoRA of rank 16. For each number of users, kind of adapter and
policy of routing it looks for the fewest replicas that keep the bounds of TTFT and TPOT, and tells what they cost. A
fleet of more than ``--cell`` replicas is simulated by so many of them, with their part of requests and, where routing
keeps users apart, of users. It ends with one JSON line. Before, the model serves what was measured, beside the
measurement.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.capacity_model import KINDS, Costs, Load, Machine, Served, simulate
from bench.table_parts import RESULTS
from bench.trace import digest_of
from preft_jax.cli import hyphenated
from preft_jax.errors import ConfigError, PreftError
from serve.bench.datasets import Trace, read_trace
from serve.bench.environment import environment
from serve.bench.output import emit
from serve.routing import Affinity, Policy, RoundRobin

POLICIES: dict[str, type[RoundRobin] | type[Affinity]] = {"affinity": Affinity, "round-robin": RoundRobin}

CLOSE = 1.03
"""Times the fewest replicas that the search may end with, in large fleets."""

_MOST_REPLICAS = 100_000


def cell_load(trace: Trace, rate: float, seconds: float, users: int, alpha: float, rng: np.random.Generator) -> Load:
    """Return requests at a rate a second, as a trace has them, each of a random user.

    The k-th user is drawn with probability proportional to ``k ** -alpha``; 0: all are alike.
    """
    count = max(2, round(rate * seconds))
    chosen = np.arange(count) % len(trace.arrivals)
    length = trace.arrivals[-1] * len(trace.arrivals) / (len(trace.arrivals) - 1)
    arrivals = np.array(trace.arrivals)[chosen] + length * (np.arange(count) // len(trace.arrivals))
    chances = np.cumsum(np.arange(1, users + 1, dtype=np.float64) ** -alpha)
    return Load(
        arrivals=1e3 * seconds * arrivals / arrivals[-1],
        prompts=[trace.prompt_lens[i] for i in chosen],
        outputs=[trace.output_lens[i] for i in chosen],
        users=np.searchsorted(chances, rng.random(count) * chances[-1]),
    )


def hot_adapters(policy: Policy, replicas: int, users: int, room: int) -> list[list[str]]:
    """Return whose adapters each replica's memory holds after a while, the most wanted last."""
    if not isinstance(policy, Affinity):
        return [[str(user) for user in range(min(users, room))][::-1]] * replicas
    found: dict[str, list[str]] = {str(name): [] for name in range(replicas)}
    loads = dict.fromkeys(found, 0)
    for user in map(str, range(users)):
        held = found[policy.replicas(user, loads)[0]]
        if len(held) < room:
            held.append(user)
        elif min(map(len, found.values())) == room:
            break
    return [held[::-1] for held in found.values()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """How many replicas a number of users need."""

    users: int
    kind: str
    policy: str


class Answers:
    """Simulates fleets for questions.

    Args:
        args: the command line.
        trace: of which requests are made.
        costs: of adapters.
    """

    def __init__(self, args: argparse.Namespace, trace: Trace, costs: Costs):
        self._args, self._trace, self._costs = args, trace, costs
        self._machine = Machine(
            host_adapters=int(args.host_memory_gib * 2**30) // costs.adapter_bytes,
            fetch_ms=8e-6 * costs.adapter_bytes / args.network_gbit,
        )

    def rate(self, users: int) -> float:
        """Return the requests a second of so many users."""
        return users * self._args.requests_per_hour / 3600

    def serve(self, asked: Question, replicas: int) -> Served:
        """Return what a fleet of so many replicas does, or a cell of it."""
        args, size = self._args, min(replicas, self._args.cell)
        policy = POLICIES[asked.policy]()
        apart = isinstance(policy, Affinity)
        users = max(1, asked.users * size // replicas) if apart else asked.users
        rng = np.random.default_rng(args.seed)
        load = cell_load(self._trace, self.rate(asked.users) * size / replicas, args.seconds, users, args.alpha, rng)
        hot = hot_adapters(policy, size, users, self._machine.host_adapters)
        return simulate(load, size, asked.kind, policy, self._machine, self._costs, hot)

    def fewest(self, asked: Question) -> tuple[int, Served]:
        """Return the fewest replicas that keep the bounds, and what they do.

        Raises:
            ConfigError: no number does.
        """
        args, low, high = self._args, 0, max(1, math.ceil(self.rate(asked.users) / 12))
        while not self._is_enough(served := self.serve(asked, high)):
            low, high = high, math.ceil(1.4 * high)
            if high > _MOST_REPLICAS:
                raise ConfigError(f"{asked} is not served within the bounds by {low} replicas; give others")
        while high - low > 1 and high > CLOSE * low:
            middle = (low + high) // 2
            tried = self.serve(asked, middle)
            if tried.within(args.ttft_ms, args.tpot_ms) >= args.target:
                high, served = middle, tried
            else:
                low = middle
        return high, served

    def _is_enough(self, served: Served) -> bool:
        return served.within(self._args.ttft_ms, self._args.tpot_ms) >= self._args.target

    def row(self, asked: Question) -> dict[str, Any]:
        """Return the answer to a question."""
        args, (replicas, served) = self._args, self.fewest(asked)
        size, rate = len(served.replicas), self.rate(asked.users)
        tokens = rate * float(np.mean(self._trace.output_lens)) * 3600
        held = min(
            self._machine.host_adapters, asked.users if asked.policy == "round-robin" else asked.users / replicas
        )
        each = self._costs.adapter_bytes / served.seconds / size
        return {
            **dataclasses.asdict(asked),
            "requests_per_s": round(rate, 3),
            "replicas": replicas,
            "simulated_replicas": size,
            "users_per_replica": round(asked.users / replicas),
            "within_bounds": round(served.within(args.ttft_ms, args.tpot_ms), 4),
            "mean_ttft_ms": round(float(served.ttft_ms.mean()), 1),
            "p99_ttft_ms": round(float(np.percentile(served.ttft_ms, 99)), 1),
            "mean_tpot_ms": round(float(served.tpot_ms.mean()), 2),
            "p99_tpot_ms": round(float(np.percentile(served.tpot_ms, 99)), 2),
            "host_hit_rate": round(1 - served.host_misses / served.offered, 4),
            "host_memory_gib": round(replicas * held * self._costs.adapter_bytes / 2**30, 1),
            "network_gbit_per_replica": round(8e-9 * served.host_misses * each, 3),
            "pcie_gb_per_s": round(1e-9 * served.device_loads * each, 3),
            "usd_per_million_output_tokens": round(1e6 * replicas * args.gpu_hour_usd / tokens, 3),
        }


def compared(trace: Path, costs: Costs, seed: int) -> list[dict[str, Any]]:
    """Return what one replica does with each measured run of the same trace, beside the measurement."""
    rows = []
    for name in ("h200-trace", "h200-trace-adapters"):
        figures = json.loads((RESULTS / f"{name}.json").read_text())
        options = figures["options"]
        part = read_trace(trace, minutes=options["minutes"])
        if digest_of(part) != figures["trace"]["digest"]:
            continue
        rng, count = np.random.default_rng(seed), options["num_adapters"]
        rate = len(part.arrivals) / part.arrivals[-1] * figures["speedup"]
        load = cell_load(part, rate, part.arrivals[-1] / figures["speedup"], count, 1.0, rng)
        machine = Machine(host_adapters=count, fetch_ms=0.0, bank_adapters=options["bank_adapters"])
        for measured in figures["rows"]:
            served = simulate(load, 1, measured["mode"], RoundRobin(), machine, costs)
            seconds = max(flight.last for flight in served.flights) / 1e3
            busy = sum(time for kind, time in served.replicas[0].spent.items() if kind != "idle") / 1e3
            pairs = {
                "request_throughput": (len(served.flights) / seconds, measured["request_throughput"]),
                "device_seconds": (
                    busy, measured["prefill_seconds"] + measured["decode_seconds"] + measured["mixed_seconds"]
                ),
                "mean_tpot_ms": (float(served.tpot_ms.mean()), measured["mean_tpot_ms"]),
                "mean_ttft_ms": (float(served.ttft_ms.mean()), measured["mean_ttft_ms"]),
            }  # fmt: skip
            told = {what: {"model": round(ours, 3), "measured": theirs} for what, (ours, theirs) in pairs.items()}
            rows.append({"run": name, "mode": measured["mode"], **told})
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures that a command line asks for."""
    for name in (
        "requests_per_hour", "host_memory_gib", "network_gbit", "gpu_hour_usd", "ttft_ms", "tpot_ms", "seconds", "cell",
    ):  # fmt: skip
        if not 0 < getattr(args, name) < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give a number above 0")
    if not 0 < args.target < 1 or not args.alpha >= 0:
        raise ConfigError(f"--target is {args.target} and --alpha {args.alpha}; give a part below 1, and 0 or more")
    kinds, policies = (text.split(",") for text in (args.kinds, args.policies))
    for what, names, allowed in (("kinds", kinds, KINDS), ("policies", policies, tuple(POLICIES))):
        if strange := set(names) - set(allowed):
            raise ConfigError(f"--{what} has {', '.join(sorted(strange))}; allowed: {', '.join(allowed)}")
    try:
        users = [int(text) for text in args.users.split(",")]
    except ValueError:
        raise ConfigError(f"--users is {args.users!r}; give whole numbers with commas") from None
    if min(users) < 1:
        raise ConfigError(f"--users has {min(users)}; give at least 1")
    costs, trace = Costs.measured(), read_trace(args.trace)
    answers, rows = Answers(args, trace, costs), []
    for asked in [Question(users=n, kind=kind, policy=one) for one in policies for kind in kinds for n in users]:
        rows.append(answers.row(asked))
        print(f"{asked.users:>9,} users, {asked.kind}, {asked.policy}: {rows[-1]['replicas']}", file=sys.stderr)
    free = ("trace", "output_json")
    return {
        "schema": "preft-jax/capacity/1",
        "options": {name: value for name, value in vars(args).items() if name not in free},
        "trace": {"digest": digest_of(trace), "requests": len(trace.arrivals)},
        "costs": dataclasses.asdict(costs),
        "compared": compared(args.trace, costs, args.seed),
        "rows": rows,
        **environment(),
    }


def print_table(figures: dict[str, Any], console: Console) -> None:
    """Print what people look at."""
    table = Table(title="replicas for users, each with an adapter of their own")
    names = {
        "users": "users", "kind": "adapters", "policy": "routing", "replicas": "replicas", "host_hit_rate": "host hits",
        "network_gbit_per_replica": "network, Gbit/s", "p99_ttft_ms": "TTFT p99, ms", "p99_tpot_ms": "TPOT p99, ms",
        "usd_per_million_output_tokens": "$ / M output tokens",
    }  # fmt: skip
    for at, name in enumerate(names.values()):
        table.add_column(name, justify="left" if 0 < at < 3 else "right")
    for row in figures["rows"]:
        table.add_row(*(f"{row[name]:,}" if not isinstance(row[name], str) else row[name] for name in names))
    console.print(table)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.capacity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trace", type=Path, required=True, help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    add("--users", default="1000,10000,100000,1000000", help="with commas (default: %(default)s)")
    add("--kinds", default="prefill-only,all-token", help=f"of {', '.join(KINDS)} (default: %(default)s)")
    add("--policies", default=",".join(POLICIES), help="of routing (default: %(default)s)")
    add("--requests-per-hour", type=float, default=2.0, help="of a user (default: %(default)s)")
    add("--alpha", type=float, default=0.0, help="Zipf's exponent of users' shares (default: 0, all alike)")
    add("--host-memory-gib", type=float, default=256.0, help="for adapters, of a replica (default: %(default)s)")
    add("--network-gbit", type=float, default=25.0, help="of a replica's link to the store (default: %(default)s)")
    add("--gpu-hour-usd", type=float, default=3.0, help="price of a GPU for an hour (default: %(default)s)")
    add("--ttft-ms", type=float, default=2000.0, help="bound (default: %(default)s)")
    add("--tpot-ms", type=float, default=50.0, help="bound (default: %(default)s)")
    add("--target", type=float, default=0.99, help="part of requests that keep both (default: %(default)s)")
    add("--cell", type=int, default=4, help="replicas that are simulated at most (default: %(default)s)")
    add("--seconds", type=float, default=60.0, help="simulated (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the users' draws (default: %(default)s)")
    add("--output-json", type=Path, default=None, help="also write the JSON line here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    args = make_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    try:
        figures = run(args)
        print_table(figures, Console(width=140))
        emit(figures, args.output_json)
    except (PreftError, OSError) as error:
        print(f"bench.capacity: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
