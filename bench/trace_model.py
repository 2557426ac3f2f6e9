"""``python -m bench.trace_model TRACE.csv``: the engine's own scheduler on a trace, with a model of the device's times.

A discrete-event simulation. The planner is the real one (``Scheduler``, ``PageManager``, ``lookahead``), driven as
``Engine.step`` drives it: two calls under way at most, and a third that is prepared. Host and device have virtual
clocks. What a call takes on the device comes from ``Gpu``: matrix products by the program's padded size, KV by its
bytes. Nothing runs on an accelerator; the base model alone is served, so that adapters always find room.

``--variants`` names what is compared: ``now``, ``now`` with one cause of delay switched off, and policies with mixed
calls. Each is served at ``--rates`` (``--rates inf --limit 1000`` is how bench.trace measures capacity). A model to
find causes with, not a measurement: it knows no thermal limits, and each host time in ``Host`` is an assumption.
"""

import argparse
import collections
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import numpy as np

from serve.bench.datasets import Trace, read_trace
from serve.engine.lookahead import ahead, full_prefill
from serve.engine.packing import READS_WEIGHTS, worth_filling
from serve.engine.pages import PageManager
from serve.engine.plan import Step
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Sequence, Status
from serve.engine.slots import AdapterSlots

KV_BYTES = 131072
"""Of a token: ``llama3-8b`` in bfloat16."""

ATTENTION_FLOPS = 524288
"""Of a pair of query and key, over all layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """Times of ``llama3-8b`` in bfloat16 on one GPU, in milliseconds: fitted to docs/performance.md.

    Attributes:
        products: of the layers' matrix products, by tokens, between which is interpolated.
        slope: of the products of each further token.
        head: of the last product.
        token: of norms, activation and rotation, a token.
        gap: between kernels and around a call, drawing included.
        kv_rate: bytes of the KV cache that attention reads in a millisecond.
        attention_rate: FLOPs of attention over prompts in a millisecond.
        num_pages: of the KV cache.
    """

    products: tuple[tuple[int, float], ...]
    slope: float
    head: float
    token: float = 0.0019
    gap: float = 1.0
    kv_rate: float
    attention_rate: float = 3.5e11
    num_pages: int

    def call(self, tokens: int, pairs: float, held: int) -> float:
        """Return what a call takes: of a program's tokens, with pairs of prompt tokens, and rows that hold KV."""
        sizes, times = zip(*self.products, strict=True)
        products = float(np.interp(tokens, sizes, times)) + max(0, tokens - sizes[-1]) * self.slope
        attention = pairs * ATTENTION_FLOPS / self.attention_rate + held * KV_BYTES / self.kv_rate
        return products + self.head + tokens * self.token + attention + self.gap


GPUS = {
    "h100": Gpu(
        products=((64, 5.02), (128, 5.2), (256, 6.4), (512, 10.0)), slope=0.0206, head=0.39, kv_rate=2.0e9,
        num_pages=6710,
    ),
    "h200": Gpu(
        products=((64, 4.6), (128, 4.8), (256, 6.5), (512, 10.3)), slope=0.019, head=0.33, kv_rate=3.65e9,
        attention_rate=5.0e11, num_pages=13000,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """Assumed times of the host, in milliseconds; ``queue`` programs at most wait on the device."""

    add: float = 0.15
    prefill: float = 1.5
    decode: float = 0.4
    dispatch: float = 0.6
    fetch: float = 0.2
    token: float = 0.005
    queue: int = 3


NO_HOST = Host(add=0, prefill=0, decode=0, dispatch=0, fetch=0, token=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """An engine's sizes and policy.

    Attributes:
        prefill_sizes: tokens of the prefill programs, ascending.
        row_counts: rows of the decode programs, ascending.
        mixed_sizes: tokens of the programs in which rows ride beside chunks; none: they have calls of their own.
        apart: rows stand behind a mixed program's tokens, in whole tiles of a row count, instead of among them.
        fill: trim prompts so that a smaller program is full; otherwise the smallest program takes all.
        step_ms: of the mixed programs only those that the model says take no longer; the smallest always.
        decode_steps: as the engine's.
        two: calls may be under way behind one another.
        exact_tokens, exact_rows: calls cost what they hold, not what their programs hold.
    """

    max_num_seqs: int = 256
    prefill_sizes: tuple[int, ...] = (1024, 4096, 8192)
    row_counts: tuple[int, ...] = (64, 256)
    mixed_sizes: tuple[int, ...] = ()
    apart: bool = False
    fill: bool = True
    step_ms: float = math.inf
    decode_steps: int = 8
    two: bool = True
    exact_tokens: bool = False
    exact_rows: bool = False
    chunk_tokens: int = 2048
    host: Host = Host()


class _Room:
    """Adapters that always find room."""

    def acquire(self, digest: str) -> bool:
        return True

    def release(self, digest: str) -> None:
        pass

    def is_near(self, digest: str) -> bool:
        return True


class Planner(Scheduler):
    """The engine's scheduler, with what variants change."""

    def __init__(self, variant: Variant, gpu: Gpu, adapters: AdapterSlots):
        self.variant, self.gpu = variant, gpu
        largest = variant.prefill_sizes[-1]
        filled = worth_filling(variant.prefill_sizes, READS_WEIGHTS)
        super().__init__(
            PageManager(gpu.num_pages, 64), adapters, max_num_seqs=variant.max_num_seqs, prefill_tokens=largest,
            prefill_seqs=32, chunk_tokens=min(variant.chunk_tokens, largest), tile=64, tile_entries=1,
            decode_steps=variant.decode_steps, goes_ahead=variant.two,
            prefill_sizes=filled if variant.fill else (largest,),
        )  # fmt: skip
        self._sizes = self._prefill_sizes, self._prefill_tokens

    def schedule(self, *, single: bool = False) -> Step | None:
        """See ``Scheduler``; mixed steps come first."""
        return self.mixed_step() or super().schedule(single=single)

    def mixed_step(self) -> Step | None:
        """Return a step of chunks in which all rows ride that may draw more; None if no prompt finds room."""
        rows = [s for s in self._running if s.undrawn > 0]
        if not self.variant.mixed_sizes or not rows or not (self._prefilling or self.may_admit()):
            return None
        beside = 0 if self.variant.apart else -(-len(rows) // 64) * 64
        sizes = [size - beside for size in self.variant.mixed_sizes if size > beside]
        held = sum(len(s.tokens) for s in rows)
        count = beside or _program(self.variant.row_counts, len(rows))
        quick = [size for size in sizes if self.gpu.call(size + count, 0.0, held) <= self.variant.step_ms]
        sizes = quick or sizes[:1]
        if not sizes:
            return None
        self._prefill_tokens, self._prefill_sizes = sizes[-1], sizes if self.variant.fill else sizes[-1:]
        try:
            step = self.plan_prefill()
        finally:
            self._prefill_sizes, self._prefill_tokens = self._sizes
        if step is None:
            return None
        ends = {chunk.sequence for chunk in step.chunks if chunk.samples}
        decoding = self.plan_rows([s for s in rows if s in self._running and s not in ends], 1)
        return step if decoding is None else dataclasses.replace(step, rows=decoding.rows)

    def step_ahead(self, under_way: Step) -> Step | None:
        """Return the step behind one under way: the engine's, or with mixed ones."""
        if not self.variant.mixed_sizes:
            return ahead(self, under_way)
        step = self.mixed_step()
        if step is not None or not self.running:
            return step or self.plan_prefill()
        if not under_way.chunks:
            return ahead(self, under_way)
        return self.plan_rows(self.running, 1 if self.may_admit() else self.repeats_for([2**31]))


@dataclasses.dataclass
class Flight:
    """A request on its way: when it came, and when its first and last tokens did; -1: not yet."""

    sequence: Sequence
    arrival: float
    first: float = -1.0
    last: float = -1.0


class World:
    """The engine's loop with virtual clocks; milliseconds."""

    def __init__(self, variant: Variant, gpu: Gpu, adapters: AdapterSlots | None = None):
        self.variant, self.gpu, self.host = variant, gpu, variant.host
        self.planner = Planner(variant, gpu, adapters or _Room())
        self.now = self.free = 0.0
        self.ends: collections.deque[float] = collections.deque()
        self.calls: collections.deque[tuple[Step, float]] = collections.deque()
        self.flights: dict[int, Flight] = {}
        self.spent: dict[str, float] = collections.defaultdict(float)
        self.counts: dict[str, int] = collections.defaultdict(int)

    def run(self, requests: Many[tuple[float, int, int]]) -> list[Flight]:
        """Serve requests ``(arrival, prompt tokens, output tokens)`` and return when each had its tokens."""
        waiting, done = collections.deque(enumerate(requests)), []
        while waiting or self.flights:
            for _ in range(64):
                if not waiting or waiting[0][1][0] > self.now:
                    break
                self.add(*waiting.popleft())
            if not self.flights:
                self.wait_until(waiting[0][1][0])
                continue
            done += self.tell(self.turn())
        return done

    def turn(self) -> Many[tuple[Sequence, int]]:
        """Go on by one step of the engine; return the tokens that it gave."""
        prepared = self._run_ahead() if len(self.calls) == 1 and self.variant.two else None
        told = self._collect(prepared) if self.calls else []
        if not self.calls and (step := self.planner.schedule()):
            self._start(step)
        return told

    def tell(self, told: Many[tuple[Sequence, int]]) -> list[Flight]:
        """Send tokens out; return those that have all."""
        done = []
        self.now += self.host.token * sum(count for _, count in told)
        for sequence, _ in told:
            flight = self.flights[sequence.request_id]
            flight.first, flight.last = (self.now if flight.first < 0 else flight.first), self.now
            if sequence.status is Status.FINISHED:
                done.append(self.flights.pop(sequence.request_id))
        return done

    def wait_until(self, arrival: float) -> None:
        """Let the time pass until the next request comes, while there is none."""
        self.now = arrival

    def _run_ahead(self) -> Step | None:
        """Start what goes behind the call under way; return a third call, if one is prepared."""
        under_way = self.calls[0][0]
        step, full = self.planner.step_ahead(under_way), None
        if under_way.chunks and not self.variant.mixed_sizes:
            full = full_prefill(self.planner)
        first, prepared = (step, full) if step is not None else (full, None)
        if first is not None:
            self.now += 0.0 if prepared is None else self.host.prefill
            self._start(first)
        return prepared

    def add(self, number: int, request: tuple[float, int, int]) -> None:
        """Take a request."""
        sequence = self.sequence(number, request)
        self.flights[number] = Flight(sequence, request[0])
        self.planner.add(sequence)
        self.now += self.host.add

    def sequence(self, number: int, request: tuple[float, int, int]) -> Sequence:
        """Return what the scheduler takes for a request."""
        _, prompt, output = request
        return Sequence(
            request_id=number,
            order=number,
            tokens=[0] * prompt,
            prompt_len=prompt,
            mask=np.zeros((0, 1), bool),
            max_tokens=output,
        )

    def _start(self, step: Step, prepared: bool = False) -> None:
        self.now += (not prepared) * (self.host.prefill if step.chunks else self.host.decode)
        kind = "mixed" if step.chunks and step.rows else "prefill" if step.chunks else "decode"
        for repeat in range(step.repeats):
            begin = self._dispatch()
            self.spent["idle"] += begin - self.free
            self.free = begin + self.call_ms(step, repeat)
            self.spent[kind] += self.free - begin
            self.counts[f"{kind} programs"] += 1
            self.ends.append(self.free)
        self.calls.append((step, self.free))

    def _dispatch(self) -> float:
        """Let the host start a program, once the device's queue has room; return when the device begins with it."""
        self.now += self.host.dispatch
        while self.ends and self.ends[0] <= self.now:
            self.ends.popleft()
        if len(self.ends) >= self.host.queue:
            self.now = max(self.now, self.ends[len(self.ends) - self.host.queue])
        return max(self.now, self.free)

    def call_ms(self, step: Step, repeat: int) -> float:
        """Return what one repeat of a step takes on the device."""
        variant, count = self.variant, len(step.rows)
        pairs = sum((chunk.end**2 - chunk.start**2) / 2 for chunk in step.chunks)
        held = sum(len(row.sequence.tokens) + repeat for row in step.rows)
        rows = 0 if not count else count if variant.exact_rows else _program(variant.row_counts, count)
        if not step.chunks:
            return self.gpu.call(rows, 0.0, held)
        tokens = sum(chunk.end - chunk.start for chunk in step.chunks) if variant.exact_tokens else step.num_tokens
        self.counts["prompt tokens"] += sum(chunk.end - chunk.start for chunk in step.chunks)
        if not count:
            tokens = tokens if variant.exact_tokens else _program(variant.prefill_sizes, tokens)
        elif variant.exact_tokens:
            tokens += count
        elif variant.apart:
            tokens = rows + _program(variant.mixed_sizes, tokens)
        else:
            tokens = _program(variant.mixed_sizes, tokens + count)
        self.counts["program tokens"] += tokens
        return self.gpu.call(tokens, pairs, held)

    def _collect(self, prepared: Step | None) -> list[tuple[Sequence, int]]:
        step, end = self.calls.popleft()
        self.now = max(self.now, end) + self.host.fetch
        if prepared is not None:
            self._start(prepared, prepared=True)
        self.planner.computed(step)
        told, draws = [], {row.sequence: row.draws for row in step.rows}
        for sequence in step.sampled:
            count = min(draws.get(sequence, 1), sequence.remaining)
            if sequence.status is not Status.RUNNING or count == 0:
                continue
            self.planner.append(sequence, [0] * count)
            told.append((sequence, count))
            if not sequence.remaining:
                self.planner.finish(sequence)
        return told


def _program(sizes: Many[int], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)


NOW = Variant()
FINE = Variant(prefill_sizes=(256, 512, 1024, 2048, 4096), row_counts=(64, 128, 256), decode_steps=2)
MIXED = dataclasses.replace(FINE, mixed_sizes=(256, 512, 768, 1024), step_ms=28.0)
APART = dataclasses.replace(FINE, mixed_sizes=(256, 512, 1024), apart=True)
VARIANTS = {
    "now": NOW,
    "now-2048": Variant(prefill_sizes=(256, 1024, 2048)),
    "prefill-exact": dataclasses.replace(NOW, exact_tokens=True, prefill_sizes=(8192,), fill=False),
    "rows-exact": dataclasses.replace(NOW, exact_rows=True),
    "rows-64-128-256": dataclasses.replace(NOW, row_counts=(64, 128, 256)),
    "decode-steps-2": dataclasses.replace(NOW, decode_steps=2),
    "no-host": dataclasses.replace(NOW, host=NO_HOST),
    "one-call": dataclasses.replace(NOW, two=False, host=NO_HOST),
    "all-off": Variant(
        exact_tokens=True, prefill_sizes=(8192,), fill=False, exact_rows=True, host=NO_HOST, two=False, decode_steps=1
    ),
    "fine": FINE,
    "mixed": MIXED,
    "mixed-512": dataclasses.replace(MIXED, mixed_sizes=(512,)),
    "mixed-three": dataclasses.replace(MIXED, mixed_sizes=(256, 512, 1024), step_ms=math.inf),
    "apart": APART,
    "apart-rows-64-256": dataclasses.replace(APART, row_counts=(64, 256)),
}  # fmt: skip


def serve(variant: Variant, gpu: Gpu, trace: Trace, speedup: float, bounds: tuple[float, float]) -> dict[str, Any]:
    """Return the figures of a trace at a multiple of its own speed; infinity offers all at once."""
    world = World(variant, gpu)
    scale = 0.0 if speedup == math.inf else 1e3 / speedup
    done = world.run([(a * scale, p, o) for a, p, o in zip(*dataclasses.astuple(trace), strict=True)])
    ttft = [flight.first - flight.arrival for flight in done]
    tpot = [(f.last - f.first) / max(1, f.sequence.generated - 1) for f in done]
    seconds = world.now / 1e3
    good = sum(a <= bounds[0] and b <= bounds[1] for a, b in zip(ttft, tpot, strict=True)) / len(done)
    return {
        "requests_per_s": len(done) / seconds,
        "ttft_ms": statistics.mean(ttft),
        "ttft_p50_ms": statistics.median(ttft),
        "ttft_p99_ms": float(np.percentile(ttft, 99)),
        "tpot_ms": statistics.mean(tpot),
        "tpot_p50_ms": statistics.median(tpot),
        "tpot_p99_ms": float(np.percentile(tpot, 99)),
        "good": good,
        "device_s": {name: round(value / 1e3, 2) for name, value in world.spent.items()},
        "counts": dict(world.counts),
    }


def main(argv: Many[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.trace_model", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("trace", type=Path, help="CSV file")
    parser.add_argument("--gpu", default="h200", choices=sorted(GPUS))
    parser.add_argument("--rates", default="16.6", help="requests per second, with commas; inf: all at once")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--ttft-ms", type=float, default=2000.0)
    parser.add_argument("--tpot-ms", type=float, default=30.0)
    args = parser.parse_args(argv)
    trace = read_trace(args.trace, minutes=args.minutes, limit=args.limit)
    recorded, rows = (len(trace.arrivals) - 1) / trace.arrivals[-1], list[dict[str, Any]]()
    print(f"{'variant':24} {'req/s':>6} {'TTFT (p99), ms':>15} {'TPOT (p99), ms':>15} {'good':>6} {'served/s':>8}")
    for offered, name in [(float(rate), name) for rate in args.rates.split(",") for name in args.variants.split(",")]:
        got = serve(VARIANTS[name], GPUS[args.gpu], trace, offered / recorded, (args.ttft_ms, args.tpot_ms))
        rows.append({"variant": name, "offered_per_s": offered if offered < math.inf else None, **got})
        times = [f"{got[one + '_ms']:7.{n}f} ({got[one + '_p99_ms']:5.{n}f})" for one, n in (("ttft", 0), ("tpot", 1))]
        print(f"{name:24} {offered:6.1f} {' '.join(times)} {got['good']:6.3f} {got['requests_per_s']:8.2f}", flush=True)
    print(json.dumps({"gpu": args.gpu, "requests": len(trace.arrivals), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
