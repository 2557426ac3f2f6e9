"""``python -m bench.coserve``: fine-tuning beside serving on one device, beside each alone and beside taking turns.

An engine serves a trace (or requests that arrive at random) while LoRA jobs of rank 16 on all seven linears are trained
in the same process. The contenders, in one command and on one copy of the weights:

- ``train-step``: training alone, whole updates as ``train.sft`` makes them; the ceiling of fine-tuning tokens.
- ``train-windows``: training alone in units, that is an idle engine.
- ``alone``: serving without training; the ceiling of latency.
- ``coserve``: units between the calls of requests, as their promise leaves room (``serve/engine/pacing.py``).
- ``temporal-S``: a whole update between two calls every S seconds, for each of ``--temporal-seconds``.

Fine-tuning tokens are those of rows without padding, from the first arrival to the last one. Attainment is the part of
all requests that keep what FlexLLM, Loquetier and DeltaServe ask for (``bench/coserve_figures.py``). The figures are
written after each contender, and ``--continue-json`` goes on with them.
"""

import argparse
import dataclasses
import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.coserve_figures import attainment, by_second, latencies, over, published, tokens_per_second
from bench.coserve_model import poisson
from bench.coserve_parts import Every, Turns, WholeSteps, make_trainer, run_for
from bench.engine_contenders import WatchedEngine, engine_config
from bench.trace import digest_of, draw, longest_of, rate_of
from preft_jax.cli import add_kv_cache_dtype, add_quantization, hyphenated, quantization_of
from preft_jax.errors import ConfigError, PreftError
from preft_jax.loading import load_model, serving_model
from preft_jax.models.layer import Remat
from preft_jax.sampling.parameters import SamplingParams
from preft_jax.text.chat import EncodedPrompt
from serve.bench.datasets import TRACE_COLUMNS, Trace, read_trace
from serve.bench.environment import environment
from serve.bench.load import EngineTarget, LoadRequest
from serve.bench.output import emit, keep
from serve.bench.plots import check_plotting
from serve.engine.pacing import Promise
from serve.engine.request import Request
from train.coserve import Training, TrainingUnit
from train.cutting import WindowOptions

SCHEMA = "preft-jax/coserve/1"
NAMES = ("train-step", "train-windows", "alone", "coserve", "temporal")
PREFILL_SEQS = 32


@dataclasses.dataclass
class Machine:
    """What contenders share."""

    args: argparse.Namespace
    engine: WatchedEngine
    turns: Turns
    windows: Training
    steps: WholeSteps
    tokens_per_update: int
    units_per_update: float

    def tokens_of(self, since: float) -> list[tuple[float, float]]:
        """Return when units of this turn were over, in seconds since some time, and the tokens that each stands for."""
        each = [
            self.tokens_per_update / (self.units_per_update if isinstance(unit, TrainingUnit) else 1)
            for _, unit in self.turns.ends
        ]
        return [(end - since, tokens) for (end, _), tokens in zip(self.turns.ends, each, strict=True) if end >= since]

    def memory(self) -> dict[str, Any]:
        """Return what is used of the device's memory, and who leased how much, in GiB."""
        stats, budget = jax.local_devices()[0].memory_stats() or {}, self.engine.memory
        found = {name: stats.get(name) for name in ("bytes_in_use", "peak_bytes_in_use")}
        shares = {} if budget is None else budget.shares()
        return {
            **{name.replace("bytes_", "gib_"): round(v / 2**30, 3) for name, v in found.items() if v is not None},
            "shares_gib": {name: round(size / 2**30, 3) for name, size in shares.items()},
        }


def check(args: argparse.Namespace) -> None:
    """Raise ``ConfigError`` for options that are out of range."""
    for name in ("jobs", "rows", "seq", "rank", "max_num_seqs", "prefill_tokens", "window_tokens", "window_layers"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    for name in ("minutes", "train_seconds", "tpot_ms", "ttft_ms", "speedup", "slowdown"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; give a number above 0")
    for name in args.contenders.split(","):
        if name not in NAMES:
            raise ConfigError(f"--contenders has {name!r}; allowed: {', '.join(NAMES)}")
    for name in ("request_rate", "temporal_seconds"):
        if not all(0 < value < math.inf for value in numbers(args, name)):
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)!r}; give numbers above 0")
    if args.speedup is not None and args.trace is None:
        raise ConfigError("--speedup is of a trace; give --trace, or --request-rate")
    if args.plot is not None:
        check_plotting(args.plot)


def numbers(args: argparse.Namespace, name: str) -> list[float]:
    """Return the numbers of an option that takes several."""
    try:
        return [float(text) for text in getattr(args, name).split(",")]
    except ValueError:
        raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)!r}; give numbers, with commas") from None


def traces(args: argparse.Namespace) -> dict[float, Trace]:
    """Return what arrives at each rate, in requests per second."""
    seconds, found = 60 * args.minutes, {}
    if args.trace is None:
        for rate in numbers(args, "request_rate"):
            drawn = poisson(rate, seconds, args.prompt_tokens, args.output_tokens)
            if not drawn:
                raise ConfigError(f"no request arrives in {args.minutes:g} minutes at {rate:g} a second; raise one")
            arrivals, prompts, outputs = (list(column) for column in zip(*drawn, strict=True))
            found[rate] = Trace(arrivals=[a / 1e3 for a in arrivals], prompt_lens=prompts, output_lens=outputs)
        return found
    if args.speedup is not None:
        trace = read_trace(args.trace, minutes=args.minutes * args.speedup, speedup=args.speedup)
        return {round(rate_of(trace), 4): trace}
    for rate in numbers(args, "request_rate"):
        # The first requests of the trace, as many as come in that time, at that rate: a trace is sparse in places.
        trace = read_trace(args.trace, limit=max(2, round(rate * seconds)))
        if not (speedup := rate / rate_of(trace)):
            raise ConfigError(f"--trace: the first {len(trace.arrivals)} requests of {args.trace} come all at once")
        found[rate] = dataclasses.replace(trace, arrivals=[a / speedup for a in trace.arrivals])
    return found


def read_earlier(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows that this run goes on with; raise ``ConfigError`` if they are of something else."""
    if args.continue_json is None:
        return []
    try:
        earlier = json.loads(args.continue_json.read_text())
        options, rows, device = earlier["options"], earlier["rows"], earlier["device"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--continue-json: {args.continue_json} holds no figures of bench.coserve: {error!r}"
        ) from None
    own = shared_options(args)
    free = ("contenders", "request_rate", "temporal_seconds", "train_seconds")
    other = sorted(name for name in own if name not in free and own[name] != options.get(name))
    if other:
        said = ", ".join(f"{name} {options.get(name)!r}" for name in other)
        raise ConfigError(f"--continue-json: {args.continue_json} was made with {said}; give the same options")
    if device != environment()["device"]:
        raise ConfigError(f"--continue-json: {args.continue_json} was made on {device}; go on there")
    return rows


def shared_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that the figures hold, by name."""
    own = ("output_json", "continue_json", "plot")
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(args).items()
        if name not in own
    } | {"trace": args.trace and args.trace.name}


def make_machine(args: argparse.Namespace, served: Sequence[Trace], console: Console) -> Machine:
    """Load the weights, compile everything, and time some updates."""
    start = time.perf_counter()
    model = serving_model(load_model(args.model, dtype=args.dtype, **quantization_of(args)), args.max_num_seqs)
    longest = max(longest_of(one, args.max_model_len, model.config.max_position_embeddings) for one in served)
    config = engine_config(args, "base", 1, ("q",), max_model_len=longest, prefill_seqs=PREFILL_SEQS)
    config = dataclasses.replace(config, reserved_bytes=int(args.reserved_gib * 2**30))
    options = {"jobs": args.jobs, "rows": args.rows, "seq": args.seq, "rank": args.rank}
    cut = WindowOptions(
        tokens=args.window_tokens, layers=args.window_layers, order=args.window_order, remat=args.window_remat
    )
    windows = Training(make_trainer(model, **options), cut)
    steps = WholeSteps(make_trainer(model, **options, remat=args.remat))
    turns = Turns()
    engine = WatchedEngine(model, config, background=turns, background_pacing=turns)
    windows.memory = engine.memory
    engine.warm_up()
    console.print(f"engine ready in {time.perf_counter() - start:.0f} s", soft_wrap=True)
    turns.takes_turn(windows)
    run_for(engine, math.inf, lambda: bool(turns.error or windows.waits) or names(turns).count("update") > 2)
    fail(turns)
    if windows.waits:
        raise ConfigError(f"--reserved-gib is {args.reserved_gib:g}, too little to train: {windows.waits}")
    # What comes before the second update is an update and what follows it.
    ends = [n for n, name in enumerate(names(turns)) if name == "update"]
    units = ends[1] - ends[0]
    console.print(f"training ready in {time.perf_counter() - start:.0f} s: {units} units an update", soft_wrap=True)
    console.print({name: round(seconds, 5) for name, seconds in windows.seconds.items()}, soft_wrap=True)
    turns.takes_turn(None)
    return Machine(args, engine, turns, windows, steps, args.jobs * args.rows * args.seq, units)


def names(turns: Turns) -> list[str]:
    """Return the names of the units that were over in a turn."""
    return [unit.name for _, unit in turns.ends if isinstance(unit, TrainingUnit)]


def fail(turns: Turns) -> None:
    """Raise ``ConfigError`` if training failed."""
    if turns.error is not None:
        raise ConfigError(f"training failed: {type(turns.error).__name__}: {turns.error}") from turns.error


def train_alone(machine: Machine, name: str) -> dict[str, Any]:
    """Return a row of training without requests: whole updates, or units of an idle engine."""
    seconds = machine.args.train_seconds
    machine.engine.sleep()
    if name == "train-windows":
        machine.turns.takes_turn(machine.windows)
        start = time.perf_counter()
        run_for(machine.engine, seconds)
        # From the end of the first unit to that of the last.
        ends = machine.tokens_of(start)
        fail(machine.turns)
        rate = sum(tokens for _, tokens in ends[1:]) / (ends[-1][0] - ends[0][0]) if len(ends) > 1 else 0.0
    else:
        trainer, times = machine.steps.trainer, []
        for _ in range(2):  # The first one is compiled.
            trainer.step()
            trainer.finish()
        start = time.perf_counter()
        while not times or time.perf_counter() - start < seconds:
            trainer.step()
            trainer.finish()
            times.append(time.perf_counter())
        rate = machine.tokens_per_update * len(times) / (times[-1] - start)
    machine.turns.takes_turn(None)
    return {"contender": name, "request_rate": None, "fine_tuning_tokens_per_s": round(rate, 1)} | machine.memory()


def serve(machine: Machine, name: str, rate: float, trace: Trace) -> dict[str, Any]:
    """Return a row of requests at a rate, and of what was trained beside them."""
    args, engine, turns = machine.args, machine.engine, machine.turns
    workload = draw(trace, [0] * len(trace.arrivals), engine.model.config.vocab_size, engine.config.max_model_len, 4)
    pacing = {"alone": None, "coserve": promise(args)}.get(name) or Every(float(name.partition("-")[2] or 1))

    def make(request: LoadRequest) -> Request:
        sampling = SamplingParams(temperature=0.0, ignore_eos=True)
        return Request(prompt=EncodedPrompt(request.prompt, ()), sampling=sampling, max_tokens=request.max_tokens)

    target = EngineTarget(engine, make, sleep=lambda seconds: run_for(engine, seconds))
    turns.takes_turn(None)
    target.run(workload.warming(0))
    if name != "alone":
        work = machine.windows if name == "coserve" else machine.steps
        turns.takes_turn(work, pacing)
        count = 3 if work is machine.steps else 1
        run_for(engine, math.inf, lambda: len(turns.ends) >= count or turns.error is not None)
    engine.most_running, start = 0, time.perf_counter()
    before = target.counters()
    result = target.run(workload.requests(False, 1.0))
    seconds, after = trace.arrivals[-1] or result.duration, target.counters()
    fail(turns)
    ends = machine.tokens_of(start)
    records = result.records
    row = {
        "contender": name,
        "request_rate": rate,
        "requests": len(records),
        "completed": len(result.completed),
        "seconds": round(seconds, 3),
        "fine_tuning_tokens_per_s": round(tokens_per_second(ends, seconds), 1),
        "attainment": attainment(records, published(args.ttft_ms, args.tpot_ms)),
        **latencies(records),
        "output_tokens_per_s": round(sum(one.output_len for one in result.completed) / result.duration, 1),
        "most_running": engine.most_running,
        **{name: after[name] - before[name] for name in ("preemptions", "recompiles", "device_failures")},
        **machine.memory(),
        "by_second": by_second(records, ends, seconds),
    }
    turns.takes_turn(None)
    return row


def promise(args: argparse.Namespace) -> Promise:
    """Return what requests are promised."""
    return Promise(tpot_ms=args.tpot_ms, ttft_ms=args.ttft_ms, percentile=args.percentile, slowdown=args.slowdown)


def contenders(args: argparse.Namespace, rates: Sequence[float]) -> list[tuple[str, float | None]]:
    """Return the turns in their order: name and request rate."""
    wanted = args.contenders.split(",")
    turns: list[tuple[str, float | None]] = [(name, None) for name in NAMES[:2] if name in wanted]
    for rate in rates:
        turns += [(name, rate) for name in ("alone", "coserve") if name in wanted]
        if "temporal" in wanted:
            turns += [(f"temporal-{seconds:g}", rate) for seconds in numbers(args, "temporal_seconds")]
    return turns


def finish(rows: list[dict[str, Any]]) -> None:
    """Add to each row what it is beside training alone and serving alone."""
    standalone = next((row["fine_tuning_tokens_per_s"] for row in rows if row["contender"] == "train-step"), None)
    for row in rows:
        if standalone and row["contender"] != "alone":
            row["of_standalone"] = round(row["fine_tuning_tokens_per_s"] / standalone, 4)
        alone = [one for one in rows if one["contender"] == "alone" and one["request_rate"] == row["request_rate"]]
        if row["request_rate"] is not None and alone:
            row["over_alone"] = over(row, alone[0])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run every contender and return the figures that the JSON line holds."""
    check(args)
    rows, console = read_earlier(args), Console(stderr=True)
    served = traces(args)
    had = {(row["contender"], row["request_rate"]) for row in rows}
    turns = [turn for turn in contenders(args, list(served)) if turn not in had]
    figures: dict[str, Any] = {
        "schema": SCHEMA,
        "options": shared_options(args),
        "traces": [
            {
                "request_rate": rate, "digest": digest_of(one), "requests": len(one.arrivals),
                "mean_prompt_tokens": round(float(np.mean(one.prompt_lens)), 1),
                "mean_output_tokens": round(float(np.mean(one.output_lens)), 1),
            }
            for rate, one in served.items()
        ],
        "rows": rows,
        **environment(),
    }  # fmt: skip
    if not turns:
        return figures
    machine = make_machine(args, list(served.values()), console)
    for name, rate in turns:
        rows.append(train_alone(machine, name) if rate is None else serve(machine, name, rate, served[rate]))
        finish(rows)
        shown = {key: value for key, value in rows[-1].items() if key not in ("by_second", "shares_gib")}
        console.print(shown, soft_wrap=True)
        keep(figures, args.output_json)
        gc.collect()
    return figures


def print_table(figures: dict[str, Any], console: Console) -> None:
    """Print one row a contender and rate."""
    options = figures["options"]
    table = Table(
        title=f"{options['model']}: {options['jobs']} LoRA r{options['rank']}, sequences of {options['seq']:,}"
    )
    columns = ("contender", "requests/s", "tokens/s trained", "of alone", "FlexLLM", "Loquetier", "DeltaServe")
    times = ("TPOT, ms", "p95", "p99", "TTFT, ms", "p95", "p99")
    for column in (*columns, *times):
        table.add_column(column, justify="left" if column == "contender" else "right", no_wrap=True)
    for row in figures["rows"]:
        share, kept = row.get("of_standalone"), row.get("attainment", {})
        latency = [row.get(f"{kind}_{of}_ms") for of in ("tpot", "ttft") for kind in ("mean", "p95", "p99")]
        table.add_row(
            row["contender"],
            "" if row["request_rate"] is None else f"{row['request_rate']:g}",
            f"{row['fine_tuning_tokens_per_s']:,.0f}",
            "" if share is None else f"{share:.1%}",
            *(f"{kept[name]:.1%}" if kept else "" for name in ("flexllm", "loquetier", "deltaserve")),
            *("" if value is None else f"{value:,.1f}" for value in latency),
        )
    console.print(table)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.coserve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--contenders", default=",".join(NAMES), help="with commas (default: %(default)s)")
    add("--trace", type=Path, default=None, help=f"CSV with the columns {', '.join(TRACE_COLUMNS)} (default: Poisson)")
    add("--request-rate", default="1,3,5", help="requests per second, with commas (default: %(default)s)")
    add("--speedup", type=float, default=None, help="of the trace's arrivals, in place of --request-rate")
    add("--minutes", type=float, default=1.0, help="of arrivals at each rate (default: %(default)s)")
    add("--prompt-tokens", type=float, default=1000.0, help="mean, without a trace (default: %(default)s)")
    add("--output-tokens", type=float, default=250.0, help="mean, without a trace (default: %(default)s)")
    add("--tpot-ms", type=float, default=45.0, help="promised, and FlexLLM's bound (default: %(default)s)")
    add("--ttft-ms", type=float, default=5000.0, help="promised, and FlexLLM's bound (default: %(default)s)")
    add("--percentile", type=float, default=0.97, help="of requests that are promised both (default: %(default)s)")
    add("--slowdown", type=float, default=None, help="what training may add to an answer's time (default: the promise)")
    add("--temporal-seconds", default="1,4", help="between whole updates, with commas (default: %(default)s)")
    add("--train-seconds", type=float, default=15.0, help="of training alone (default: %(default)s)")
    add("--model", default="llama3-8b", help="a shape preset (default: %(default)s)")
    add("--dtype", default=None, help="of the base (default: float32 on CPU, bfloat16 elsewhere)")
    add_quantization(add)
    add_kv_cache_dtype(add)
    add("--jobs", type=int, default=1, help="LoRA jobs side by side (default: %(default)s)")
    add("--rows", type=int, default=1, help="of an update of each job (default: %(default)s)")
    add("--seq", type=int, default=2048, help="tokens of a row (default: %(default)s)")
    add("--rank", type=int, default=16, help="(default: %(default)s)")
    add("--remat", default="none", choices=get_args(Remat), help="of whole updates (default: %(default)s)")
    add("--window-tokens", type=int, default=512, help="of a unit (default: %(default)s)")
    add("--window-layers", type=int, default=4, help="of a unit (default: %(default)s)")
    add("--window-order", default="layers", choices=("layers", "windows"), help="(default: %(default)s)")
    add("--window-remat", default="full", choices=("cheap", "full"), help="of units (default: %(default)s)")
    add("--max-num-seqs", type=int, default=64, help="requests at a time (default: %(default)s)")
    add("--max-model-len", type=int, default=None, help="prompt plus output (default: what the requests need)")
    add("--prefill-tokens", type=int, default=2048, help="tokens of a prefill call (default: %(default)s)")
    add("--mixed-tokens", type=int, default=0, help="tokens of the largest mixed call (default: none)")
    add("--decode-steps", type=int, default=8, help="of a call while none waits (default: %(default)s)")
    add("--memory-utilization", type=float, default=0.94, help="(default: %(default)s)")
    add("--reserved-gib", type=float, default=24.0, help="of device memory left to training (default: %(default)s)")
    add("--continue-json", type=Path, default=None, help="go on with the rows of an earlier run")
    add("--output-json", type=Path, default=None, help="also write the JSON line here, after each turn what there is")
    add("--plot", type=Path, default=None, help="also write a picture over time and over request rates here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    args = make_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    try:
        figures = run(args)
        out = Console()
        print_table(figures, out if out.is_terminal else Console(width=180))
        if args.plot is not None:
            from bench.coserve_plot import draw_picture

            draw_picture(figures, args.plot)
    except (PreftError, OSError) as error:
        print(f"bench.coserve: {error}", file=sys.stderr)
        return 1
    emit(figures, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
