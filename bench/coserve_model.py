"""``python -m bench.coserve_model``: what other work gets beside requests by a pacing: a model.

The simulation of ``bench.trace_model`` with units of other work in the device's queue: the real scheduler, the real
``Background`` and the real policies. Requests are a trace's, or arrive by a Poisson process with random lengths. The
table says what part of the time units got, beside what they would get at most if each decode step came exactly when it
was promised, and what part of the requests kept their promise, beside serving alone. A model, not a measurement.
"""

import argparse
import collections
import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import numpy as np

from bench.trace_model import GPUS, NOW, Flight, Gpu, Variant, World
from preft_jax.cli import hyphenated
from preft_jax.errors import ConfigError
from serve.bench.datasets import read_trace
from serve.engine.background import Background, Unit, UnitCall
from serve.engine.pacing import Pacing, Promise, Share
from serve.engine.plan import Step
from serve.engine.sequence import Sequence
from serve.engine.under_way import UnderWay

Request = tuple[float, int, int]
"""Arrival in milliseconds, tokens of the prompt, tokens of the answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Timed(Unit):
    """A unit with its kind, and what it really takes."""

    kind: int
    takes: float


class Units:
    """Work whose units take what their name takes, and a bit more or less; expected is what was measured.

    Args:
        seconds: of each name; they come in turn, without an end.
        guess: what is expected before the first measurement, over what a unit takes.
        spread: standard deviation of the logarithm of a unit's time.
    """

    def __init__(self, seconds: Many[float], *, guess: float = 1.0, spread: float = 0.05, seed: int = 0):
        self._seconds = seconds
        self._expected = {name: guess * own for name, own in enumerate(seconds)}
        self._spread = spread
        self._rng = np.random.default_rng(seed)
        self._count = 0

    def next(self) -> Unit:
        """Return a unit."""
        name = self._count % len(self._seconds)
        self._count += 1
        takes = self._seconds[name] * math.exp(self._rng.normal(0.0, self._spread))
        return _Timed(start=lambda params: None, seconds=self._expected[name], kind=name, takes=takes)

    def done(self, unit: Unit, seconds: float) -> None:
        """Expect a bit more of what was measured."""
        assert isinstance(unit, _Timed)
        self._expected[unit.kind] += 0.25 * (seconds - self._expected[unit.kind])

    def failed(self, unit: Unit, error: Exception) -> None:
        """Raise: nothing fails here."""
        raise error


class SharedWorld(World):
    """The engine's loop with units behind its calls; times are milliseconds, as there.

    Attributes:
        unit_seconds: what units took that were over by the time ``until``.
        longest_gap: milliseconds of units between two calls, at most.
    """

    def __init__(self, variant: Variant, gpu: Gpu, work: Units | None, pacing: Pacing):
        super().__init__(variant, gpu)
        self.background = Background(work, pacing, lambda: self.now / 1e3)
        self.unit_seconds = 0.0
        self.until = 0.0
        self.longest_gap = self._between = 0.0
        # Units on the device, with what they take and when they end, and when each call begins.
        self._units: collections.deque[tuple[UnitCall, float, float]] = collections.deque()
        self._begins: collections.deque[float] = collections.deque()

    def turn(self) -> Many[tuple[Sequence, int]]:
        """See ``World``: as the engine goes, behind units the next step is started once tokens went out."""
        prepared, covered = None, self._covered()
        if not self.calls and self._go_on():
            self.now = max(self.now, self._units[0][2])
            self._end_units(self.now)
            return []
        if not self.calls and covered:
            self._schedule()
        elif len(self.calls) == 1 and self.variant.two and not covered:
            prepared = self._run_ahead()
        told = self._collect(prepared) if self.calls else []
        if not self.calls and not (told and self._covered()):
            self._schedule()
        return told

    def _schedule(self) -> None:
        step = self.planner.schedule(single=self._covered())
        if step is not None:
            self._start(step)

    def _covered(self) -> bool:
        last = self.calls[-1][1] if self.calls else 0.0
        return sum(call.unit.seconds for call, _, end in self._units if end > last) >= UnderWay.COVER

    def add(self, number: int, request: Request) -> None:
        """See ``World``."""
        super().add(number, request)
        self.background.arrived([self.flights[number].sequence])

    def wait_until(self, arrival: float) -> None:
        """See ``World``: units run meanwhile."""
        margin = 1e3 * Background.MARGIN
        while max(self.free, self.now) - margin < arrival:
            unit = self.background.idle(None)
            if unit is None:
                break
            self._start_unit(unit)
            self._end_units(self.free)
            self.now = max(self.now, self.free - margin)
        self.now = max(self.now, arrival)

    def _start(self, step: Step, prepared: bool = False) -> None:
        self._between = 0.0
        self._begins.append(max(self.now, self.free))
        super()._start(step, prepared)
        self._open()
        while not self._covered() and (unit := self.background.beside()) is not None:
            self._start_unit(unit)

    def _go_on(self) -> bool:
        """Start units behind others, as ``UnderWay`` does it."""
        if not self._units:
            return False
        if not self._hides_host():
            self._open()
            while len(self._units) <= UnderWay.MOST and not self._hides_host():
                unit = self.background.beside()
                if unit is None:
                    return False
                self._start_unit(unit)
        return True

    def _hides_host(self) -> bool:
        return sum(call.unit.seconds for call, _, _ in list(self._units)[1:]) >= UnderWay.COVER

    def _open(self) -> None:
        items = [(end, own) for own, end in self.calls] + [(end, call.unit) for call, _, end in self._units]
        queue = [own for _, own in sorted(items, key=lambda item: item[0])]
        first = min([*list(self._begins)[:1], *(end - takes for _, takes, end in self._units)])
        self.background.opened(queue, first / 1e3, self.planner)

    def _start_unit(self, unit: Unit) -> None:
        assert isinstance(unit, _Timed)
        takes = 1e3 * unit.takes
        self.free = self._dispatch() + takes
        self.ends.append(self.free)
        self.unit_seconds += unit.takes * (self.free <= self.until)
        if self.flights:
            self._between += takes
            self.longest_gap = max(self.longest_gap, self._between)
        self._units.append((UnitCall(unit=unit, arrays=None, started=self.now / 1e3), takes, self.free))

    def _end_units(self, end: float) -> None:
        while self._units and self._units[0][2] <= end:
            call, takes, _ = self._units.popleft()
            self.background.done(call, takes / 1e3)

    def _collect(self, prepared: Step | None) -> list[tuple[Any, int]]:
        step, end = self.calls[0]
        begin = self._begins.popleft()
        self._end_units(begin)
        told = super()._collect(prepared)
        self.background.collected(step, (end - begin) / 1e3)
        return told


def poisson(rate: float, seconds: float, prompt: float, output: float, seed: int = 0) -> list[Request]:
    """Return requests that arrive by a Poisson process, with lognormal lengths of these means."""
    rng = np.random.default_rng(seed)
    count = rng.poisson(rate * seconds)
    arrivals = np.sort(rng.uniform(0, seconds * 1e3, count))
    prompts, outputs = (
        np.clip(mean * rng.lognormal(-0.32, 0.8, count), 1, 8 * mean).astype(int) for mean in (prompt, output)
    )
    return [(float(a), int(p), int(o)) for a, p, o in zip(arrivals, prompts, outputs, strict=True)]


def kept(flights: Iterable[Flight], tpot_ms: float, ttft_ms: float) -> float:
    """Return the part of requests whose first token came in time, and the others in the mean."""
    good = []
    for flight in flights:
        tpot = (flight.last - flight.first) / max(1, flight.sequence.generated - 1)
        good.append(flight.first - flight.arrival <= ttft_ms and tpot <= tpot_ms)
    return sum(good) / len(good)


def most(world: SharedWorld, flights: Iterable[Flight], tpot_ms: float) -> float:
    """Return the seconds that are left until the last arrival if all decode steps come when they are promised."""
    spans = sorted((one.first, min(world.until, one.first + one.sequence.generated * tpot_ms)) for one in flights)
    busy, until = 0.0, 0.0
    for first, last in spans:
        busy += max(0.0, last - max(first, until))
        until = max(until, last)
    step = world.spent["decode"] / max(1, world.counts["decode programs"])
    return (world.until - world.spent["prefill"] - world.spent["mixed"] - busy / tpot_ms * step) / 1e3


def serve(
    requests: Many[Request], pacing: Pacing, work: Units | None, *, gpu: Gpu = GPUS["h200"], variant: Variant = NOW
) -> tuple[SharedWorld, list[Flight]]:
    """Serve requests beside work, and return the world at the end and how each request fared."""
    world = SharedWorld(variant, gpu, work, pacing)
    world.until = max(request[0] for request in requests)
    return world, world.run(requests)


def make_pacing(text: str, args: argparse.Namespace) -> Pacing:
    """Return the pacing of a name: ``promise``, ``promise+0.1`` (a slowdown) or a share such as ``0.3``."""
    name, _, slowdown = text.partition("+")
    try:
        if name != "promise":
            return Share(float(name))
        return Promise(
            tpot_ms=args.tpot_ms, ttft_ms=args.ttft_ms, percentile=args.percentile,
            slowdown=float(slowdown) if slowdown else None,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"--policies has {text!r}; give promise, promise+SLOWDOWN or a share: {error}") from error


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.coserve_model", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--trace", type=Path, default=None, help="CSV file (default: Poisson arrivals)")
    add("--rates", default="1,3,5,8", help="requests per second, with commas (default: %(default)s)")
    add("--seconds", type=float, default=120.0, help="of arrivals (default: %(default)s)")
    add("--prompt-tokens", type=float, default=1000.0, help="mean without a trace (default: %(default)s)")
    add("--output-tokens", type=float, default=250.0, help="mean without a trace (default: %(default)s)")
    add("--policies", default="promise,0.3", help="promise, promise+SLOWDOWN, shares (default: %(default)s)")
    add("--unit-ms", default="10,20", help="what units take, in turn (default: %(default)s)")
    add("--guess", type=float, default=1.0, help="first estimate over what units take (default: %(default)s)")
    add("--tpot-ms", type=float, default=45.0, help="(default: %(default)s)")
    add("--ttft-ms", type=float, default=5000.0, help="(default: %(default)s)")
    add("--percentile", type=float, default=0.97, help="(default: %(default)s)")
    add("--decode-steps", type=int, default=8, help="(default: %(default)s)")
    add("--gpu", default="h200", choices=sorted(GPUS))
    return parser


def requests_of(args: argparse.Namespace, rate: float) -> list[Request]:
    """Return the requests of a run at a rate."""
    if args.trace is None:
        return poisson(rate, args.seconds, args.prompt_tokens, args.output_tokens)
    trace = read_trace(args.trace, minutes=60.0, limit=int(rate * args.seconds))
    scale = 1e3 * (len(trace.arrivals) - 1) / trace.arrivals[-1] / rate
    return [(a * scale, p, o) for a, p, o in zip(*dataclasses.astuple(trace), strict=True)]


def main(argv: Many[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    args = make_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    rows = list[dict[str, Any]]()
    variant = dataclasses.replace(NOW, decode_steps=args.decode_steps)
    print(
        f"{'policy':14} {'req/s':>6} {'units':>7} {'of most':>8} {'kept':>7} {'alone':>7} {'TPOT p97':>9} {'gap ms':>7}"
    )
    for rate in map(float, args.rates.split(",")):
        requests = requests_of(args, rate)
        alone, flights = serve(requests, Share(0.0), None, gpu=GPUS[args.gpu], variant=variant)
        bound = most(alone, flights, args.tpot_ms)
        before = kept(flights, args.tpot_ms, args.ttft_ms)
        for name in args.policies.split(","):
            units = Units([float(ms) / 1e3 for ms in args.unit_ms.split(",")], guess=args.guess)
            world, flights = serve(requests, make_pacing(name, args), units, gpu=GPUS[args.gpu], variant=variant)
            tpots = [(f.last - f.first) / max(1, f.sequence.generated - 1) for f in flights]
            row = {
                "policy": name, "requests_per_s": rate, "units": 1e3 * world.unit_seconds / world.until,
                "of_most": world.unit_seconds / bound, "kept": kept(flights, args.tpot_ms, args.ttft_ms),
                "kept_alone": before, "p97_tpot_ms": float(np.percentile(tpots, 97)), "gap_ms": world.longest_gap,
            }  # fmt: skip
            rows.append(row)
            print(
                f"{name:14} {rate:6.1f} {row['units']:7.3f} {row['of_most']:8.3f} {row['kept']:7.3f} {before:7.3f} "
                f"{row['p97_tpot_ms']:9.1f} {row['gap_ms']:7.1f}",
                flush=True,
            )
    print(json.dumps({"gpu": args.gpu, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
