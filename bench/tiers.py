"""``python -m bench.tiers``: what a request pays for where its adapter is: in the bank, in host memory, or on disk.

Random adapters of one kind and rank are written to a temporary directory and served by an engine with a store.

- TTFT: one request at a time, each with a prompt of its own, for the base model and for each tier: ``bank`` (rank pages
  on the device), ``host`` (in host memory, on a GPU pinned), ``kept`` (in a file of the state directory, read past the
  system's page cache), ``directory`` (the adapter's own directory is read, checked, folded and cut).
- Bytes per second, of rank pages: from directory or kept file to host memory, and from there to the bank.
- Staging: ``--num-prompts`` requests of one token each arrive at once, each with an adapter that must come from
  host memory, beside the same prompts with adapters that are in the bank already; sides alternate. Where the ratio of
  their times is 1, copies are hidden behind other prompts' prefill.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.engine_contenders import Adapters
from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.allocator import BankAllocator
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.init import random_adapter
from preft_jax.adapters.pages import num_rank_pages
from preft_jax.cli import add_adapter_dtype, hyphenated
from preft_jax.errors import ConfigError, PreftError
from preft_jax.io.adapter_files import save_adapter
from preft_jax.loading import Model, load_model, serving_model
from preft_jax.models.batch import round_up
from preft_jax.sampling.parameters import SamplingParams
from preft_jax.text.chat import EncodedPrompt
from serve.bench.environment import environment
from serve.bench.load import EngineTarget, LoadRequest
from serve.bench.output import emit
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.request import Request
from serve.engine.residency import Load
from serve.store.files import AdapterFiles
from serve.store.host import AdapterStore
from serve.store.host_copy import pin
from serve.store.names import Registered, Registry

SCHEMA = "preft-jax/tiers/1"

ON_DISK = 4
"""Adapters on disk; host memory has room for two of them where they are to be read again each time."""


def _uncached(directory: Path) -> None:
    """Let the system forget the files of a directory that it holds in memory."""
    os.sync()
    for file in directory.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


class Bench:
    """Engines of one shape, one after the other, and adapters on disk in ``directory``."""

    def __init__(self, args: argparse.Namespace, directory: Path):
        self._args = args
        self._directory = directory
        self._model: Model = serving_model(load_model(args.model, dtype=args.dtype), args.prefill_seqs)
        self._rng = np.random.default_rng(args.seed)
        config = AdapterConfig(kind=args.adapter_kind, rank=args.rank)
        self._paths = [directory / f"adapter-{i}" for i in range(ON_DISK)]
        for i, path in enumerate(self._paths):
            save_adapter(path, random_adapter(config, self._model.config, jax.random.key(i)))
        self._known = pin(self._files().read(str(self._paths[0])).known)
        self.adapter_bytes = self._known.num_bytes

    def _files(self, kept: Path | None = None) -> AdapterFiles:
        return AdapterFiles(self._model, kept, dtype=self._args.adapter_dtype)

    def _engine(self, store: AdapterStore | None) -> Engine:
        args = self._args
        engine = Engine(
            self._model,
            EngineConfig(
                max_num_seqs=args.prefill_seqs,
                max_model_len=round_up(max(*args.lengths, args.input_len) + 2, 64),
                prefill_tokens=args.prefill_tokens,
                prefill_seqs=args.prefill_seqs,
                max_rank=args.rank,
                adapter_dtype=args.adapter_dtype,
                bank_pages=1 + 2 * args.prefill_seqs * num_rank_pages(args.rank),
                memory_utilization=args.memory_utilization,
                prefix_caching=False,
            ),
            store=store,
        )
        engine.warm_up()
        return engine

    def _request(self, prompt: list[int], adapter: Adapter | Registered | None, max_tokens: int) -> Request:
        sampling = SamplingParams(temperature=0.0, ignore_eos=True)
        return Request(prompt=EncodedPrompt(prompt, ()), adapter=adapter, sampling=sampling, max_tokens=max_tokens)

    def _prompt(self, length: int) -> list[int]:
        return self._rng.integers(0, self._model.config.vocab_size, length).tolist()

    # Time to first token

    def tiers(self) -> list[dict[str, Any]]:
        """Return TTFT by tier, and for those beyond the bank how fast rank pages come from there."""
        repeats, size = self._args.repeats, self._known.num_bytes
        store = AdapterStore(self._files(), Registry(), host_bytes=4 * size, pin=pin)
        engine = self._engine(store)
        one = store.register("one", self._paths[0])
        for adapter in (None, one):
            self._ttft(engine, adapter)
        rows = [
            _row("base", [self._ttft(engine, None) for _ in range(repeats)]),
            _row("bank", [self._ttft(engine, one) for _ in range(repeats)]),
        ]
        found = []
        for _ in range(repeats):
            engine.adapters.reset()
            found.append(self._ttft(engine, one))
        rows.append({**_row("host", found), "gb_per_s": self._link(engine)})
        del engine
        gc.collect()
        for tier, kept in (("kept", self._directory / "kept"), ("directory", None)):
            # One adapter may take half of the room, so that of four in turn none is there when it is asked for.
            store = AdapterStore(self._files(kept), Registry(), host_bytes=2 * size, pin=pin)
            engine = self._engine(store)
            adapters = [store.register(f"adapter-{i}", path) for i, path in enumerate(self._paths)]
            self._ttft(engine, adapters[-1])
            found, before = [], store.tiers()
            for i in range(repeats):
                _uncached(self._directory)
                found.append(self._ttft(engine, adapters[i % ON_DISK]))
            loads, num_bytes, seconds = (
                store.tiers()[n] - before[n] for n in ("loads", "loaded_bytes", "load_seconds")
            )
            if loads != repeats:
                raise ConfigError(f"{loads} of {repeats} requests found their adapters on disk")
            rows.append({**_row(tier, found), "gb_per_s": round(num_bytes / seconds / 1e9, 3)})
            store.close()
            del engine
            gc.collect()
        return rows

    def _ttft(self, engine: Engine, adapter: Registered | None) -> float:
        """Return the seconds from a request until its first token, nothing else running."""
        start, first = time.perf_counter(), 0.0
        engine.add(self._request(self._prompt(self._args.input_len), adapter, 2))
        while engine.has_work:
            for output in engine.step():
                if output.finish_reason == "error":
                    raise ConfigError(f"a request failed: {output.error}")
                first = first or time.perf_counter() - start
        return first

    def _link(self, engine: Engine) -> float:
        """Return the GB/s of rank pages from host memory into the bank, of as many adapters as a prefill call takes."""
        allocator = BankAllocator(engine.config.bank_pages)
        loads = [
            Load(str(i), self._known.slabs, allocator.allocate(self._known.sites))
            for i in range(self._args.prefill_seqs)
        ]
        times = []
        for _ in range(4):
            start = time.perf_counter()
            engine.runner.write_adapters(engine.runner.copy_adapters(loads))
            jax.block_until_ready(engine.runner.bank)
            times.append(time.perf_counter() - start)
        engine.adapters.reset()
        return round(len(loads) * self._known.num_bytes / min(times[1:]) / 1e9, 3)

    # Staging beside prefill

    def staging(self) -> list[dict[str, Any]]:
        """Return, for each prompt length, the time of prompts whose adapters must be copied, over that of others."""
        engine, seqs = self._engine(None), self._args.prefill_seqs
        users = Adapters(self._model.config, self._args.adapter_kind, self._args.rank, "float32", 1)
        adapters = [users.make(i, "prompt") for i in range(self._args.num_prompts)]
        for adapter in adapters:
            engine.adapters.put(adapter.digest, self._known)
        rows = []
        for length in self._args.lengths:
            prompts = [self._prompt(length) for _ in adapters]
            seconds: dict[int, list[float]] = {len(adapters): [], seqs: []}
            for number in range(1 + self._args.rounds):
                for count, found in seconds.items():
                    engine.adapters.reset()
                    if count == seqs:
                        self._serve(engine, prompts[:seqs], adapters)
                    before = engine.stats.adapter_loads
                    took = self._serve(engine, prompts, adapters[:count])
                    loads = engine.stats.adapter_loads - before
                    if loads != (0 if count == seqs else count):
                        raise ConfigError(f"{loads} adapters were brought to the bank for {count} in turn")
                    if number:
                        found.append(took)
            staged, resident = (statistics.median(found) for found in seconds.values())
            ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
            rows.append(
                {
                    "input_len": length,
                    "staged_prompt_tokens_per_s": round(len(prompts) * length / staged, 1),
                    "resident_prompt_tokens_per_s": round(len(prompts) * length / resident, 1),
                    "ratio": round(statistics.median(ratios), 4),
                    "ratio_min": round(min(ratios), 4),
                    "ratio_max": round(max(ratios), 4),
                }
            )
        return rows

    def _serve(self, engine: Engine, prompts: Sequence[list[int]], adapters: Sequence[Adapter]) -> float:
        requests = [
            LoadRequest(arrival=0.0, prompt=p, max_tokens=1, user=i % len(adapters)) for i, p in enumerate(prompts)
        ]
        target = EngineTarget(engine, lambda r: self._request(r.prompt, adapters[r.user or 0], r.max_tokens))
        result = target.run(requests)
        failed = next((record for record in result.records if record.status != "completed"), None)
        if failed is not None:
            raise ConfigError(f"a request {failed.status}: {failed.error}")
        return result.duration


def _row(tier: str, seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "tier": tier,
        "median_ttft_ms": round(1e3 * statistics.median(seconds), 2),
        "max_ttft_ms": round(1e3 * max(seconds), 2),
    }


def hidden_at(rows: Sequence[dict[str, Any]], within: float) -> int | None:
    """Return the shortest prompt length from which on staged prompts take at most ``1 + within`` times the others'."""
    shortest = None
    for row in sorted(rows, key=lambda row: -row["input_len"]):
        if row["ratio"] > 1 + within:
            break
        shortest = row["input_len"]
    return shortest


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns the figures that the JSON line holds."""
    if args.num_prompts < 2 * args.prefill_seqs:
        raise ConfigError(f"--num-prompts is {args.num_prompts}; give at least 2 * --prefill-seqs {args.prefill_seqs}")
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(args, Path(directory))
        tiers, staging = bench.tiers(), bench.staging()
        size = bench.adapter_bytes
    options = {name: value for name, value in vars(args).items() if name != "output_json"}
    return {
        "schema": SCHEMA,
        "options": options,
        "adapter_bytes": size,
        "tiers": tiers,
        "staging": staging,
        "hidden_from_input_len": hidden_at(staging, 0.03),
        **environment(),
    }


def print_tables(figures: dict[str, Any], console: Console) -> None:
    """Print tiers and staging."""
    size = figures["adapter_bytes"] / 1e6
    tiers = Table(title=f"{figures['options']['model']}, {size:.1f} MB an adapter", title_justify="left")
    for column in ("tier", "median TTFT, ms", "max", "GB/s"):
        tiers.add_column(column, justify="left" if column == "tier" else "right")
    for row in figures["tiers"]:
        tiers.add_row(row["tier"], str(row["median_ttft_ms"]), str(row["max_ttft_ms"]), str(row.get("gb_per_s", "")))
    console.print(tiers)
    staging = Table(title="Every prompt's adapter copied, over none", title_justify="left")
    for column in ("prompt tokens", "tokens/s, copied", "tokens/s, resident", "time ratio"):
        staging.add_column(column, justify="right")
    for row in figures["staging"]:
        names = "input_len", "staged_prompt_tokens_per_s", "resident_prompt_tokens_per_s", "ratio"
        staging.add_row(*(f"{row[name]:,}" for name in names))
    console.print(staging)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tiers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="(default: %(default)s)")
    add("--dtype", default=None, help="float32, bfloat16 or float16 (default: float32 on CPU, bfloat16 elsewhere)")
    add("--adapter-kind", default="lora", choices=("lora", "direft"), help="(default: %(default)s)")
    add("--rank", type=int, default=16, help="(default: %(default)s)")
    add_adapter_dtype(add)
    add("--input-len", type=int, default=256, help="prompt tokens for TTFT (default: %(default)s)")
    add("--repeats", type=int, default=8, help="requests for each TTFT (default: %(default)s)")
    add("--lengths", default="16,32,64,128,256", help="prompt tokens for staging (default: %(default)s)")
    add("--num-prompts", type=int, default=32, help="for staging (default: %(default)s)")
    add("--rounds", type=int, default=3, help="of both sides, after one that is not counted (default: %(default)s)")
    add("--prefill-tokens", type=int, default=512, help="tokens of a prefill call (default: %(default)s)")
    add("--prefill-seqs", type=int, default=8, help="prompts of a prefill call (default: %(default)s)")
    add("--memory-utilization", type=float, default=0.9, help="of what the process may take (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--output-json", type=Path, default=None, help="also write the JSON line here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    args = make_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    try:
        args.lengths = [int(length) for length in args.lengths.split(",")]
        figures = run(args)
        print_tables(figures, Console())
        emit(figures, args.output_json)
    except (PreftError, OSError, ValueError) as error:
        print(f"bench.tiers: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
