"""``python -m bench.background``: other device work beside requests, and what it costs them.

Units of work are chains of matrix products that take as many milliseconds as ``--units`` says; each multiplies by the
base's own weights' dtype and leaves the weights alone. For each size, through the engine's own thread as the server
runs it:

- *idle*: nothing is asked for. The share of the device is the units that were done times what one takes alone.
- *a request*: comes while units run and nothing else does. Its time to the first token, beside that without work.
- *decoding*: ``--rows`` requests decode together. The longest gaps between their tokens, beside those without work,
  and whether calls were still started while the one before them was under way.

A table for people, then one JSON line.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from preft_jax.cli import hyphenated
from preft_jax.errors import ConfigError, PreftError
from preft_jax.loading import load_model, serving_model
from preft_jax.sampling.parameters import SamplingParams
from preft_jax.text.chat import EncodedPrompt
from serve.bench.environment import environment
from serve.bench.output import emit
from serve.engine.async_engine import AsyncEngine
from serve.engine.background import Unit
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.observer import Observer
from serve.engine.request import Request

SCHEMA = "preft-jax/background/1"


class Products:
    """Work of an engine: a chain of matrix products, again and again while ``active``."""

    def __init__(self, size: int, dtype: Any, milliseconds: float):
        self.square = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32) / size**0.5, dtype)
        self.run = jax.jit(lambda x, count: jax.lax.fori_loop(0, count, lambda _, y: jnp.dot(x, y), x))
        self.count = 1
        while (seconds := self.alone()) < milliseconds / 1e3:  # Powers of two until it is long enough, then in parts.
            self.count *= 2
        self.count = max(1, round(self.count * milliseconds / 1e3 / seconds))
        self.seconds = self.alone()
        self.active = False
        self.times: list[float] = []
        self.error: Exception | None = None

    def alone(self, repeats: int = 20) -> float:
        """Return what a unit takes, one behind the other."""
        jax.block_until_ready(self.run(self.square, self.count))
        start = time.perf_counter()
        jax.block_until_ready([self.run(self.square, self.count) for _ in range(repeats)])
        return (time.perf_counter() - start) / repeats

    def next(self) -> Unit | None:
        """Return a unit, or None while not active."""
        if not self.active or self.error is not None:
            return None
        return Unit(start=lambda base: self.run(self.square, self.count), seconds=self.seconds)

    def done(self, unit: Unit, seconds: float) -> None:
        """Note what a unit took."""
        self.times.append(seconds)

    def failed(self, unit: Unit, error: Exception) -> None:
        """Stop for good."""
        self.error = error


class Ahead(Observer):
    """Counts decode calls, and those that started while another call was under way."""

    def __init__(self) -> None:
        self.calls = self.ahead = 0

    def started(self, step: Any, under_way: Any) -> None:
        """See ``Observer``."""
        if step.kind == "decode":
            self.calls += 1
            self.ahead += bool(under_way)


class Server:
    """An engine in its thread, and requests to it."""

    def __init__(self, engine: Engine, args: argparse.Namespace):
        self.engine = AsyncEngine(engine)
        self._rng = np.random.default_rng(1)
        self._vocab_size = engine.model.config.vocab_size
        self._args = args

    async def start(self) -> None:
        """Start the thread and wait until it takes requests."""
        await self.engine.start()
        while not self.engine.ready:
            if self.engine.failure:
                raise PreftError(self.engine.failure)
            await asyncio.sleep(0.05)

    async def times(self, max_tokens: int) -> list[float]:
        """Serve a request; return the seconds after which each of its outputs came."""
        prompt = EncodedPrompt(self._rng.integers(0, self._vocab_size, self._args.input_len).tolist(), ())
        sampling = SamplingParams(temperature=0.0, ignore_eos=True)
        start, found = time.perf_counter(), []
        async for output in self.engine.generate(Request(prompt=prompt, sampling=sampling, max_tokens=max_tokens)):
            if output.token_ids:
                found.append(time.perf_counter() - start)
        return found

    async def first_tokens(self, count: int) -> list[float]:
        """Return the times to the first token of lone requests, a pause of changing length before each."""
        found = []
        for i in range(count):
            await asyncio.sleep(0.05 + 0.0037 * (i % 13))
            found.append((await self.times(1))[0])
        return found

    async def gaps(self, rows: int) -> tuple[np.ndarray, float]:
        """Decode so many requests together; return all gaps between outputs, without the first ones, and mean TPOT."""
        lengths = self._args.output_len
        every = await asyncio.gather(*(self.times(lengths) for _ in range(rows)))
        gaps = np.concatenate([np.diff(times)[2:] for times in every])
        return gaps, float(np.mean([(times[-1] - times[0]) / (lengths - 1) for times in every]))


async def measure(server: Server, work: Products, ahead: Ahead, args: argparse.Namespace) -> dict[str, Any]:
    """Return the row of one size of units."""
    await server.gaps(args.rows)  # Unmeasured.
    work.active = False
    plain_first = await server.first_tokens(args.requests)
    plain_gaps, plain_tpot = await server.gaps(args.rows)
    work.active = True
    await server.times(1)  # Wakes the thread, which asks for units from then on.
    await asyncio.sleep(0.2)
    before, start = len(work.times), time.perf_counter()
    await asyncio.sleep(args.idle_seconds)
    seconds = time.perf_counter() - start
    units = len(work.times) - before
    first = await server.first_tokens(args.requests)
    ahead.calls = ahead.ahead = 0
    before = len(work.times)
    gaps, tpot = await server.gaps(args.rows)
    beside = len(work.times) - before
    work.active = False
    if work.error is not None:
        raise PreftError(f"a unit failed: {work.error}")

    def ms(value: float) -> float:
        return round(1e3 * float(value), 3)

    return {
        "unit_ms": ms(work.seconds),
        "idle_share": round(units * work.seconds / seconds, 4),
        "ttft_ms": {"alone": ms(np.median(plain_first)), "median": ms(np.median(first)), "most": ms(max(first))},
        "tpot_ms": {"alone": ms(plain_tpot), "beside": ms(tpot)},
        "gap_ms": {
            name: {"alone": ms(np.percentile(plain_gaps, at)), "beside": ms(np.percentile(gaps, at))}
            for name, at in (("p50", 50), ("p99", 99), ("most", 100))
        },
        "units_beside": beside,
        "ahead": round(ahead.ahead / max(ahead.calls, 1), 3),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every size and return the figures that the JSON line holds."""
    units = [float(text) for text in args.units.split(",")]
    model = serving_model(load_model(args.model, dtype=args.dtype), args.rows)
    config = EngineConfig(
        max_num_seqs=args.rows,
        max_model_len=args.input_len + args.output_len,
        prefill_tokens=args.prefill_tokens,
        prefill_seqs=min(32, args.rows),
        decode_steps=args.decode_steps,
        prefix_caching=False,
        memory_utilization=0.9,
    )
    rows = []
    for milliseconds in units:
        work, ahead = Products(args.size, model.params["embed"].dtype, milliseconds), Ahead()
        engine = Engine(model, config, background=work, background_share=args.share, observer=ahead)
        server = Server(engine, args)

        async def both(server: Server = server, work: Products = work, ahead: Ahead = ahead) -> dict[str, Any]:
            await server.start()
            try:
                return await measure(server, work, ahead, args)
            finally:
                await server.engine.stop(5.0)

        rows.append(asyncio.run(both()))
        Console(stderr=True).print(str(rows[-1]), soft_wrap=True)
        engine.runner.release()
    options = {name: value for name, value in vars(args).items() if name != "output_json"}
    return {"schema": SCHEMA, "options": options, "rows": rows, **environment()}


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.background", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="llama3-8b", help="a shape preset (default: %(default)s)")
    add("--dtype", default=None, help="float32, bfloat16 or float16 (default: float32 on CPU, bfloat16 elsewhere)")
    add("--units", default="5,20", help="milliseconds of a unit, with commas (default: %(default)s)")
    add("--size", type=int, default=4096, help="rows of the square matrices of a unit (default: %(default)s)")
    add("--share", type=float, default=0.3, help="of the device that units get beside requests (default: %(default)s)")
    add("--rows", type=int, default=64, help="requests that decode together (default: %(default)s)")
    add("--requests", type=int, default=20, help="lone requests (default: %(default)s)")
    add("--input-len", type=int, default=256, help="tokens (default: %(default)s)")
    add("--output-len", type=int, default=256, help="tokens (default: %(default)s)")
    add("--prefill-tokens", type=int, default=4096, help="of a prefill call (default: %(default)s)")
    add("--decode-steps", type=int, default=1, help="of a decode call (default: %(default)s)")
    add("--idle-seconds", type=float, default=3.0, help="without requests (default: %(default)s)")
    add("--output-json", type=Path, default=None, help="also write the JSON line here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    args = make_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    try:
        for name in ("size", "rows", "requests", "input_len", "output_len", "decode_steps", "idle_seconds"):
            if getattr(args, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give more than 0")
        figures = run(args)
    except (PreftError, OSError) as error:
        print(f"bench.background: {error}", file=sys.stderr)
        return 1
    print_table(figures)
    emit(figures, args.output_json)
    return 0


def print_table(figures: dict[str, Any]) -> None:
    """Print a row for each size of units."""
    table = Table(title="Units of other work beside requests", title_justify="left")
    for column in ("unit, ms", "idle share", "TTFT, ms", "TPOT, ms", "p99 gap, ms", "ahead"):
        table.add_column(column, justify="right")
    for row in figures["rows"]:
        first, tpot, gap = row["ttft_ms"], row["tpot_ms"], row["gap_ms"]["p99"]
        table.add_row(
            f"{row['unit_ms']:.1f}",
            f"{row['idle_share']:.3f}",
            f"{first['alone']:.1f} -> {first['median']:.1f}, at most {first['most']:.1f}",
            f"{tpot['alone']:.2f} -> {tpot['beside']:.2f}",
            f"{gap['alone']:.1f} -> {gap['beside']:.1f}",
            f"{row['ahead']:.2f}",
        )
    Console(stderr=True).print(table)


if __name__ == "__main__":
    sys.exit(main())
