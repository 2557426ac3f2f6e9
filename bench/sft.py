"""``python -m bench.sft``: fine-tuning speed and memory on one device, beside transformers + peft + torch.

Full sequences of random tokens, loss on every token, LoRA on all seven linears, AdamW, the base model in bfloat16 and
the adapter in float32: the step of ``train.sft`` through its trainer, the peer's through ``bench/peer_peft.py`` (with
``--peer``, in a process of its own before this one touches the device). FLOPs are counted as 4 N a token: forward and
backward through a frozen base of N parameters. A table for people, then one JSON line.
"""

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from preft_jax.adapters.config import AdapterConfig
from preft_jax.cli import add_quantization, hyphenated, quantization_of
from preft_jax.errors import ConfigError, PreftError
from preft_jax.loading import load_model, serving_model
from preft_jax.models.layer import Remat
from preft_jax.shapes import NUM_GROUPS
from preft_jax.text.chat import EncodedPrompt
from serve.bench.environment import environment
from serve.bench.output import emit
from train.data.batches import BatchOptions
from train.data.rows import DataOptions, Example
from train.jobs import Job, JobConfig
from train.run.log import peak_flops
from train.trainer import Trainer, TrainOptions

SCHEMA = "preft-jax/sft/1"


@dataclasses.dataclass(frozen=True)
class Variant:
    """Rows of a micro-batch, tokens of a row, micro-batches of an update, what is computed again, jobs side by side,
    documents packed into a row.
    """

    batch: int
    seq: int
    accumulation: int = 1
    remat: Remat = "none"
    jobs: int = 1
    packed: int = 1

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Parse ``4x2048``, ``1x2048/4`` accumulated, ``4x2048:cheap``, ``8x2048*8`` (jobs), ``4x2048@4`` (packed)."""
        try:
            shape, _, packed = text.partition("@")
            shape, _, jobs = shape.partition("*")
            shape, _, remat = shape.partition(":")
            shape, _, accumulation = shape.partition("/")
            batch, _, seq = shape.partition("x")
            found = cls(
                int(batch), int(seq), int(accumulation or 1), remat or "none", int(jobs or 1), int(packed or 1)  # type: ignore[arg-type]
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(
                f"{text!r} is no variant; give such as 4x2048, 1x2048/4, 8x2048:cheap*8, 4x2048@4"
            ) from error
        if min(found.batch, found.seq, found.accumulation, found.jobs, found.packed) < 1:
            raise ConfigError(f"{text!r}: every number is at least 1")
        if found.remat not in get_args(Remat) or found.batch % found.jobs or found.seq % found.packed:
            raise ConfigError(
                f"{text!r}: after ':' comes {' or '.join(get_args(Remat))}; jobs divide the rows, documents the tokens"
            )
        return found


def measure(args: argparse.Namespace, model: Any, variant: Variant) -> dict[str, Any]:
    """Train some steps; returns speed, memory and losses."""
    rng = np.random.default_rng(args.seed)
    rows, packing = variant.batch // variant.jobs, variant.packed > 1
    config = JobConfig(
        adapter=AdapterConfig(rank=args.rank, positions="all"),
        data=DataOptions(max_length=variant.seq, completion_only_loss=False),
        batches=BatchOptions(batch_size=rows, max_length=variant.seq, packing=packing),
        gradient_accumulation_steps=variant.accumulation,
        max_steps=args.steps,
    )
    count = variant.batch * variant.accumulation * variant.packed // variant.jobs
    jobs = []
    for number in range(variant.jobs):
        tokens = rng.integers(0, model.config.vocab_size, (count, variant.seq // variant.packed))
        examples = [_example(row) for row in tokens]
        jobs.append(Job(dataclasses.replace(config, name=f"job-{number}"), model, examples))
    trainer = Trainer(model, jobs, TrainOptions(gradient_checkpointing=variant.remat))
    seconds, losses = [], []
    for _ in range(args.steps):
        start = time.perf_counter()
        trainer.step()
        result = trainer.finish()
        assert result is not None
        seconds.append(time.perf_counter() - start)
        losses.append(float(np.mean([one.loss for one in result.results])))
    step = statistics.median(seconds[2:])
    rate = variant.batch * variant.accumulation * variant.seq / step
    stats = jax.local_devices()[0].memory_stats() or {}
    num_params = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "who": "preft-jax",
        **dataclasses.asdict(variant),
        "tokens_per_s": round(rate, 1),
        "tflops_4n": round(4 * num_params * rate / 1e12, 1),
        "mfu": round(4 * num_params * rate / peak, 4) if peak else None,
        "peak_gib": round(stats["peak_bytes_in_use"] / 2**30, 1) if "peak_bytes_in_use" in stats else None,
        "first_step_s": round(seconds[0], 1),
        "losses": [round(loss, 4) for loss in losses],
    }


def _example(tokens: np.ndarray) -> Example:
    mask = np.zeros((len(tokens), NUM_GROUPS), bool)
    mask[:, 0] = True
    learned = np.ones(len(tokens), bool)
    learned[0] = False
    return Example(tokens.astype(np.int32), mask, learned, EncodedPrompt([0], ()), [], 1)


def peer(args: argparse.Namespace, variant: Variant, autocast: bool) -> dict[str, Any]:
    """Measure transformers + peft + torch in a process of its own, with torch's autocast or without."""
    # Not from this project's directory: transformers would take our package of kernels for another one.
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [args.peer_python, "-P", str(Path(__file__).parent / "peer_peft.py"), "--shape", args.model]
    command += ["--batch", str(variant.batch), "--seq", str(variant.seq), "--rank", str(args.rank)]
    command += ["--steps", str(args.steps)] + (["--checkpointing"] if variant.remat != "none" else [])
    command += ["--autocast"] if autocast else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone, cwd=Path(__file__).parent)
    if done.returncode:
        raise ConfigError(f"the peer failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1]) | dataclasses.asdict(variant)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="llama3-8b", help="a shape preset (default: %(default)s)")
    add("--dtype", default=None, help="of the base (default: float32 on CPU, bfloat16 elsewhere)")
    add_quantization(add)
    add("--rank", type=int, default=16, help="(default: %(default)s)")
    add("--steps", type=int, default=6, help="updates; the first two are not counted (default: %(default)s)")
    add("--variants", default="4x2048:cheap", help="ROWSxTOKENS[/ACCUMULATED][:REMAT][*JOBS][@PACKED], with commas")
    add("--peer", default="", help="the same for the peer, with commas; :full is its gradient checkpointing")
    add("--peer-python", default=sys.executable, help="with torch, transformers and peft (default: this one)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--output-json", type=Path, default=None, help="also write the JSON line here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    args = make_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    rows = []
    try:
        if args.steps < 3:
            raise ConfigError(f"--steps is {args.steps}; give at least 3")
        for text in filter(None, args.peer.split(",")):
            for autocast in (False, True):
                rows.append(peer(args, Variant.parse(text), autocast))
                print(rows[-1], file=sys.stderr, flush=True)
        variants = [Variant.parse(text) for text in args.variants.split(",")]
        model = serving_model(load_model(args.model, dtype=args.dtype, **quantization_of(args)), 2)
        for variant in variants:
            rows.append(measure(args, model, variant))
            print(rows[-1], file=sys.stderr, flush=True)
            gc.collect()
    except (PreftError, OSError) as error:
        print(f"bench.sft: {error}", file=sys.stderr)
        return 1
    _print(args, rows)
    options = {name: value for name, value in vars(args).items() if name not in ("output_json", "peer_python")}
    emit({"schema": SCHEMA, "options": options, "rows": rows, **environment()}, args.output_json)
    return 0


def _print(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=f"{args.model}, LoRA r{args.rank} on all linears", title_justify="left")
    for column in (
        "who",
        "rows x tokens",
        "accumulated",
        "remat",
        "jobs",
        "documents",
        "tokens/s",
        "TFLOP/s (4N)",
        "MFU",
        "peak GiB",
    ):
        table.add_column(column, justify="left" if column == "who" else "right")
    for row in rows:
        mfu = row.get("mfu")
        table.add_row(
            row["who"] + (", autocast" if row.get("autocast") else ""),
            f"{row['batch']} x {row['seq']}", str(row["accumulation"]), row["remat"], str(row["jobs"]),
            str(row["packed"]),
            f"{row['tokens_per_s']:,.0f}", f"{row['tflops_4n']:,.1f}", "" if mfu is None else f"{mfu:.1%}",
            str(row.get("peak_gib") or ""),
        )  # fmt: skip
    Console(stderr=True).print(table)


if __name__ == "__main__":
    sys.exit(main())
