"""``python -m bench.headline``: base, prefill-only and all-token adapters through the engine, beside computed floors.

``--num-prompts`` requests of ``--input-len`` tokens, each generating ``--output-len``, all offered at once, at most
``--max-num-seqs`` at a time, request i with adapter i modulo the number of adapters, or as ``--adapter-distribution``
says. Adapters are random, of rank ``--rank``: LoRA on all seven linears, or DiReFT. Each contender serves it whole,
after a few unmeasured requests; contenders take turns, ``--rounds`` times with other prompts each, and figures are
medians over rounds. Adapters lie folded in host memory; a bank of ``--bank-adapters`` holds those being prefilled (for
all-token adapters, all that are in use), so adapters beyond that are copied to the device while it serves.

Beside each phase stands its floor: the larger of FLOPs over the measured matrix product rate and bytes over the
measured copy bandwidth, summed over matmuls and attention, nothing overlapped. With ``--mesh`` the devices share both
equally; what they tell each other is not counted.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.engine_contenders import COUNTED, Adapters, WatchedEngine, engine_config, load, ready
from bench.kernel_timing import Ceilings, dtype_of_products, measure_ceilings
from preft_jax.adapters.adapter import Adapter
from preft_jax.cli import (
    add_adapter_dtype,
    add_kv_cache_dtype,
    add_mesh,
    add_quantization,
    hyphenated,
    quantization_of,
)
from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError, PreftError
from preft_jax.loading import load_model, serving_model
from preft_jax.shapes import KV_DTYPES
from serve.bench.contest import MODES
from serve.bench.environment import environment
from serve.bench.load import LoadRequest
from serve.bench.metrics import paired_ratio, summarize
from serve.bench.output import emit, keep
from serve.bench.workload import DISTRIBUTIONS, draw_users

SCHEMA = "preft-jax/headline/1"


def make_requests(
    vocab_size: int,
    num_adapters: int,
    num_prompts: int,
    lengths: tuple[int, int],
    seed: int,
    distribution: str = "round-robin",
) -> list[LoadRequest]:
    """Return the workload; prompts depend on the seed alone, so contenders serve the same ones."""
    rng = np.random.default_rng(seed)
    users = draw_users(np.random.default_rng(seed + 1), num_prompts, num_adapters or 1, distribution)
    return [
        LoadRequest(
            arrival=0.0,
            prompt=rng.integers(0, vocab_size, lengths[0]).tolist(),
            max_tokens=lengths[1],
            user=user if num_adapters else None,
        )
        for user in users
    ]


def serve(
    engine: WatchedEngine, requests: Sequence[LoadRequest], adapters: Sequence[Adapter], most: int | None = None
) -> dict[str, Any]:
    """Serve requests, offering ``most`` at a time or all at once, and return what was measured."""
    result, spent = load(engine, requests, adapters, most)
    figures = summarize([result])
    return {
        "seconds": figures["duration"],
        "output_throughput": round(figures["output_throughput"], 1),
        "prefill_seconds": round(spent["prefill_seconds"], 3),
        "prefill_tokens_per_s": round(spent["prompt_tokens"] / max(spent["prefill_seconds"], 1e-9), 1),
        "decode_seconds": round(spent["decode_seconds"], 3),
        "decode_steps": spent["decode_steps"],
        "decode_step_ms": round(1e3 * spent["decode_seconds"] / max(spent["decode_steps"], 1), 3),
        "host_seconds": round(result.duration - spent["prefill_seconds"] - spent["decode_seconds"], 3),
        "mean_tpot_ms": figures["mean_tpot_ms"],
        "mean_ttft_ms": figures["mean_ttft_ms"],
        **{name: spent[name] for name in COUNTED},
    }


def floors(
    model: ModelConfig, ceilings: Ceilings, dtypes: tuple[np.dtype, np.dtype], args: argparse.Namespace, rows: int = 0,
    adapters: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Return the least seconds of a whole prefill and of a decode step, at mean context.

    Args:
        model: shapes.
        ceilings: of the device.
        dtypes: of KV, adapters and the output head, and of the layers' products.
        args: the options.
        rows: that decode at a time; 0: as many as may.
        adapters: all-token adapters in use: a decode step reads each of those of its rows once.
    """
    dtype, linears = dtypes
    rate, fast, size = ceilings.flops_per_s[dtype.name], ceilings.flops_per_s[linears.name], dtype.itemsize
    widths = [model.site_shape(site) for site in ("q", "k", "v", "o", "gate", "up", "down")]
    layer = sum(d * f for d, f in widths)
    weights = model.num_hidden_layers * layer
    head = model.hidden_size * model.vocab_size
    kv_dtype = KV_DTYPES[args.kv_cache_dtype or dtype.name]
    kv = 2 * model.num_hidden_layers * model.kv_size * np.dtype(kv_dtype).itemsize
    heads = model.num_attention_heads * model.head_dim
    tokens, rows = args.num_prompts * args.input_len, rows or min(args.max_num_seqs, args.num_prompts)
    attention = 2 * 2 * model.num_hidden_layers * heads * args.input_len / 2
    prefill = tokens * 2 * weights / fast + (tokens * attention + args.num_prompts * 2 * head) / rate
    context = args.input_len + args.output_len / 2
    computing = 2 * rows * (weights / fast + head / rate)
    matmuls = max(computing, (weights * linears.itemsize + head * size) / ceilings.bytes_per_s)
    edits = args.rank * size * model.num_hidden_layers * sum(d + f for d, f in widths)
    decode = matmuls + (rows * context * kv + min(adapters, rows) * edits) / ceilings.bytes_per_s
    waves = args.num_prompts / rows
    return {
        "prefill_seconds": round(prefill, 3),
        "prefill_tokens_per_s": round(tokens / prefill, 1),
        "decode_step_ms": round(1e3 * decode, 3),
        "output_throughput": round(
            args.num_prompts * args.output_len / (prefill + waves * args.output_len * decode), 1
        ),
    }


def check(args: argparse.Namespace) -> tuple[list[str], list[int]]:
    """Return the modes, the base first, and the numbers of adapters; raise ``ConfigError`` for what is out of range."""
    for name in (
        "bank_adapters", "rank", "num_prompts", "input_len", "output_len", "max_num_seqs", "prefill_tokens", "rounds",
    ):  # fmt: skip
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    if args.host_copies is not None and args.host_copies < 1:
        raise ConfigError(f"--host-copies is {args.host_copies}; give at least 1, or leave it out for all")
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise ConfigError(f"--max-concurrency is {args.max_concurrency}; give at least 1, or leave it out for all")
    modes = list(MODES) if args.modes == "all" else args.modes.split(",")
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"--modes has {mode!r}; allowed: {', '.join(MODES)}, or all")
    try:
        counts = [int(text) for text in args.num_adapters.split(",")]
    except ValueError:
        raise ConfigError(f"--num-adapters is {args.num_adapters!r}; give numbers with commas") from None
    if min(counts) < 1:
        raise ConfigError(f"--num-adapters has {min(counts)}; give at least 1")
    for name in args.adapter_distribution.split(","):
        if name not in DISTRIBUTIONS:
            raise ConfigError(f"--adapter-distribution has {name!r}; allowed: {', '.join(DISTRIBUTIONS)}")
    return [mode for mode in MODES if mode in modes], list(dict.fromkeys(counts))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run every contender and return the figures that the JSON line holds."""
    modes, counts = check(args)
    console = Console(stderr=True)
    model = serving_model(
        load_model(args.model, dtype=args.dtype, **quantization_of(args), mesh=args.mesh), args.max_num_seqs
    )
    dtype = model.params["embed"].dtype
    dtypes = dtype, dtype_of_products(model.params)
    ceilings = measure_ceilings(sorted({one.name for one in dtypes}), repeats=10)
    devices = model.placement.num_devices
    adapters = Adapters(
        model.config, args.adapter_kind, args.rank, args.adapter_dtype or dtype.name, max(counts),
        placement=model.placement, copies=args.host_copies,
    )  # fmt: skip
    contenders: list[_Contender] = []
    for mode, bank_adapters, wanted in plan(modes, counts, args.bank_adapters):
        longest, together = args.input_len + args.output_len, args.prefill_tokens // args.input_len
        config = engine_config(args, mode, bank_adapters, adapters.sites, max_model_len=longest, prefill_seqs=together)
        engine, seconds = ready(model, config, mode, console, held=args.input_len + args.output_len // 2)
        own = adapters.put(engine, max(wanted), mode)
        engine.sleep()  # Engines take turns with the device's memory.
        for count in wanted:
            distributions = args.adapter_distribution.split(",") if count else ("round-robin",)
            contenders += [
                _Contender(engine, own[:count], {
                    "mode": mode, "num_adapters": count, "distribution": distribution, "bank_adapters": bank_adapters,
                    "ready_s": round(seconds, 1), "kv_tokens": engine.kv_tokens,
                    "max_num_seqs": engine.config.max_num_seqs,
                })
                for distribution in distributions
            ]  # fmt: skip
    options = {name: value for name, value in vars(args).items() if name != "output_json"}
    figures = {
        "schema": SCHEMA,
        "options": options,
        "num_devices": devices,
        "floors": floors(model.config, ceilings.together(devices), dtypes, args),
        "ceilings": {
            "copy_gb_per_s": round(ceilings.bytes_per_s / 1e9, 1),
            "matmul_tflop_per_s": round(ceilings.flops_per_s[dtypes[1].name] / 1e12, 1),
        },
        "rows": [],
        **environment(),
    }
    lengths, vocab, few = (args.input_len, args.output_len), model.config.vocab_size, min(64, args.max_num_seqs)
    for number in range(args.rounds):
        for contender in contenders:
            count, distribution = contender.named["num_adapters"], contender.named["distribution"]
            serve(contender.engine, make_requests(vocab, count, few, (args.input_len, 4), 1), contender.adapters, few)
            requests = make_requests(vocab, count, args.num_prompts, lengths, number, distribution)
            contender.rounds.append(serve(contender.engine, requests, contender.adapters, args.max_concurrency))
            contender.engine.sleep()
            console.print(f"round {number}: {contender.named}: {contender.rounds[-1]}", soft_wrap=True)
            measured = [one for one in contenders if one.rounds]
            figures["rows"] = [row(one, measured[0]) for one in measured]
            for found in figures["rows"]:
                if found["mode"] == "all-token":
                    rows = int(found["most_running"]), found["num_adapters"]
                    found["floor"] = floors(model.config, ceilings.together(devices), dtypes, args, *rows)
            keep(figures, args.output_json)
    return figures


@dataclasses.dataclass(frozen=True)
class _Contender:
    """An engine with adapters, its name as a row has it, and what each round gave."""

    engine: WatchedEngine
    adapters: Sequence[Adapter]
    named: dict[str, Any]
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def row(contender: _Contender, base: _Contender) -> dict[str, Any]:
    """Return a contender's figures: medians over its rounds, and its throughput beside the base's, round by round."""
    rounds = contender.rounds
    figures: dict[str, Any] = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    figures["recompiles"] = sum(one["recompiles"] for one in rounds)
    rates = [one["output_throughput"] for one in rounds]
    if base.named["mode"] == "base":
        figures["ratio_to_base"] = paired_ratio(rates, [one["output_throughput"] for one in base.rounds[: len(rates)]])
    return {**contender.named, **figures, "rounds": rates}


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
    add_quantization(add)
    add_kv_cache_dtype(add)
    add_mesh(add)
    add("--modes", default="all", help="base, prefill-only, all-token, separated by commas; default: all")
    add("--num-adapters", default="1,64,512", help="separated by commas (default: %(default)s)")
    add("--bank-adapters", type=int, default=64, help="adapters that the bank holds (default: %(default)s)")
    help = "different adapters in host memory, for others too, where it has no room for all (default: all)"
    add("--host-copies", type=int, default=None, help=help)
    add("--adapter-kind", default="lora", choices=("lora", "direft"), help="(default: %(default)s)")
    add("--rank", type=int, default=16, help="(default: %(default)s)")
    add_adapter_dtype(add)
    add(
        "--adapter-distribution",
        default="round-robin",
        help=f"{', '.join(DISTRIBUTIONS)}, or several with commas (default: %(default)s)",
    )
    add("--num-prompts", type=int, default=1024, help="(default: %(default)s)")
    add("--input-len", type=int, default=256, help="tokens (default: %(default)s)")
    add("--output-len", type=int, default=256, help="tokens (default: %(default)s)")
    add("--max-num-seqs", type=int, default=512, help="requests that run at a time (default: %(default)s)")
    add("--max-concurrency", type=int, default=None, help="requests offered at a time (default: all)")
    add("--prefill-tokens", type=int, default=8192, help="tokens of a prefill call (default: %(default)s)")
    add("--memory-utilization", type=float, default=0.95, help="of what the process may take (default: %(default)s)")
    add("--rounds", type=int, default=1, help="turns of each contender (default: %(default)s)")
    add("--output-json", type=Path, default=None, help="also write the JSON line here, after each turn what there is")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    args = make_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    try:
        figures = run(args)
        out = Console()
        print_table(figures, out if out.is_terminal else Console(width=160))
    except (PreftError, OSError) as error:
        print(f"bench.headline: {error}", file=sys.stderr)
        return 1
    emit(figures, None)  # The file has them already.
    return 0


if __name__ == "__main__":
    sys.exit(main())
