"""``python -m bench.decode``: a decode step of the serving engine's program beside its floor, and where it goes.

Rows of random weights' tokens with a context of so many tokens each, in pages of their own, all at once; the steps of
a call are started one after the other, as the engine does it. The floor is the larger of FLOPs over the measured
matrix product rate and bytes over the measured copy bandwidth, summed over the matrix products of a layer, attention
and the head, nothing overlapped. With ``--mesh`` the devices share both equally; what they tell each other is not
counted. ``--profile`` adds the time of each kind of kernel, of the first device. A table for people, then one JSON
line.
"""

import argparse
import functools
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

from bench.kernel_profile import breakdown, check_profiling, print_kernels, profile
from bench.kernel_timing import Ceilings, dtype_of_products, measure_ceilings
from preft_jax.cli import add_kv_cache_dtype, add_mesh, add_quantization, hyphenated, quantization_of
from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError, PreftError
from preft_jax.loading import Model, load_model, serving_model
from preft_jax.models.cache import cache_axes, init_cache, pages_for
from preft_jax.sampling.arrays import sampling_arrays
from preft_jax.sampling.parameters import SamplingParams
from preft_jax.shapes import KV_DTYPES
from serve.bench.environment import environment
from serve.bench.output import emit
from serve.engine import programs as device
from serve.engine.spread import WHOLE, Spread

SCHEMA = "preft-jax/decode/1"
PAGE_SIZE = 64


def floor_seconds(
    model: ModelConfig,
    ceilings: Ceilings,
    dtype: np.dtype,
    rows: int,
    context: int,
    linears: np.dtype | None = None,
    keys: np.dtype | None = None,
) -> float:
    """Return the least seconds of a decode step; ``linears`` and ``keys``: dtypes of the layers' products and of the KV
    cache (None: ``dtype``).
    """

    def product(d: int, f: int, own: np.dtype = linears or dtype) -> float:
        flops, moved = 2 * rows * d * f, own.itemsize * d * (f + rows) + dtype.itemsize * rows * f
        return ceilings.floor(flops, moved, own.name)[0]

    q, k, v, o, gate, up, down = (model.site_shape(site) for site in ("q", "k", "v", "o", "gate", "up", "down"))
    layer = product(q[0], q[1] + k[1] + v[1]) + product(*o) + product(gate[0], gate[1] + up[1]) + product(*down)
    kv = 2 * model.kv_size * (keys or dtype).itemsize * rows * context / ceilings.bytes_per_s
    return model.num_hidden_layers * (layer + kv) + product(model.hidden_size, model.vocab_size, dtype)


def parse_size(text: str) -> tuple[int, int]:
    """Parse ``512x384``: rows and context."""
    rows, _, context = text.partition("x")
    if not (rows.isdecimal() and context.isdecimal() and int(rows) and int(context)):
        raise ConfigError(f"--sizes has {text!r}; give ROWSxCONTEXT, such as 512x384")
    return int(rows), int(context)


class Decoding:
    """A decode program with its rows."""

    def __init__(self, model: Model, rows: int, context: int, steps: int, kv_dtype: str | None = None):
        pages = pages_for(context + steps, PAGE_SIZE)
        dtype, spread = model.params["embed"].dtype, Spread(model.placement, model.config)
        make = functools.partial(init_cache, num_pages=rows * pages, page_size=PAGE_SIZE, dtype=kv_dtype or dtype)
        self.cache = spread.make(make, cache_axes(model.config))()
        self._params = model.params
        self._steps = steps
        rng = np.random.default_rng(0)
        token = rng.integers(0, model.config.vocab_size, rows).astype(np.int32)
        position, remaining = np.full(rows, context, np.int32), np.full(rows, steps, np.int32)
        self._slots = spread.put(device.Slots.of(token, position, remaining))
        table = rng.permutation(rows * pages).astype(np.int32).reshape(rows, pages)
        index, stops = np.arange(rows, dtype=np.int32), np.full((rows, 16), -1, np.int32)
        picks = device.Picks(index, np.full((rows, 5), -1, np.int32), stops)  # All go on.
        picks.slot[:] = index
        sampling = sampling_arrays([SamplingParams(temperature=0.0)] * rows, [0] * rows, rows).plain
        made = spread.put((device.Rows(index, table), picks, sampling))
        self._rows, self._picks, self._sampling = made
        self._logits = spread.make(lambda own: jnp.zeros((rows, own.vocab_size), jnp.float32))()
        start = time.perf_counter()
        args = self._params, self.cache, self._logits, self._slots, self._rows
        decode = functools.partial(device.decode, spread.config, rows)
        decode = spread.trace(decode, args, out=(self.cache, WHOLE), donate=(1, 2))
        draw = spread.trace(device.draw_plain, (self._logits, self._slots, self._picks, self._sampling), out=WHOLE)
        self._decode, self._draw = (one.lower().compile(device.compiler_options()) for one in (decode, draw))
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> Any:
        """Start all steps; returns what they draw."""
        slots, drawn = self._slots, []
        for _ in range(self._steps):
            self.cache, self._logits = self._decode(self._params, self.cache, self._logits, slots, self._rows)
            slots, new = self._draw(self._logits, slots, self._picks, self._sampling)
            drawn.append(new.token_NB)
        return drawn

    def seconds(self) -> float:
        """Return the seconds of a step."""
        start = time.perf_counter()
        jax.block_until_ready(self())
        return (time.perf_counter() - start) / self._steps


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time every size and return the figures that the JSON line holds."""
    console = Console(stderr=True)
    sizes = [parse_size(text) for text in args.sizes.split(",")]
    loaded = load_model(args.model, dtype=args.dtype, **quantization_of(args), mesh=args.mesh)
    model = serving_model(loaded, max(rows for rows, _ in sizes))
    devices = model.placement.num_devices
    dtype = model.params["embed"].dtype
    linears, keys = dtype_of_products(model.params), np.dtype(KV_DTYPES[args.kv_cache_dtype or dtype.name])
    ceilings = measure_ceilings(sorted({dtype.name, linears.name}), repeats=10)
    figures = []
    for rows, context in sizes:
        decoding = Decoding(model, rows, context, args.steps, keys.name)
        for _ in range(2):
            decoding.seconds()
        seconds = float(np.median([decoding.seconds() for _ in range(args.repeats)]))
        own = ceilings.together(devices)
        floor = floor_seconds(model.config, own, dtype, rows, context + args.steps // 2, linears, keys)
        figure: dict[str, Any] = {
            "rows": rows,
            "context": context,
            "step_ms": round(1e3 * seconds, 3),
            "floor_ms": round(1e3 * floor, 3),
            "ratio": round(seconds / floor, 3),
            "compile_s": round(decoding.compile_seconds, 1),
        }
        if args.profile:
            times, span = profile(decoding)
            figure |= breakdown(times, span, args.steps)
            print_kernels(times[: args.profile], args.steps, console)
        figures.append(figure)
        console.print(str(figure), soft_wrap=True)
        for array in jax.tree.leaves((decoding.cache, decoding._logits)):
            array.delete()
    options = {name: value for name, value in vars(args).items() if name != "output_json"}
    return {
        "schema": SCHEMA,
        "options": options,
        "num_devices": devices,
        "ceilings": {
            "copy_gb_per_s": round(ceilings.bytes_per_s / 1e9, 1),
            "matmul_tflop_per_s": round(ceilings.flops_per_s[linears.name] / 1e12, 1),
        },
        "rows": figures,
        **environment(),
    }


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="llama3-8b", help="a shape preset (default: %(default)s)")
    add("--dtype", default=None, help="float32, bfloat16 or float16 (default: float32 on CPU, bfloat16 elsewhere)")
    add_quantization(add)
    add_kv_cache_dtype(add)
    add_mesh(add)
    add("--sizes", default="64x900,256x400,512x384", help="ROWSxCONTEXT, with commas (default: %(default)s)")
    add("--steps", type=int, default=8, help="of a call (default: %(default)s)")
    add("--repeats", type=int, default=5, help="calls; the median counts (default: %(default)s)")
    add("--profile", type=int, default=0, help="also profile, and print so many kernels of each size (needs a GPU)")
    add("--output-json", type=Path, default=None, help="also write the JSON line here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    args = make_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    try:
        if min(args.steps, args.repeats) < 1:
            raise ConfigError(f"--steps is {args.steps} and --repeats {args.repeats}; give at least 1 of each")
        check_profiling(args.profile)
        figures = run(args)
    except (PreftError, OSError) as error:
        print(f"bench.decode: {error}", file=sys.stderr)
        return 1
    _print(figures)
    emit(figures, args.output_json)
    return 0


def _print(figures: dict[str, Any]) -> None:
    table = Table(title=f"A decode step of {figures['options']['model']}", title_justify="left")
    for column in ("rows", "context", "ms", "floor, ms", "over floor"):
        table.add_column(column, justify="right")
    for row in figures["rows"]:
        table.add_row(*(str(row[name]) for name in ("rows", "context", "step_ms", "floor_ms", "ratio")))
    Console(stderr=True).print(table)


if __name__ == "__main__":
    sys.exit(main())
