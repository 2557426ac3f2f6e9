"""``python -m bench.cpu_generation``: greedy generation on the CPU beside Hugging Face transformers with torch.

The same model, prompts and output lengths, float32, on the same cores; the two sides alternate, round after round, and
the ratio is of whole requests (prefill and decode). The adapter rows compare one LoRA on all seven linears: ours
prefill-only and ours all-token, both against transformers + peft, which applies it to every token. The peer runs in a
Python of its own (``--peer-python``) that has torch, transformers and peft.
"""

import argparse
import dataclasses
import json
import os
import subprocess
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

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.init import random_adapter
from preft_jax.cli import hyphenated
from preft_jax.io.adapter_files import save_adapter
from preft_jax.io.hf import save_hf_model
from preft_jax.loading import Model, load_model
from preft_jax.sampling.parameters import SamplingParams
from preft_jax.text.chat import EncodedPrompt
from serve.bench.environment import environment
from serve.bench.output import emit
from serve.engine.engine import Engine
from serve.engine.request import Request
from serve.generate import config_for

SCHEMA = "preft-jax/cpu-generation/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One row: a batch of prompts, and whose adapter each side applies (``None``, ``prefill-only`` or
    ``all-token``).
    """

    name: str
    batch: int
    prompt_len: int
    new_tokens: int
    adapter: str | None = None


CASES = (
    Case(name="base, batch 1", batch=1, prompt_len=64, new_tokens=128),
    Case(name="base, batch 16", batch=16, prompt_len=64, new_tokens=64),
    Case(name="one LoRA, batch 1: prefill-only", batch=1, prompt_len=64, new_tokens=128, adapter="prefill-only"),
    Case(name="one LoRA, batch 1: all-token", batch=1, prompt_len=64, new_tokens=128, adapter="all-token"),
    Case(name="one LoRA, batch 16: prefill-only", batch=16, prompt_len=64, new_tokens=64, adapter="prefill-only"),
    Case(name="one LoRA, batch 16: all-token", batch=16, prompt_len=64, new_tokens=64, adapter="all-token"),
)


class Peer:
    """The other process."""

    def __init__(self, python: str, model_dir: Path, adapter_dir: Path, threads: int):
        script = Path(__file__).with_name("peer_hf.py")
        self._process = subprocess.Popen(
            # Without -P, bench/kernels.py would stand for a package of the peer's.
            [python, "-P", str(script), str(model_dir), str(adapter_dir), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )
        self.versions: dict[str, str] = self._read()["versions"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the peer process ended; its own message is above")
        return json.loads(line)

    def generate(self, prompts: list[list[int]], new_tokens: int, *, adapter: bool) -> dict[str, Any]:
        """Return the peer's ``seconds`` and ``tokens``."""
        assert self._process.stdin is not None
        command = {"prompts": prompts, "new_tokens": new_tokens, "adapter": adapter}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def make_ours(model: Model, case: Case, adapter: Adapter | None, prompts: list[list[int]]) -> Any:
    """Return a function that generates the case once and returns its seconds and tokens."""
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    requests = [
        Request(prompt=EncodedPrompt(p, ()), adapter=adapter, sampling=sampling, max_tokens=case.new_tokens)
        for p in prompts
    ]

    engine = Engine(model, config_for(model, requests, max_num_seqs=case.batch))

    def once() -> dict[str, Any]:
        start = time.perf_counter()
        done = engine.generate(requests)
        return {"seconds": time.perf_counter() - start, "tokens": [one.token_ids for one in done]}

    return once


def run_case(model: Model, case: Case, adapters: dict[str, Adapter], peer: Peer, rounds: int) -> dict[str, Any]:
    """Alternate the two sides and return their figures; the first round of each warms it up and is not counted."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(100, model.config.vocab_size, (case.batch, case.prompt_len)).tolist()
    ours_once = make_ours(model, case, adapters[case.adapter] if case.adapter else None, prompts)
    ours, theirs = [], []
    mine, other = {}, {}
    for number in range(rounds + 1):
        mine = ours_once()
        other = peer.generate(prompts, case.new_tokens, adapter=case.adapter is not None)
        if number:
            ours.append(mine["seconds"])
            theirs.append(other["seconds"])
    ratios = np.asarray(theirs) / np.asarray(ours)
    tokens = case.batch * case.new_tokens
    equal = np.mean([a == b for a, b in zip(mine["tokens"], other["tokens"], strict=True)])
    return {
        "case": case.name,
        "ours_tokens_per_s": round(tokens / float(np.median(ours)), 2),
        "peer_tokens_per_s": round(tokens / float(np.median(theirs)), 2),
        "ratio": round(float(np.median(ratios)), 3),
        "ratio_min": round(float(ratios.min()), 3),
        "ratio_max": round(float(ratios.max()), 3),
        "rounds": rounds,
        "same_text": None if case.adapter == "prefill-only" else round(float(equal), 3),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run every case and return the figures that the JSON line holds."""
    console = Console(stderr=True)
    model = load_model(args.model, dtype="float32")
    config = AdapterConfig(rank=16, positions="all")
    adapter = random_adapter(config, model.config, jax.random.key(0))
    adapters = {
        "all-token": adapter,
        "prefill-only": Adapter(dataclasses.replace(config, positions="prompt"), adapter.params),
    }
    with tempfile.TemporaryDirectory() as scratch:
        model_dir, adapter_dir = Path(scratch, "model"), Path(scratch, "adapter")
        save_hf_model(model_dir, model.config, model.params)
        save_adapter(adapter_dir, adapter, format="peft")
        peer = Peer(args.peer_python, model_dir, adapter_dir, args.threads)
        rows = []
        for case in CASES:
            rows.append(run_case(model, case, adapters, peer, args.rounds))
            console.print(f"{case.name}: {rows[-1]['ratio']}x")
        peer.close()
    return {"schema": SCHEMA, "cases": rows, "peer_versions": peer.versions, "threads": args.threads, **environment()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu_generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2-135m", help="default: %(default)s")
    parser.add_argument("--peer-python", required=True, help="a Python that has torch, transformers and peft")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the peer (default: all cores)")
    parser.add_argument("--output-json", type=Path, default=None, help="also write the JSON line to this file")
    args = parser.parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    figures = run(args)
    table = Table(title="greedy generation on the CPU, tokens/s of whole requests")
    for column in ("case", "ours", "transformers", "ratio (min to max)", "same text"):
        table.add_column(column)
    for row in figures["cases"]:
        table.add_row(
            row["case"],
            f"{row['ours_tokens_per_s']:.1f}",
            f"{row['peer_tokens_per_s']:.1f}",
            f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
            "" if row["same_text"] is None else f"{row['same_text']:.0%}",
        )
    Console().print(table)
    emit(figures, args.output_json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
