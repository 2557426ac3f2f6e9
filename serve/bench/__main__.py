"""``python -m serve.bench``: what adapters cost, side by side with the plain base model in one run.

Three modes serve the same requests: ``base`` (no adapter), ``prefill-only`` (each request's adapter edits its prompt)
and ``all-token`` (the same adapter edits every token: ordinary LoRA or ReFT). They run on an engine in this process, or
with ``--base-url`` on a server that speaks OpenAI's API. Every round draws its own requests, which all contenders serve
in turn. Tables for people, then one JSON line for programs, which a terminal is spared.
"""

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from preft_jax.cli import add_adapter_dtype, add_kv_cache_dtype, add_mesh, add_quantization, hyphenated
from preft_jax.errors import ConfigError, PreftError
from preft_jax.io.hub import cache_dir
from serve.bench.client import ENDPOINTS
from serve.bench.contest import MODES, collect, compete
from serve.bench.environment import environment
from serve.bench.load import EngineLike
from serve.bench.metrics import SCHEMA, MetricOptions, parse_goodput, parse_metrics, parse_percentiles
from serve.bench.output import emit
from serve.bench.plots import check_plotting, save_plot
from serve.bench.report import print_report
from serve.bench.scenario import make_entries
from serve.bench.sides import QUESTION, EngineSide, ServerSide
from serve.bench.workload import DISTRIBUTIONS

_UNWRITTEN = ("output_json", "plot", "api_key")
"""Options that the JSON line leaves out."""

_ENGINE_ONLY = (
    "dtype",
    "quantization",
    "keep_layers",
    "kv_cache_dtype",
    "adapter_dtype",
    "mesh",
    "adapter_kind",
    "rank",
    "positions",
    "max_num_seqs",
    "memory_utilization",
    "bank_pages",
    "enable_prefix_caching",
)
_SERVER_ONLY = ("endpoint", "api_key", "served_model_name", "lora_modules")
_DRAWN = ("request_rate", "burstiness", "input_len", "output_len")


def _modes(text: str) -> tuple[str, ...]:
    """Parse ``--mode``: one, several with commas, or ``all``."""
    found = tuple(part.strip() for part in text.split(","))
    unknown = [name for name in found if name not in (*MODES, "all")]
    if unknown:
        raise argparse.ArgumentTypeError(f"invalid choice: {unknown[0]!r} (choose from {', '.join((*MODES, 'all'))})")
    return MODES if "all" in found else tuple(mode for mode in MODES if mode in found)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line; names are vLLM's where it has one."""
    parser = argparse.ArgumentParser(
        prog="python -m serve.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what is loaded").add_argument
    add("--model", default="smollm2-135m", help="name or path; of a server, whose tokenizer (default: %(default)s)")
    add(
        "--mode",
        type=_modes,
        default=MODES,
        help=f"{', '.join(MODES)}, several with commas, or all (default); a server's adapters are what it says of "
        "them, and where it says nothing what is named here: base,all-token, else prefill-only",
    )
    add("--dtype", default=None, help="float32, bfloat16 or float16 (default: float32 on CPU, bfloat16 elsewhere)")
    add_quantization(add)
    add_kv_cache_dtype(add)
    add_mesh(add)
    add("--max-num-seqs", type=int, default=16, help="requests decoded together (default: %(default)s)")
    add("--max-model-len", type=int, default=None, help="prompt plus output tokens (default: what the lengths need)")
    add(
        "--memory-utilization",
        type=float,
        default=0.9,
        help="part of an accelerator's memory, for the engines of all modes together (default: %(default)s)",
    )
    add("--bank-pages", type=int, default=None, help="rank pages on the device (default: all adapters', within bounds)")
    add("--enable-prefix-caching", action="store_true", help="keep the KV of finished requests (default: off)")
    add("--base-url", default=None, help="load this server instead, such as http://127.0.0.1:8000")
    add("--endpoint", default=ENDPOINTS[0], choices=ENDPOINTS, help="of the server (default: %(default)s)")
    add("--api-key", default=None, help="for the server (default: OPENAI_API_KEY)")
    add("--served-model-name", default=None, help="base model's name there (default: the first one it lists)")
    add(
        "--lora-modules",
        nargs="+",
        default=None,
        metavar="NAME",
        help="adapters' names there (default: those it lists)",
    )

    _add_requests(parser.add_argument_group("requests").add_argument)

    add = parser.add_argument_group("adapters").add_argument
    add("--num-adapters", default=None, help="how many; 1,8,64 runs each in turn (default: 16; of a server, all)")
    add("--adapter-kind", default="mixed", help="mixed, lora, direft or loreft (default: %(default)s)")
    add("--rank", type=int, default=None, help="rank of every adapter (default: 8, 16 and 32 mixed; 16 for one kind)")
    add_adapter_dtype(add)
    add("--positions", default="prompt", help="prompt tokens that prefill-only adapters edit (default: %(default)s)")
    add("--adapter-distribution", default="uniform", choices=DISTRIBUTIONS, help="who asks how often")
    add("--zipf-alpha", type=float, default=1.0, help="exponent of the zipf distribution (default: %(default)s)")

    add = parser.add_argument_group("figures").add_argument
    add("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="objectives, such as ttft:2000 tpot:50 e2el:9000")
    add("--percentile-metrics", default="ttft,tpot,itl,e2el", help="which get percentiles (default: %(default)s)")
    add("--metric-percentiles", default="50,90,99", help="which percentiles (default: %(default)s)")
    add("--output-json", type=Path, default=None, help="also write the JSON line to this file")
    add("--plot", type=Path, default=None, help="draw throughput and latencies to this PNG file")
    return parser


def _add_requests(add: Callable[..., Any]) -> None:
    add("--num-prompts", type=int, default=None, help="requests of a round (default: 32; of a trace, all it has)")
    add("--dataset-name", default="random", choices=("random", "sharegpt", "trace"), help="default: %(default)s")
    add("--dataset-path", type=Path, default=None, help="conversations as JSON (lines), or a CSV file with a trace")
    add("--input-len", default=None, help="random prompts' tokens, a number or a range (default: 32:256)")
    add("--random-prefix-len", type=int, default=0, help="tokens in front of each random prompt, the same for all")
    add("--output-len", default=None, help="generated tokens (default: 16:64; of conversations, their answers')")
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="generate all of them (default)")
    add("--trace-minutes", type=float, default=None, help="how much of it (default: 1, or --num-prompts requests)")
    add("--trace-speedup", type=float, default=1.0, help="arrivals this much faster than recorded")
    add("--request-rate", type=float, default=math.inf, help="arrivals per second (default: inf, all at once)")
    add("--burstiness", type=float, default=1.0, help="1 is a Poisson process, less comes in bursts (gamma process)")
    add("--max-concurrency", type=int, default=None, help="most requests at one time; others wait to be sent")
    add("--num-warmups", type=int, default=1, help="requests served first and not counted (default: %(default)s)")
    add("--rounds", type=int, default=1, help="turns of each contender; intervals need 3 (default: %(default)s)")
    add("--seed", type=int, default=0, help="of prompts, lengths, arrivals, adapters and users (default: %(default)s)")


def _check(args: argparse.Namespace) -> None:
    """Raise ``ConfigError`` for options that are out of range or do not go together."""
    for name in ("num_prompts", "max_num_seqs", "max_concurrency", "rounds", "bank_pages"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"{_option(name)} is {value}; give at least 1")
    for name in ("seed", "num_warmups", "random_prefix_len"):
        if not 0 <= getattr(args, name) < 2**32:
            raise ConfigError(f"{_option(name)} is {getattr(args, name)}; give 0 to {2**32 - 1}")
    if not 0 < args.memory_utilization <= 1:
        raise ConfigError(f"--memory-utilization is {args.memory_utilization}; give a number above 0, at most 1")
    if args.output_json is not None and args.output_json.is_dir():
        raise ConfigError(f"--output-json is {args.output_json}, a directory; give a file")
    if not 0 <= args.zipf_alpha < 100:
        raise ConfigError(f"--zipf-alpha is {args.zipf_alpha}; give a number from 0 to 100")
    if (args.dataset_path is None) != (args.dataset_name == "random"):
        needs = "takes no" if args.dataset_name == "random" else "needs a"
        raise ConfigError(f"--dataset-name {args.dataset_name} {needs} --dataset-path")
    source = args.dataset_name
    _check_useless(args, _ENGINE_ONLY, args.base_url is not None, "the server (--base-url) has its own")
    _check_useless(args, _SERVER_ONLY, args.base_url is None, "only a server (--base-url) has it")
    _check_useless(args, _DRAWN, source == "trace", "the trace has its own")
    _check_useless(args, ("random_prefix_len",), source != "random", "only random prompts have one")
    _check_useless(args, ("input_len",), source == "sharegpt", "conversations have their own")
    _check_useless(args, ("trace_minutes", "trace_speedup"), source != "trace", "only --dataset-name trace has it")


def _check_useless(args: argparse.Namespace, names: Sequence[str], useless: bool, why: str) -> None:
    """Raise ``ConfigError`` if one of the options was given and would do nothing."""
    defaults = make_parser()
    for name in names if useless else ():
        if getattr(args, name) != defaults.get_default(name):
            raise ConfigError(f"{_option(name)} was given, but {why}; leave it out")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _written_options(args: argparse.Namespace, counts: Sequence[int]) -> dict[str, Any]:
    """Return the options as JSON can hold them."""
    options = {name: value for name, value in vars(args).items() if name not in _UNWRITTEN}
    options["dataset_path"] = None if args.dataset_path is None else str(args.dataset_path)
    options["num_adapters"] = counts[0] if len(counts) == 1 else list(counts)
    options["request_rate"] = args.request_rate if math.isfinite(args.request_rate) else "inf"
    return options | {"mode": list(args.mode)}


def _engine(model: Any, config: Any) -> EngineLike:
    from serve.engine.engine import Engine

    return Engine(model, config)


def run(
    args: argparse.Namespace,
    make_engine: Callable[[Any, Any], Any] = _engine,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Run the benchmark, print its tables and return the figures that the JSON line holds."""
    _check(args)
    options = MetricOptions(
        percentiles=parse_percentiles(args.metric_percentiles),
        percentile_metrics=parse_metrics(args.percentile_metrics),
        goodput=parse_goodput(args.goodput),
    )
    if args.plot is not None:
        check_plotting(args.plot)
    if args.output_json is not None:
        args.output_json.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with console.status("loading") if console.is_terminal else contextlib.nullcontext():
        side = EngineSide(args, make_engine, clock, sleep) if args.base_url is None else ServerSide(args, clock)
        entries = make_entries(args, side)
    compete(entries, console)
    found = {"schema": SCHEMA, "options": _written_options(args, side.counts), **side.facts}
    found |= {**collect(entries, options), **environment()}
    out = Console()
    for who, text in side.answers():
        out.print(f"{who} to {QUESTION[0]['content']!r}: {text!r}", markup=False, highlight=False, soft_wrap=True)
    print_report(found, options, out if out.is_terminal else Console(width=140))
    if args.plot is not None:
        requests = f"{len(entries[0].rounds[0])} requests a round, {args.rounds} round{'s' * (args.rounds > 1)}"
        save_plot(args.plot, entries, f"{side.facts['model']}, {args.dataset_name}: {requests}")
    return found


def main(
    argv: Sequence[str] | None = None,
    make_engine: Callable[[Any, Any], Any] = _engine,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Run the program; returns its exit status."""
    args = make_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    try:
        if args.base_url is not None and args.api_key is None:
            args.api_key = os.environ.get("OPENAI_API_KEY")
        emit(run(args, make_engine, clock, sleep), args.output_json)
    except (PreftError, OSError) as error:
        print(f"serve.bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("serve.bench: interrupted", file=sys.stderr)
        return 130
    return 0


def _keep_programs() -> None:
    """Keep compiled programs on disk, unless the environment says where: engines of all modes share most of them."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "programs"))
        jax.config.update("jax_compilation_cache_max_size", 2 * 2**30)


if __name__ == "__main__":
    _keep_programs()
    sys.exit(main())
