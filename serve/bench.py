"""``python -m serve.bench``: what adapters cost, side by side with the plain base model in one run.

Three modes serve the same requests: ``base`` (no adapter), ``prefill-only`` (each request's adapter edits its prompt)
and ``all-token`` (the same adapter edits every token: ordinary LoRA or ReFT). Batches of the modes alternate, so that a
machine that slows down slows all of them. Requests arrive together and are served in static batches; times are of warm,
compiled programs with resident adapters. A table for people, then one JSON line for programs.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from preft_jax.adapter import Adapter, random_adapter
from preft_jax.bank import adapter_page_counts
from preft_jax.batch import round_up
from preft_jax.chat import EncodedPrompt
from preft_jax.cli import hyphenated
from preft_jax.errors import ConfigError, PreftError
from preft_jax.generator import Generator, Limits, Request, RunShape
from preft_jax.loading import Model, load_model
from preft_jax.sampling import SamplingParams
from serve.metrics import SCHEMA, CompileCounter, RequestRecord, environment, paired_ratio, summarize
from serve.workload import DISTRIBUTIONS, Workload, adapter_configs, make_workload, parse_range

MODES = ("base", "prefill-only", "all-token")


def make_parser() -> argparse.ArgumentParser:
    """Return the command line; names are vLLM's where it has one."""
    parser = argparse.ArgumentParser(
        prog="python -m serve.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="name or path, as load_model takes it (default: %(default)s)")
    add("--dtype", default=None, help="float32, bfloat16 or float16 (default: float32 on CPU, bfloat16 elsewhere)")
    add("--num-prompts", type=int, default=64, help="requests in all (default: %(default)s)")
    add("--input-len", default="32:256", help="prompt tokens, a number or a range (default: %(default)s)")
    add("--output-len", default="16:64", help="generated tokens, a number or a range (default: %(default)s)")
    add("--num-adapters", type=int, default=16, help="adapters in all (default: %(default)s)")
    add("--adapter-kind", default="mixed", help="mixed, lora, direft or loreft (default: %(default)s)")
    add("--rank", type=int, default=None, help="rank of every adapter (default: 8, 16 and 32 mixed; 16 for one kind)")
    add("--adapter-distribution", default="uniform", choices=DISTRIBUTIONS, help="who asks how often")
    add("--zipf-alpha", type=float, default=1.0, help="exponent of the zipf distribution (default: %(default)s)")
    add("--max-num-seqs", type=int, default=16, help="requests decoded together (default: %(default)s)")
    add("--max-model-len", type=int, default=None, help="prompt plus output tokens (default: what the lengths need)")
    add("--mode", default="all", choices=(*MODES, "all"), help="default: all three, in turn")
    add("--seed", type=int, default=0, help="of prompts, lengths, adapters and users (default: %(default)s)")
    add("--output-json", type=Path, default=None, help="also write the JSON line to this file")
    return parser


@dataclasses.dataclass(eq=False)
class ModeRun:
    """One mode's generator and requests, and what was measured so far."""

    name: str
    generator: Generator
    requests: list[Request]
    shape: RunShape
    elapsed: float = 0.0
    batch_seconds: list[float] = dataclasses.field(default_factory=list)
    records: list[RequestRecord] = dataclasses.field(default_factory=list)

    def run(self, requests: Sequence[Request]) -> list[RequestRecord]:
        """Serve requests as one batch; token times count from the beginning of the mode's first batch."""
        start = time.perf_counter()
        done = list(self.generator.run(requests, shape=self.shape, base_only=self.name == "base"))
        return [
            RequestRecord(len(requests[i].prompt.token_ids), [self.elapsed + t - start for t in completion.token_times])
            for i, completion in done
        ]

    def measure(self, batch: Sequence[Request]) -> None:
        """Serve one batch and record it."""
        start = time.perf_counter()
        records = self.run(batch)
        self.batch_seconds.append(time.perf_counter() - start)
        self.elapsed += self.batch_seconds[-1]
        self.records += records

    def warm_up(self) -> None:
        """Make all adapters resident and compile every program by serving one short request."""
        self.generator.load_adapters([r.adapter for r in self.requests if r.adapter is not None])
        short = dataclasses.replace(self.requests[0], prompt=EncodedPrompt([0], ()), max_tokens=2)
        for _ in self.generator.run([short], shape=self.shape, base_only=self.name == "base"):
            pass


def make_modes(
    model: Model, workload: Workload, adapters: Sequence[Adapter], args: argparse.Namespace
) -> list[ModeRun]:
    """Return the modes that were asked for, each with a generator of its own."""
    longest = max(len(p) + n for p, n in zip(workload.prompts, workload.output_lens, strict=True))
    most = model.config.max_position_embeddings
    counts = [max(adapter_page_counts(adapter.config, model.config).values()) for adapter in adapters]
    limits = Limits(
        max_num_seqs=args.max_num_seqs,
        max_model_len=min(round_up(longest, 64), most) if args.max_model_len is None else args.max_model_len,
        prefill_seqs=min(args.max_num_seqs, 8),
    )
    runs = []
    for name in MODES if args.mode == "all" else (args.mode,):
        own: Sequence[Adapter | None] = [None] * len(adapters) if name == "base" else adapters
        if name == "all-token":
            own = [Adapter(dataclasses.replace(a.config, positions="all"), a.params) for a in adapters]
        requests = [
            Request(
                prompt=EncodedPrompt(prompt, ()),
                adapter=own[user],
                sampling=SamplingParams(temperature=0.0, ignore_eos=True),
                max_tokens=output_len,
            )
            for prompt, output_len, user in zip(workload.prompts, workload.output_lens, workload.users, strict=True)
        ]
        pages = 1 if name == "base" else 1 + sum(counts)
        generator = Generator(model, dataclasses.replace(limits, bank_pages=pages))
        runs.append(ModeRun(name, generator, requests, generator.run_shape(requests)))
    return runs


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress


def measure(runs: Sequence[ModeRun], num_prompts: int, max_num_seqs: int, console: Console) -> dict[str, Any]:
    """Warm every mode up, then serve their batches in turn; return the figures."""
    with _progress(console) as progress:
        task = progress.add_task("compiling", total=len(runs))
        for run in runs:
            run.warm_up()
            progress.advance(task)
        starts = range(0, num_prompts, max_num_seqs)
        task = progress.add_task("serving", total=len(starts) * len(runs))
        with CompileCounter() as compiles:
            for number, at in enumerate(starts):
                for run in runs if number % 2 == 0 else runs[::-1]:
                    run.measure(run.requests[at : at + max_num_seqs])
                    progress.advance(task)
    figures: dict[str, Any] = {
        "modes": {run.name.replace("-", "_"): summarize(run.records, run.elapsed) for run in runs},
        "recompiles": compiles.count,
    }
    base = next((run for run in runs if run.name == "base"), None)
    if base is not None:
        figures["ratio_to_base"] = {
            run.name.replace("-", "_"): paired_ratio(base.batch_seconds, run.batch_seconds) for run in runs
        }
    return figures


def print_table(figures: dict[str, Any], console: Console) -> None:
    """Print the figures of each mode, one row a mode."""
    table = Table(title="output tokens/s, and latency in milliseconds (mean; p99)")
    for column in ("mode", "output tok/s", "vs base", "TTFT", "TPOT", "ITL", "E2EL"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for name, mode in figures["modes"].items():
        ratio = figures.get("ratio_to_base", {}).get(name, {})
        interval = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if "low" in ratio else ""
        table.add_row(
            name,
            f"{mode['output_throughput']:.1f}",
            f"{ratio['mean']:.3f}{interval}" if ratio else "",
            *(f"{mode[f'mean_{key}_ms']:.0f}; {mode[f'p99_{key}_ms']:.0f}" for key in ("ttft", "tpot", "itl", "e2el")),
        )
    console.print(table)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark and return the figures that the JSON line holds."""
    for name in ("num_prompts", "num_adapters", "max_num_seqs"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    if args.seed < 0:
        raise ConfigError(f"--seed is {args.seed}; give at least 0")
    if not 0 <= args.zipf_alpha < 100:
        raise ConfigError(f"--zipf-alpha is {args.zipf_alpha}; give a number from 0 to 100")
    if args.output_json is not None:
        args.output_json.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    input_len, output_len = parse_range(args.input_len, "--input-len"), parse_range(args.output_len, "--output-len")
    configs = adapter_configs(args.num_adapters, args.adapter_kind, args.rank)
    with console.status(f"loading {args.model}") if console.is_terminal else contextlib.nullcontext():
        model = load_model(args.model, dtype=args.dtype)
    keys = jax.random.split(jax.random.key(args.seed), args.num_adapters)
    adapters = [random_adapter(config, model.config, key) for config, key in zip(configs, keys, strict=True)]
    workload = make_workload(
        num_prompts=args.num_prompts,
        input_len=input_len,
        output_len=output_len,
        num_adapters=args.num_adapters,
        distribution=args.adapter_distribution,
        zipf_alpha=args.zipf_alpha,
        vocab_size=model.config.vocab_size,
        seed=args.seed,
    )
    figures = measure(make_modes(model, workload, adapters, args), args.num_prompts, args.max_num_seqs, console)
    options = {name: value for name, value in vars(args).items() if name != "output_json"}
    return {"schema": SCHEMA, "options": options, **figures, **environment()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    args = make_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    try:
        figures = run(args)
        print_table(figures, Console())
        line = json.dumps(figures, allow_nan=False)
        if args.output_json is not None:
            args.output_json.write_text(line + "\n")
    except (PreftError, OSError) as error:
        print(f"serve.bench: {error}", file=sys.stderr)
        return 1
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
