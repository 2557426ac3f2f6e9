"""``python -m bench.prefill``: what adapters cost a whole prefill, beside the base model's, in one run.

Every layer of a model shape with random weights; each case packs requests with an adapter each (random rank pages in
the bank) into one prefill call. Cases and the base take turns, round after round, and a case's ratio is the median over
rounds of its time over the mean of the base calls just before and after it. The base runs the same program without a
bank. ``--implementations`` adds the same with the kernels of another implementation, against the base of its own.
"""

import argparse
import dataclasses
import functools
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.kernel_profile import breakdown, check_profiling, print_kernels, profile
from kernels import dispatch
from preft_jax.adapters.allocator import SitePages
from preft_jax.adapters.bank import Bank, Pools, bank_axes, init_bank
from preft_jax.adapters.pages import num_rank_pages
from preft_jax.cli import add_kv_cache_dtype, add_mesh, add_quantization, hyphenated, quantization_of
from preft_jax.config import PRESETS, ModelConfig
from preft_jax.errors import PreftError
from preft_jax.loading import load_model, serving_model
from preft_jax.models import forward
from preft_jax.models.batch import Span, pack_prefill
from preft_jax.models.cache import KVCache, cache_axes, init_cache, pages_for
from preft_jax.shapes import KV_DTYPES, LINEAR_SITES, NUM_GROUPS, SITES
from serve.bench.environment import environment
from serve.bench.output import emit
from serve.engine.spread import WHOLE, Spread

SCHEMA = "preft-jax/prefill/1"
PAGE_SIZE, TILE = 64, 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """``requests`` prompts of ``length`` tokens; each with an adapter of ``rank`` at ``sites`` (rank 0: the base)."""

    name: str
    requests: int
    length: int
    rank: int
    sites: tuple[str, ...] = LINEAR_SITES

    @property
    def pages(self) -> int:
        """Rank pages that the adapters take at a site, the null page included."""
        return 1 + self.requests * num_rank_pages(self.rank)


CASES = (
    Case(name="LoRA r16, 32 adapters x 256 tokens", requests=32, length=256, rank=16),
    Case(name="LoRA r16, 128 adapters x 64 tokens", requests=128, length=64, rank=16),
    Case(name="LoRA r64, 32 adapters x 256 tokens", requests=32, length=256, rank=64),
    Case(name="DiReFT r16, 32 adapters x 256 tokens", requests=32, length=256, rank=16, sites=("block",)),
    Case(name="LoRA r16, 8 adapters x 256 tokens", requests=8, length=256, rank=16),
    Case(name="LoRA r16, 4 adapters x 256 tokens", requests=4, length=256, rank=16),
)
SMALL = (
    Case(name="LoRA r16, 4 adapters x 64 tokens", requests=4, length=64, rank=16),
    Case(name="DiReFT r16, 4 adapters x 64 tokens", requests=4, length=64, rank=16, sites=("block",)),
)


def base_of(case: Case) -> Case:
    """Return the same prompts without adapters."""
    return dataclasses.replace(case, name=f"base, {case.requests} x {case.length} tokens", rank=0, sites=())


def random_bank(config: ModelConfig, num_pages: int, dtype: Any) -> Bank:
    """Return a bank whose pages, but for the null page, hold random edits."""

    @functools.partial(jax.jit, donate_argnums=0)
    def fill(pools: Pools, key: jax.Array) -> Pools:
        a_key, b_key = jax.random.split(key)
        a = jax.random.normal(a_key, pools.a_LPDR.shape, dtype) * pools.a_LPDR.shape[2] ** -0.5
        b = jax.random.normal(b_key, pools.b_LPRF.shape, dtype) * 0.02
        return Pools(a.astype(dtype).at[:, 0].set(0), pools.c_LPR, b.astype(dtype).at[:, 0].set(0))

    bank = init_bank(config, num_pages, dtype)
    keys = jax.random.split(jax.random.key(1), len(bank.sites))
    return Bank({site: fill(pools, key) for (site, pools), key in zip(bank.sites.items(), keys, strict=True)})


def make_batch(config: ModelConfig, case: Case, rng: np.random.Generator) -> Any:
    """Pack the case's prompts, each with pages of its own."""
    per = num_rank_pages(case.rank) if case.rank else 0
    kv_pages = pages_for(case.length, PAGE_SIZE)
    spans = []
    for i in range(case.requests):
        pages = SitePages(tuple(range(1 + i * per, 1 + (i + 1) * per)), (0,) * per)
        spans.append(
            Span(
                tokens=rng.integers(0, config.vocab_size, case.length).astype(np.int32),
                start=0,
                edit_mask=np.ones((case.length, NUM_GROUPS), bool),
                kv_pages=range(i * kv_pages, (i + 1) * kv_pages),
                adapter_pages=dict.fromkeys(case.sites, pages),
            )
        )
    total = case.requests * case.length
    return pack_prefill(
        spans, num_tokens=total, num_requests=case.requests, page_table_width=kv_pages, page_size=PAGE_SIZE,
        tile=min(TILE, total),
    )  # fmt: skip


class Contender:
    """One compiled prefill: a case with one implementation of the kernels. The KV cache is passed from call to call."""

    def __init__(self, spread: Spread, case: Case, params: Any, bank: Bank, cache: KVCache, implementation: str):
        self.case = case
        self._arguments = params, (bank if case.rank else None)
        self._batch = spread.put(make_batch(spread.config, case, np.random.default_rng(0)))
        function = functools.partial(forward.prefill, spread.config, max_query_len=case.length)
        with dispatch.preferring(implementation):
            start = time.perf_counter()
            args = *self._arguments, cache, self._batch
            compiled = spread.trace(function, args, out=(WHOLE, cache), donate=(2,)).lower().compile()
            self.compile_seconds = time.perf_counter() - start
        self._run = compiled
        text = compiled.as_text() or ""
        self.copies = count_copies(text, cache, bank)
        self.kernel_calls = text.count("triton_kernel_call") + text.count("tpu_custom_call")

    def __call__(self, cache: KVCache) -> tuple[float, KVCache]:
        """Prefill once; return the seconds and the cache."""
        start = time.perf_counter()
        logits, cache = self._run(*self._arguments, cache, self._batch)
        jax.block_until_ready(logits)
        return time.perf_counter() - start, cache


def count_copies(text: str, cache: KVCache, bank: Bank) -> int:
    """Return how many copies of a KV or bank buffer the optimised program makes."""
    shapes = {tuple(leaf.shape) for leaf in jax.tree.leaves((cache, bank)) if leaf.ndim > 2}
    names = [",".join(map(str, shape)) for shape in shapes]
    lines = [line for line in text.splitlines() if re.search(r"= \S+ copy(-start)?\(", line)]
    return sum(any(f"[{name}]" in line for name in names) for line in lines)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time the cases and return the figures that the JSON line holds."""
    console = Console(stderr=True)
    cases = [case for case in (SMALL if args.selection == "small" else CASES) if args.cases.search(case.name)]
    loaded = load_model(args.model, dtype=args.dtype, **quantization_of(args), mesh=args.mesh)
    model = serving_model(loaded, max(case.requests * case.length for case in cases))
    config, params, dtype = model.config, model.params, model.params["embed"].dtype
    kv_dtype = KV_DTYPES[args.kv_cache_dtype or dtype.name]
    spread = Spread(model.placement, config)
    pages = max(case.pages for case in cases)
    bank = spread.make(lambda own: random_bank(own, pages, dtype), bank_axes(SITES))()
    tokens = max(case.requests * pages_for(case.length, PAGE_SIZE) for case in cases)
    cache = spread.make(lambda own: init_cache(own, tokens, PAGE_SIZE, kv_dtype), cache_axes(config))()
    rows = []
    for implementation in args.implementations:
        bases: dict[Case, Contender] = {}
        for case in cases:
            plain = base_of(case)
            if plain not in bases:
                bases[plain] = Contender(spread, plain, params, bank, cache, implementation)
            base = bases[plain]
            edited = Contender(spread, case, params, bank, cache, implementation)
            row, cache = compare(base, edited, cache, args.rounds)
            if args.profile:
                row["base_profile"], cache = where(base, cache, args.profile, console)
                row["profile"], cache = where(edited, cache, args.profile, console)
            rows.append({"implementation": implementation, **row})
            console.print(f"{implementation}, {case.name}: {row['ratio']:.4f}", soft_wrap=True)
    return {
        "schema": SCHEMA,
        "model": args.model,
        "dtype": dtype.name,
        "num_devices": model.placement.num_devices,
        "options": {
            "rounds": args.rounds,
            "page_size": PAGE_SIZE,
            "tile": TILE,
            **quantization_of(args),
            "kv_cache_dtype": args.kv_cache_dtype,
        },
        "cases": rows,
        **environment(),
    }


def where(contender: Contender, cache: KVCache, count: int, console: Console) -> tuple[dict[str, Any], KVCache]:
    """Profile a call, print its longest kernels, and return where its time goes and the cache."""
    kept = [cache]

    def run() -> KVCache:
        _, kept[0] = contender(kept[0])
        return kept[0]

    times, span = profile(run)
    console.print(contender.case.name, highlight=False)
    print_kernels(times[:count], 1, console)
    return breakdown(times, span, 1), kept[0]


def compare(base: Contender, edited: Contender, cache: KVCache, rounds: int) -> tuple[dict[str, Any], KVCache]:
    """Time base and edited calls in turn: base, edited, base, edited, ..., base."""
    for contender in (base, edited, base, edited):
        _, cache = contender(cache)
    without, with_edits = [], []
    for _ in range(rounds):
        seconds, cache = base(cache)
        without.append(seconds)
        seconds, cache = edited(cache)
        with_edits.append(seconds)
    seconds, cache = base(cache)
    without.append(seconds)
    ratios = np.asarray(with_edits) / ((np.asarray(without[:-1]) + np.asarray(without[1:])) / 2)
    tokens = edited.case.requests * edited.case.length
    row = {
        "case": edited.case.name,
        "tokens": tokens,
        "base_ms": round(float(np.median(without)) * 1e3, 3),
        "ms": round(float(np.median(with_edits)) * 1e3, 3),
        "base_tokens_per_s": round(tokens / float(np.median(without)), 1),
        "tokens_per_s": round(tokens / float(np.median(with_edits)), 1),
        "ratio": round(float(np.median(ratios)), 4),
        "ratio_low": round(float(np.quantile(ratios, 0.25)), 4),
        "ratio_high": round(float(np.quantile(ratios, 0.75)), 4),
        "kv_and_bank_copies": edited.copies,
        "kernel_calls": edited.kernel_calls,
        "compile_s": round(edited.compile_seconds, 1),
    }
    return row, cache


def table(figures: dict[str, Any]) -> Table:
    """Return the table for people."""
    out = Table(title=f"prefill of {figures['model']}, {figures['dtype']}, beside its base")
    for name in ("kernels", "case", "tokens/s", "base tokens/s", "time over base (middle half)"):
        out.add_column(name)
    for row in figures["cases"]:
        spread = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
        out.add_row(
            row["implementation"],
            row["case"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['base_tokens_per_s']:,.0f}",
            spread,
        )
    return out


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.prefill", description=__doc__)
    parser.add_argument("--model", choices=sorted(PRESETS), default="llama3-8b", help="shape; weights are random")
    add_quantization(parser.add_argument)
    add_kv_cache_dtype(parser.add_argument)
    add_mesh(parser.add_argument)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--selection", choices=("full", "small"), default="full", help="small: a few hundred tokens")
    parser.add_argument(
        "--implementations",
        type=lambda text: text.split(","),
        default=["triton" if jax.default_backend() == "gpu" else "xla"],
        help="of the kernels, separated by commas",
    )
    parser.add_argument("--rounds", type=int, default=20, help="pairs of calls for each case")
    parser.add_argument("--profile", type=int, default=0, help="also profile, and print so many kernels (needs a GPU)")
    parser.add_argument("--cases", type=_pattern, default=re.compile(""), help="only cases that match (a pattern)")
    parser.add_argument("--output-json", type=Path, help="also write the JSON line here")
    args = parser.parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; it must be at least 1")
    runs_here = {"xla", *({"gpu": ["triton"], "tpu": ["pallas_tpu"]}.get(jax.default_backend(), []))}
    if wrong := set(args.implementations) - runs_here:
        parser.error(f"--implementations {', '.join(sorted(wrong))}: here run {', '.join(sorted(runs_here))}")
    if not any(args.cases.search(case.name) for case in (SMALL if args.selection == "small" else CASES)):
        parser.error(f"--cases {args.cases.pattern!r} matches no case of --selection {args.selection}")
    try:
        check_profiling(args.profile)
        figures = run(args)
    except PreftError as error:
        parser.error(str(error))
    Console().print(table(figures))
    emit(figures, args.output_json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
