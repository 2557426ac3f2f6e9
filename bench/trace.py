"""``python -m bench.trace``: a recorded trace through the engine, by the base and with adapters, and their goodput.

The beginning of a trace of a conversation service (CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens,
such as the Azure LLM inference traces) is served at its own arrival times, sped up by one factor: prompts are random
tokens of the recorded lengths, and every answer is as long as the recorded one. The factor is chosen so that
``--load`` times the base's capacity is offered; capacity is measured first, by the base, with the first
``--capacity-prompts`` requests offered all at once. ``--speedup`` gives the factor instead, and nothing is measured.

Each contender serves the same requests at the same times, after a few unmeasured ones. Goodput is the requests per
second whose first token came within ``--ttft-ms`` of their arrival, and the others within ``--tpot-ms`` each in the
mean. It counts over the time from the first arrival to the last end, so that in a short run the last answers weigh;
the part of all requests that met both bounds stands beside it.

Adapters are random LoRA on all seven linears. They lie folded in host memory; a bank of ``--bank-adapters`` holds
those being prefilled (for all-token adapters, all that are in use).

Contenders may also run one command after the other, on one machine: ``--continue-json`` takes what the first one wrote.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.engine_contenders import COUNTED, Adapters, WatchedEngine, engine_config, load, ready
from preft_jax.adapters.adapter import Adapter
from preft_jax.cli import add_adapter_dtype, add_kv_cache_dtype, add_quantization, hyphenated, quantization_of
from preft_jax.errors import ConfigError, PreftError
from preft_jax.loading import Model, load_model, serving_model
from preft_jax.models.batch import round_up
from serve.bench.contest import MODES
from serve.bench.datasets import TRACE_COLUMNS, Trace, read_trace
from serve.bench.environment import environment
from serve.bench.load import LoadRequest
from serve.bench.metrics import MetricOptions, meets, summarize
from serve.bench.output import emit, keep
from serve.bench.workload import DISTRIBUTIONS, Texts, draw_users, trace_texts
from serve.engine.config import EngineConfig

SCHEMA = "preft-jax/trace/1"

LONGEST = 9216
"""Tokens of prompt and output that are served unless ``--max-model-len`` says otherwise: a few requests have more."""

PREFILL_SEQS = 32
"""Prompts in one prefill call; recorded ones have about a thousand tokens, and some a few."""

WARM_UPS = 64
"""Requests that are served before each turn and not counted, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is served: the trace as recorded, and texts and adapters drawn for it; ``warm_ups`` are not counted."""

    trace: Trace
    texts: Texts
    warm_ups: Texts
    users: Sequence[int]

    def requests(self, adapters: bool, speedup: float) -> list[LoadRequest]:
        """Return the requests, arriving ``speedup`` times faster than recorded (infinity: all at once)."""
        return [
            LoadRequest(arrival=arrival / speedup, prompt=prompt, max_tokens=length, user=user if adapters else None)
            for arrival, prompt, length, user in zip(
                self.trace.arrivals, self.texts.prompts, self.texts.output_lens, self.users, strict=True
            )
        ]

    def warming(self, num_adapters: int) -> list[LoadRequest]:
        """Return requests of four tokens each, adapters in turn."""
        return [
            LoadRequest(arrival=0.0, prompt=prompt, max_tokens=4, user=i % num_adapters if num_adapters else None)
            for i, prompt in enumerate(self.warm_ups.prompts)
        ]


@dataclasses.dataclass(frozen=True)
class Contender:
    """An engine with its adapters, and its name as a row has it."""

    engine: WatchedEngine
    adapters: Sequence[Adapter]
    named: dict[str, Any]

    def warm_up(self, workload: Workload) -> None:
        """Serve what is not counted."""
        load(self.engine, workload.warming(len(self.adapters)), self.adapters)


def check(args: argparse.Namespace) -> list[str]:
    """Return the modes in the order of their turns; raise ``ConfigError`` for options that are out of range."""
    for name in ("capacity_prompts", "num_adapters", "bank_adapters", "rank", "max_num_seqs", "prefill_tokens"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit is {args.limit}; give at least 1")
    if args.max_model_len is not None and args.max_model_len < 8:
        raise ConfigError(f"--max-model-len is {args.max_model_len}; give at least 8")
    for name in ("minutes", "load", "speedup", "ttft_ms", "tpot_ms"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; give a number above 0")
    modes = args.modes.split(",")
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"--modes has {mode!r}; allowed: {', '.join(MODES)}")
    if "base" not in modes and args.speedup is None and args.continue_json is None:
        raise ConfigError(
            f"--modes is {args.modes}; capacity is that of the base: add base, or give --speedup or --continue-json"
        )
    return [mode for mode in MODES if mode in modes]


def digest_of(trace: Trace) -> str:
    """Return what tells a trace from others."""
    return hashlib.sha256(repr(dataclasses.astuple(trace)).encode()).hexdigest()[:16]


def rate_of(trace: Trace) -> float:
    """Return the arrivals per second of a trace from its first request to its last; infinity if there is no between."""
    return (len(trace.arrivals) - 1) / trace.arrivals[-1] if trace.arrivals[-1] else math.inf


def longest_of(trace: Trace, most: int | None, positions: int) -> int:
    """Return how many tokens of prompt and output are served: ``most``, or what the trace needs, within bounds."""
    if most is not None:
        return most
    needed = max(sum(lengths) for lengths in zip(trace.prompt_lens, trace.output_lens, strict=True))
    return min(round_up(needed, 64), LONGEST, positions)


def draw(trace: Trace, users: Sequence[int], vocab_size: int, max_model_len: int, num_warm_ups: int) -> Workload:
    """Draw prompts of a trace's lengths."""
    few = Trace(
        arrivals=trace.arrivals[:num_warm_ups],
        prompt_lens=trace.prompt_lens[:num_warm_ups],
        output_lens=[4] * len(trace.prompt_lens[:num_warm_ups]),
    )
    texts, warm_ups = (
        trace_texts(np.random.default_rng(seed), one, vocab_size=vocab_size, max_len=max_model_len)
        for seed, one in enumerate((trace, few))
    )
    return Workload(trace=trace, texts=texts, warm_ups=warm_ups, users=users)


def shared_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that the figures hold, by name."""
    own = ("output_json", "continue_json")
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(args).items()
        if name not in own
    } | {"trace": args.trace.name}


def read_earlier(args: argparse.Namespace, modes: Sequence[str], trace: Trace) -> dict[str, Any] | None:
    """Return the figures that this run goes on with, or None; raise ``ConfigError`` if they are of something else."""
    path: Path | None = args.continue_json
    if path is None:
        return None
    try:
        earlier = json.loads(path.read_text())
        options, rows = earlier["options"], earlier["rows"]
        speedup, device, digest = earlier["speedup"], earlier["device"], earlier["trace"]["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--continue-json: {path} holds no figures of bench.trace: {error!r}") from None
    wanted = shared_options(args)
    other = sorted(name for name in wanted if name not in ("modes", "speedup") and wanted[name] != options.get(name))
    if other:
        said = ", ".join(f"{name} {options.get(name)!r}" for name in other)
        raise ConfigError(f"--continue-json: {path} was made with {said}; give the same options, modes aside")
    if digest != digest_of(trace):
        raise ConfigError(f"--continue-json: {path} was made with another trace of that name")
    if device != environment()["device"]:
        raise ConfigError(f"--continue-json: {path} was made on {device}; go on there")
    if args.speedup is not None and args.speedup != speedup:
        raise ConfigError(f"--speedup is {args.speedup:g}; that of {path} is {speedup:g}")
    if both := {row["mode"] for row in rows} & set(modes):
        raise ConfigError(f"--modes has {', '.join(sorted(both))}, which {path} has already")
    return earlier


def make_contenders(
    model: Model,
    modes: Sequence[str],
    args: argparse.Namespace,
    workload: Workload,
    max_model_len: int,
    console: Console,
) -> list[Contender]:
    """Return a warm engine for each mode, asleep, with its adapters."""
    dtype = args.adapter_dtype or model.params["embed"].dtype.name
    adapters = Adapters(model.config, "lora", args.rank, dtype, args.num_adapters)
    contenders = []
    for mode in modes:
        count = 0 if mode == "base" else args.num_adapters
        bank = min(args.bank_adapters, count)
        config = engine_config(args, mode, bank, adapters.sites, max_model_len=max_model_len, prefill_seqs=PREFILL_SEQS)
        engine, seconds = ready(model, config, mode, console)
        used = {*workload.users, *(one.user for one in workload.warming(count) if one.user is not None)}
        own = adapters.put(engine, count, mode, used)
        engine.sleep()  # Engines take turns with the device's memory.
        named: dict[str, Any] = {"mode": mode, "num_adapters": count, "bank_adapters": bank}
        if count:
            named["distribution"] = args.adapter_distribution
        sizes = {"kv_pages": engine.runner.num_kv_pages, "kv_page_tokens": engine.config.page_size}
        sizes["max_num_seqs"] = engine.config.max_num_seqs
        contenders.append(Contender(engine, own, {**named, **sizes, "ready_s": round(seconds, 1)}))
    return contenders


def capacity(base: Contender, workload: Workload, num_prompts: int) -> dict[str, float]:
    """Return how many requests per second the base serves when the first ones are offered all at once."""
    base.warm_up(workload)
    result, _ = load(base.engine, workload.requests(False, math.inf)[:num_prompts], ())
    base.engine.sleep()
    count = len(result.records)
    return {
        "requests": count,
        "seconds": round(result.duration, 3),
        "requests_per_s": round(count / result.duration, 4),
    }


def measure(
    contender: Contender, workload: Workload, speedup: float, goodput: dict[str, float], base: dict[str, Any] | None
) -> dict[str, Any]:
    """Return a row: what a contender's turn gave, beside the base's row."""
    requests = workload.requests(bool(contender.adapters), speedup)
    contender.warm_up(workload)
    result, spent = load(contender.engine, requests, contender.adapters)
    contender.engine.sleep()
    figures = summarize([result], MetricOptions(percentiles=(90.0, 99.0), goodput=goodput))
    good, baseline = figures["request_goodput"], base["request_goodput"] if base is not None else 0.0
    if contender.named["mode"] == "base":
        baseline = good
    return {
        **contender.named,
        "adapters_used": len({request.user for request in requests} - {None}),
        **figures,
        "goodput_fraction": round(sum(meets(one, goodput) for one in result.records) / len(result.records), 4),
        "goodput_ratio_to_base": round(good / baseline, 4) if baseline else None,
        "prefill_seconds": round(spent["prefill_seconds"], 3),
        "decode_seconds": round(spent["decode_seconds"], 3),
        "decode_steps": spent["decode_steps"],
        "mixed_seconds": round(spent["mixed_seconds"], 3),
        "mixed_calls": spent["mixed_calls"],
        **{name: spent[name] for name in COUNTED},
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run every contender and return the figures that the JSON line holds."""
    modes, console = check(args), Console(stderr=True)
    trace = read_trace(args.trace, minutes=args.minutes, limit=args.limit)
    earlier = read_earlier(args, modes, trace)
    count, rate = len(trace.arrivals), rate_of(trace)
    if args.speedup is None and earlier is None and not rate < math.inf:
        raise ConfigError(
            f"{count} requests of {args.trace} are used and all arrive at once, so that no load can be offered; take "
            "more with --minutes or --limit, or give --speedup"
        )
    users = draw_users(np.random.default_rng(2), count, args.num_adapters, args.adapter_distribution)
    model = serving_model(load_model(args.model, dtype=args.dtype, **quantization_of(args)), args.max_num_seqs)
    longest = longest_of(trace, args.max_model_len, model.config.max_position_embeddings)
    workload = draw(trace, users, model.config.vocab_size, longest, min(WARM_UPS, args.max_num_seqs))
    texts = workload.texts
    console.print(f"{texts.clipped} of {count} requests were clipped to {longest} tokens", soft_wrap=True)
    contenders = make_contenders(model, modes, args, workload, longest, console)
    found, speedup = None, args.speedup
    if earlier is not None:
        found, speedup = earlier["capacity"], earlier["speedup"]
    elif speedup is None:
        found = capacity(contenders[0], workload, args.capacity_prompts)
        speedup = round(args.load * found["requests_per_s"] / rate, 4)
        console.print(f"capacity: {found}", soft_wrap=True)
    seconds = trace.arrivals[-1] / speedup
    console.print(f"speedup {speedup:.4g}: {count} requests arrive in {seconds:.1f} s", soft_wrap=True)
    figures: dict[str, Any] = {
        "schema": SCHEMA,
        "options": shared_options(args),
        "trace": {
            "digest": digest_of(trace),
            "requests": count,
            "seconds": round(trace.arrivals[-1], 3),
            "requests_per_s": round(rate, 4) if rate < math.inf else None,
            "mean_prompt_tokens": round(float(np.mean([len(prompt) for prompt in texts.prompts])), 1),
            "mean_output_tokens": round(float(np.mean(texts.output_lens)), 1),
            "clipped": texts.clipped,
        },
        "max_model_len": longest,
        "capacity": found,
        "speedup": speedup,
        "offered_seconds": round(seconds, 3),
        "offered_requests_per_s": round(rate * speedup, 4) if rate < math.inf else None,
        "rows": [] if earlier is None else list(earlier["rows"]),
        **environment(),
    }
    goodput = {"ttft": args.ttft_ms, "tpot": args.tpot_ms}
    for contender in contenders:
        rows = figures["rows"]
        base = next((row for row in rows if row["mode"] == "base"), None)
        rows.append(measure(contender, workload, speedup, goodput, base))
        figures["options"]["modes"] = ",".join(row["mode"] for row in rows)
        console.print(f"{contender.named['mode']}: {rows[-1]}", soft_wrap=True)
        keep(figures, args.output_json)
    return figures


def print_table(figures: dict[str, Any], console: Console) -> None:
    """Print one row a contender."""
    options, offered = figures["options"], figures["offered_requests_per_s"]
    arriving = "all at once" if offered is None else f"{offered:.2f} a second"
    table = Table(title=f"{options['model']}: {figures['trace']['requests']} requests, {arriving}")
    columns = {
        "request_goodput": "goodput/s",
        "goodput_fraction": "of all",
        "goodput_ratio_to_base": "vs base",
        "request_throughput": "requests/s",
        "output_throughput": "tokens/s",
        "median_ttft_ms": "TTFT, ms",
        "p99_ttft_ms": "p99",
        "median_tpot_ms": "TPOT, ms",
        "p99_tpot_ms": "p99",
        "most_running": "at a time",
        "preemptions": "preempted",
    }
    for column in ("mode", "adapters", *columns.values()):
        table.add_column(column, justify="left" if column == "mode" else "right", no_wrap=True)
    for row in figures["rows"]:
        shown = ("" if row[name] is None else f"{row[name]:,}" for name in columns)
        table.add_row(row["mode"], f"{row['num_adapters']:,}", *shown)
    console.print(table)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.trace", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trace", type=Path, required=True, help=f"a CSV file with the columns {', '.join(TRACE_COLUMNS)}")
    add("--minutes", type=float, default=10.0, help="of the trace, as recorded (default: %(default)s)")
    add("--limit", type=int, default=None, help="take at most this many requests (default: all of those minutes)")
    add("--load", type=float, default=0.8, help="offered over the base's capacity (default: %(default)s)")
    add("--speedup", type=float, default=None, help="arrivals this much faster than recorded; capacity is not measured")
    add("--capacity-prompts", type=int, default=1000, help="requests that measure capacity (default: %(default)s)")
    add("--modes", default="base,prefill-only", help=f"of {', '.join(MODES)}, with commas (default: %(default)s)")
    add("--num-adapters", type=int, default=1000, help="(default: %(default)s)")
    add("--adapter-distribution", default="zipf", help=f"{', '.join(DISTRIBUTIONS)} (default: %(default)s)")
    add("--bank-adapters", type=int, default=64, help="adapters that the bank holds (default: %(default)s)")
    add("--rank", type=int, default=16, help="(default: %(default)s)")
    add_adapter_dtype(add)
    add("--ttft-ms", type=float, default=2000.0, help="bound of the first token's time (default: %(default)s)")
    add("--tpot-ms", type=float, default=50.0, help="bound of a request's mean time per token (default: %(default)s)")
    add("--model", default="llama3-8b", help="a shape preset (default: %(default)s)")
    add("--dtype", default=None, help="float32, bfloat16 or float16 (default: float32 on CPU, bfloat16 elsewhere)")
    add_quantization(add)
    add_kv_cache_dtype(add)
    add("--max-num-seqs", type=int, default=256, help="requests at a time (default: %(default)s)")
    add(
        "--max-model-len",
        type=int,
        default=None,
        help=f"prompt plus output tokens; more is clipped (default: what the trace needs, at most {LONGEST})",
    )
    add("--prefill-tokens", type=int, default=8192, help="tokens of a prefill call (default: %(default)s)")
    add(
        "--mixed-tokens",
        type=int,
        default=0,
        help="tokens of the largest call in which running requests take a step beside prompts (default: none do)",
    )
    add("--decode-steps", type=int, default=EngineConfig.decode_steps, help="while none waits (default: %(default)s)")
    add("--memory-utilization", type=float, default=0.94, help="of what the process may take (default: %(default)s)")
    add("--continue-json", type=Path, default=None, help="go on with the load and the rows of an earlier run")
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
        print(f"bench.trace: {error}", file=sys.stderr)
        return 1
    emit(figures, None)  # The file has them already.
    return 0


if __name__ == "__main__":
    sys.exit(main())
