"""``python -m bench.headline``: base, prefill-only and all-token adapters through the engine, beside computed floors.

A closed workload: ``--num-prompts`` requests of ``--input-len`` tokens, each generating ``--output-len``, at most
``--max-num-seqs`` at a time, request i with adapter i modulo the number of adapters (LoRA, rank ``--rank``, all seven
linears, random). Each contender serves it whole, after a few unmeasured requests; contenders follow one another on one
machine. Adapters lie folded in host memory; a bank of ``--bank-adapters`` holds those being prefilled (for
all-token adapters, all that are in use), so adapters beyond that are copied to the device while it serves.

Beside each phase stands its floor: the larger of FLOPs over the measured matrix product rate and bytes over the
measured copy bandwidth, summed over matmuls and attention, nothing overlapped.
"""

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.kernel_timing import Ceilings, measure_ceilings
from preft_jax.adapter import Adapter, AdapterConfig, adapter_shapes
from preft_jax.bank import PackedSite
from preft_jax.chat import EncodedPrompt
from preft_jax.cli import hyphenated
from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError, PreftError
from preft_jax.generator import serving_model
from preft_jax.loading import Model, load_model
from preft_jax.sampling import SamplingParams
from preft_jax.shapes import RANK_PAGE
from serve.adapters import Columns, Known
from serve.config import EngineConfig
from serve.engine import Engine
from serve.metrics import environment
from serve.request import Request

SCHEMA = "preft-jax/headline/1"
MODES = ("base", "prefill-only", "all-token")


@dataclasses.dataclass(frozen=True)
class Contender:
    """A mode and how many adapters the requests use."""

    mode: str
    num_adapters: int


class Adapters:
    """Random adapters that cost no time to make: each is a window of one random buffer, and named by its number."""

    def __init__(self, model: ModelConfig, rank: int, dtype: Any, count: int):
        if rank % RANK_PAGE:
            raise ConfigError(f"--rank is {rank}; give a multiple of {RANK_PAGE}")
        self._model = model
        self._pages = rank // RANK_PAGE
        self._config = AdapterConfig(kind="lora", rank=rank)
        longest = max(self._size(*model.site_shape(site)) for site in self._config.targets)
        noise = np.random.default_rng(0).standard_normal(longest + 64 * count, np.float32)
        self._noise = (noise * 0.02).astype(dtype)

    def _size(self, *widths: int) -> int:
        return self._model.num_hidden_layers * self._pages * RANK_PAGE * max(widths)

    def make(self, number: int, positions: str) -> Adapter:
        """Return an adapter whose parameters are not to be looked at: only its rank pages are real."""
        config = dataclasses.replace(self._config, positions=positions)
        shapes = adapter_shapes(config, self._model)
        leaves = jax.tree.map(
            lambda s: np.broadcast_to(np.float32(0), s), shapes, is_leaf=lambda s: isinstance(s, tuple)
        )
        adapter = Adapter(config, leaves)
        adapter.__dict__["digest"] = f"{positions}-{number}"
        return adapter

    def packed(self, number: int) -> dict[str, PackedSite]:
        """Return an adapter's rank pages."""
        layers, sites = self._model.num_hidden_layers, {}
        for site in self._config.targets:
            d, f = self._model.site_shape(site)
            a = self._noise[64 * number :][: self._size(d)].reshape(layers, self._pages, d, RANK_PAGE)
            b = self._noise[64 * number :][: self._size(f)].reshape(layers, self._pages, RANK_PAGE, f)
            sites[site] = PackedSite(a, np.zeros((layers, self._pages, RANK_PAGE), np.float32), b, (0,) * self._pages)
        return sites


def make_requests(
    model: ModelConfig, adapters: Sequence[Adapter | None], num_prompts: int, lengths: tuple[int, int], seed: int
) -> list[Request]:
    """Return the workload; prompts depend on the seed alone, so contenders serve the same ones."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            prompt=EncodedPrompt(rng.integers(0, model.vocab_size, lengths[0]).tolist(), ()),
            adapter=adapters[i % len(adapters)],
            sampling=SamplingParams(temperature=0.0, ignore_eos=True),
            max_tokens=lengths[1],
        )
        for i in range(num_prompts)
    ]


def serve(engine: Engine, requests: Sequence[Request], concurrency: int) -> dict[str, Any]:
    """Serve requests, at most ``concurrency`` in the engine at a time, and return what was measured."""
    before = engine.stats
    start = time.perf_counter()
    first: dict[int, float] = {}
    tpots: list[float] = []
    added: dict[int, float] = {}
    counts: dict[int, int] = {}
    waiting = list(reversed(requests))
    most = 0
    while waiting or engine.has_work:
        while waiting and len(added) - len(tpots) < concurrency:
            added[engine.add(waiting.pop())] = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        most = max(most, engine.scheduler.num_running)
        for output in outputs:
            if output.error is not None:
                raise ConfigError(f"request {output.request_id} failed: {output.error}")
            if output.token_ids:
                first.setdefault(output.request_id, now)
                counts[output.request_id] = counts.get(output.request_id, 0) + len(output.token_ids)
            if output.finish_reason is not None:
                tpots.append((now - first[output.request_id]) / max(counts[output.request_id] - 1, 1))
    elapsed = time.perf_counter() - start
    after = engine.stats
    spent = {
        field.name: getattr(after, field.name) - getattr(before, field.name) for field in dataclasses.fields(after)
    }
    ttfts = [first[request] - added[request] for request in first]
    return {
        "seconds": round(elapsed, 3),
        "output_throughput": round(spent["generated_tokens"] / elapsed, 1),
        "prefill_seconds": round(spent["prefill_seconds"], 3),
        "prefill_tokens_per_s": round(spent["prompt_tokens"] / max(spent["prefill_seconds"], 1e-9), 1),
        "decode_seconds": round(spent["decode_seconds"], 3),
        "decode_steps": spent["decode_steps"],
        "decode_step_ms": round(1e3 * spent["decode_seconds"] / max(spent["decode_steps"], 1), 3),
        "host_seconds": round(elapsed - spent["prefill_seconds"] - spent["decode_seconds"], 3),
        "mean_tpot_ms": round(1e3 * float(np.mean(tpots)), 3),
        "mean_ttft_ms": round(1e3 * float(np.mean(ttfts)), 3),
        "most_running": most,
        "preemptions": spent["preemptions"],
        "adapter_loads": spent["adapter_loads"],
        "recompiles": spent["recompiles"],
    }


def floors(model: ModelConfig, ceilings: Ceilings, dtype: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the least seconds of a whole prefill and of a decode step at full concurrency and mean context."""
    rate = ceilings.flops_per_s[dtype]
    size = np.dtype("float32" if dtype == "float32" else "float16").itemsize
    widths = [model.site_shape(site) for site in ("q", "k", "v", "o", "gate", "up", "down")]
    layer = sum(d * f for d, f in widths)
    weights = model.num_hidden_layers * layer
    head = model.hidden_size * model.vocab_size
    kv = 2 * model.num_hidden_layers * model.kv_size * size
    heads = model.num_attention_heads * model.head_dim
    tokens, rows = args.num_prompts * args.input_len, min(args.max_num_seqs, args.num_prompts)
    attention = 2 * 2 * model.num_hidden_layers * heads * args.input_len / 2
    prefill = (tokens * (2 * weights + attention) + args.num_prompts * 2 * head) / rate
    context = args.input_len + args.output_len / 2
    matmuls = max(2 * rows * (weights + head) / rate, (weights + head) * size / ceilings.bytes_per_s)
    decode = matmuls + rows * context * kv / ceilings.bytes_per_s
    waves = args.num_prompts / rows
    return {
        "prefill_seconds": round(prefill, 3),
        "prefill_tokens_per_s": round(tokens / prefill, 1),
        "decode_step_ms": round(1e3 * decode, 3),
        "output_throughput": round(
            args.num_prompts * args.output_len / (prefill + waves * args.output_len * decode), 1
        ),
    }


def engine_for(model: Model, mode: str, bank_adapters: int, args: argparse.Namespace) -> Engine:
    """Return a warm engine for a mode."""
    pages = 1 if mode == "base" else 1 + bank_adapters * args.rank // RANK_PAGE
    return Engine(
        model,
        EngineConfig(
            max_num_seqs=args.max_num_seqs,
            max_model_len=args.input_len + args.output_len,
            prefill_tokens=args.prefill_tokens,
            prefill_seqs=max(1, min(args.prefill_tokens // args.input_len, args.max_num_seqs)),
            chunk_tokens=min(args.prefill_tokens, 2048),
            max_rank=args.rank,
            bank_pages=pages,
            all_token=mode == "all-token",
            memory_utilization=args.memory_utilization,
            prefix_caching=False,
        ),
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run every contender and return the figures that the JSON line holds."""
    console = Console(stderr=True)
    counts = [int(n) for n in args.num_adapters.split(",")]
    modes = MODES if args.modes == "all" else args.modes.split(",")
    model = serving_model(load_model(args.model, dtype=args.dtype), args.max_num_seqs)
    dtype = model.params["embed"].dtype
    ceilings = measure_ceilings([dtype.name], repeats=10)
    adapters = Adapters(model.config, args.rank, dtype, max(counts))
    rows: list[dict[str, Any]] = []
    for mode, bank_adapters, wanted in plan(modes, counts, args.bank_adapters):
        engine = engine_for(model, mode, bank_adapters, args)
        start = time.perf_counter()
        engine.warm_up()
        console.print(
            f"{mode}: compiled in {time.perf_counter() - start:.0f} s, {engine.runner.num_kv_pages} KV pages",
            engine.runner.compile_seconds,
            soft_wrap=True,
        )
        for count in wanted:
            positions = "all" if mode == "all-token" else "prompt"
            own: list[Adapter | None] = [None]
            if count:
                own = [adapters.make(i, positions) for i in range(count)]
                for i, adapter in enumerate(own):
                    edits = adapters.packed(i)
                    columns = {site: Columns(edit.groups) for site, edit in edits.items()}
                    if adapter is not None:
                        engine.adapters.put(adapter.digest, Known(columns, engine.runner.pack(edits)))
            lengths = args.input_len, args.output_len
            serve(
                engine, make_requests(model.config, own, args.max_num_seqs, (args.input_len, 4), 1), args.max_num_seqs
            )
            figures = serve(engine, make_requests(model.config, own, args.num_prompts, lengths, 0), args.max_num_seqs)
            rows.append({"mode": mode, "num_adapters": count, "bank_adapters": bank_adapters, **figures})
            console.print(f"{mode}, {count} adapters: {figures}", soft_wrap=True)
            for adapter in own:
                if adapter is not None:
                    engine.adapters.let_go(adapter.digest)
        del engine
        gc.collect()
    options = {name: value for name, value in vars(args).items() if name != "output_json"}
    return {
        "schema": SCHEMA,
        "options": options,
        "floors": floors(model.config, ceilings, dtype.name, args),
        "ceilings": {
            "copy_gb_per_s": round(ceilings.bytes_per_s / 1e9, 1),
            "matmul_tflop_per_s": round(ceilings.flops_per_s[dtype.name] / 1e12, 1),
        },
        "rows": rows,
        **environment(),
    }


def plan(modes: Sequence[str], counts: Sequence[int], room: int) -> list[tuple[str, int, list[int]]]:
    """Return the engines: mode, adapters that the bank holds, and the adapter counts that it serves."""
    engines: list[tuple[str, int, list[int]]] = []
    for mode in modes:
        if mode == "base":
            engines.append((mode, 0, [0]))
        elif mode == "prefill-only":
            engines.append((mode, min(room, max(counts)), list(counts)))
        else:
            few = [count for count in counts if count <= room]
            engines += [(mode, max(few), few)] if few else []
            engines += [(mode, count, [count]) for count in counts if count > room]
    return engines


def print_table(figures: dict[str, Any], console: Console) -> None:
    """Print one row a contender, and the floors."""
    table = Table(title=f"{figures['options']['model']} through the engine")
    names = (
        "output_throughput",
        "prefill_tokens_per_s",
        "decode_step_ms",
        "mean_tpot_ms",
        "host_seconds",
        "most_running",
    )
    for column in ("mode", "adapters", *names):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for row in figures["rows"]:
        table.add_row(row["mode"], str(row["num_adapters"]), *(f"{row[name]:,}" for name in names))
    floor = figures["floors"]
    table.add_row("floor, base", "", *(f"{floor[name]:,}" if name in floor else "" for name in names))
    console.print(table)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.headline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="llama3-8b", help="a shape preset (default: %(default)s)")
    add("--dtype", default=None, help="float32, bfloat16 or float16 (default: float32 on CPU, bfloat16 elsewhere)")
    add("--modes", default="all", help="base, prefill-only, all-token, separated by commas; default: all")
    add("--num-adapters", default="1,64,512", help="separated by commas (default: %(default)s)")
    add("--bank-adapters", type=int, default=64, help="adapters that the bank holds (default: %(default)s)")
    add("--rank", type=int, default=16, help="(default: %(default)s)")
    add("--num-prompts", type=int, default=1024, help="(default: %(default)s)")
    add("--input-len", type=int, default=256, help="tokens (default: %(default)s)")
    add("--output-len", type=int, default=256, help="tokens (default: %(default)s)")
    add("--max-num-seqs", type=int, default=512, help="requests at a time (default: %(default)s)")
    add("--prefill-tokens", type=int, default=8192, help="tokens of a prefill call (default: %(default)s)")
    add("--memory-utilization", type=float, default=0.95, help="of what the process may take (default: %(default)s)")
    add("--output-json", type=Path, default=None, help="also write the JSON line here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    args = make_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    try:
        figures = run(args)
        print_table(figures, Console())
        line = json.dumps(figures, allow_nan=False)
        if args.output_json is not None:
            args.output_json.parent.mkdir(parents=True, exist_ok=True)
            args.output_json.write_text(line + "\n")
    except (PreftError, OSError) as error:
        print(f"bench.headline: {error}", file=sys.stderr)
        return 1
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
