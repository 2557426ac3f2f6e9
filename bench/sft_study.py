"""``python -m bench.sft_study``: what adapters of each kind learn by fine-tuning, on tasks of reasoning-gym.

Kinds: LoRA on all tokens (``lora``) and on the prompt (``lora-p``), DiReFT and LoReFT on the prompt, LoRA on its last
16 tokens (``l16``) and from a marker on (``marker``: the header of the answer), and learned prefixes. All runs of a
kind, over tasks, ranks and seeds, are jobs of one trainer beside each other. Each is then evaluated on questions that
no run has learned: the loss of their answers, and the part that is answered right by the engine, greedily.

    python -m bench.sft_study --seeds 3 --ranks 1,4,16,64 --output-json study.json

Every result is written to ``--output-json`` as it comes, and a run that finds the file goes on where it was. With
``--sweep-rates`` each kind takes the learning rate with the least loss on questions of their own, at ``--sweep-ranks``
and a seed of their own; otherwise its default or ``--learning-rate``. A table for people, then one JSON line.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np

from bench.sft_study_plot import draw_picture
from bench.tables_study import sft_study
from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.edit_mask import sequence_edit_mask
from preft_jax.cli import hyphenated
from preft_jax.errors import ConfigError, PreftError, RequestError, did_you_mean
from preft_jax.loading import Model, load_model
from preft_jax.models.layer import Remat
from preft_jax.sampling.parameters import SamplingParams
from preft_jax.shapes import BANK_SITES, DTYPES
from preft_jax.text.chat import render_chat
from serve.bench.environment import environment
from serve.bench.output import emit, keep
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.request import Request
from train.data.batches import BatchOptions
from train.data.rows import DataOptions, Example, make_examples
from train.jobs import Job, JobConfig
from train.optimizer import OptimizerConfig
from train.rollouts import gym
from train.trainer import Trainer, TrainOptions

SCHEMA = "preft-jax/sft-study/1"

KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"positions": "all"}, 1e-3),
    "lora-p": ({}, 1e-3),
    "direft-p": ({"kind": "direft"}, 4e-3),
    "loreft-p": ({"kind": "loreft"}, 4e-3),
    "l16": ({"positions": "l16"}, 1e-3),
    "marker": ({}, 1e-3),
    "prefix": ({"kind": "prefix"}, 1e-2),
}
"""What an adapter of a kind is, and the learning rate that it has unless one is asked for."""

BASE = "base"

_APART = 2**20
"""Questions between those of two seeds: a question follows from the sum of its seed and its number."""

_TESTED, _SWEPT = 2**29, 2**30
"""First questions of evaluations, and of those that learning rates are chosen by."""


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """One run: an adapter of a kind and rank on a task, with a seed; ``is_swept``: to choose a learning rate by."""

    task: str
    kind: str
    rank: int
    seed: int
    learning_rate: float
    is_swept: bool = False

    @property
    def name(self) -> str:
        """The name of its job."""
        return f"{self.task}-{self.kind}-r{self.rank}-s{self.seed}-{self.learning_rate:g}"


class Study:
    """The cells that are done, in a file, and what others need.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self.model: Model = load_model(args.model, dtype=args.dtype)
        self._options = {name: value for name, value in vars(args).items() if name not in _NOT_OF_RESULTS}
        self.rows: list[dict[str, Any]] = self._found()
        self._encoded: dict[tuple[str, int, int], list[Example]] = {}
        # Made before a trainer takes memory.
        self._engine = Engine(self.model, _engine_config(args))

    def _found(self) -> list[dict[str, Any]]:
        """Return the rows of the file that there is.

        Raises:
            ConfigError: if they are of other options.
        """
        path = self._args.output_json
        if path is None or not path.exists():
            return []
        found = json.loads(path.read_text())
        for name, value in self._options.items():
            if found["options"].get(name) != value:
                raise ConfigError(
                    f"{path} was made with {name} {found['options'].get(name)!r}, and {value!r} is asked for; give the "
                    "same, or another --output-json"
                )
        return found["rows"]

    @property
    def figures(self) -> dict[str, Any]:
        """All that is known."""
        return {"schema": SCHEMA, "options": self._options, "rows": self.rows, **environment()}

    def run(self) -> None:
        """Compute what the file does not have."""
        self._base()
        for kind in self._args.kinds.split(","):
            swept = self._cells(kind, self._args.sweep_ranks, [self._args.seeds], self._args.sweep_rates, is_swept=True)
            self._train(kind, swept)
            self._train(kind, self._cells(kind, self._args.ranks, range(self._args.seeds), str(self._rate(kind))))

    def _cells(self, kind: str, ranks: str, seeds: Sequence[int], rates: str, *, is_swept: bool = False) -> list[Cell]:
        """Return the cells of a kind that are not done yet."""
        each_rate = [float(rate) for rate in rates.split(",") if rate]
        parts = itertools.product(self._args.tasks.split(","), map(int, ranks.split(",")), seeds, each_rate)
        cells = [Cell(task, kind, rank, seed, rate, is_swept) for task, rank, seed, rate in parts]
        done = {Cell(**row["cell"]) for row in self.rows}
        return [cell for cell in cells if cell not in done]

    def _rate(self, kind: str) -> float:
        """Return the learning rate of a kind: the one that was best, or asked for, or the default."""
        losses = collections.defaultdict(list)
        for row in self.rows:
            if row["cell"]["is_swept"] and row["cell"]["kind"] == kind:
                losses[row["cell"]["learning_rate"]].append(np.inf if row["loss"] is None else row["loss"])
        if losses:
            return min(losses, key=lambda rate: float(np.mean(losses[rate])))
        return self._args.learning_rate.get(kind, KINDS[kind][1])

    def _base(self) -> None:
        """Evaluate the base model: as an adapter that was not trained, and changes nothing."""
        cells = self._cells(BASE, "0", [0], "0")
        jobs = {self._job(dataclasses.replace(cell, kind="lora", rank=1, learning_rate=1e-3)): cell for cell in cells}
        trainer = Trainer(self.model, list(jobs))
        trainer.admit()
        for job, cell in jobs.items():
            self._keep(cell, job, trainer.evaluate(job, job.held_out)[0], None)

    def _train(self, kind: str, cells: Sequence[Cell]) -> None:
        """Train cells beside each other, and keep what comes of each."""
        if not cells:
            return
        print(f"{kind}: {len(cells)} runs", file=sys.stderr, flush=True)
        began = time.perf_counter()
        jobs = {self._job(cell): cell for cell in cells}
        options = TrainOptions(gradient_checkpointing=self._args.gradient_checkpointing, max_jobs=self._args.max_jobs)
        for job, loss, adapter in trained(Trainer(self.model, list(jobs), options)):
            self._keep(jobs[job], job, loss, adapter)
        print(f"{kind}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    def _job(self, cell: Cell) -> Job:
        args, adapter = self._args, adapter_config(cell.kind, cell.rank, self.model)
        first = _SWEPT if cell.is_swept else _TESTED
        return Job(
            JobConfig(
                name=cell.name, adapter=adapter, max_steps=args.max_steps,
                optimizer=OptimizerConfig(learning_rate=cell.learning_rate),
                batches=BatchOptions(batch_size=args.batch_size, max_length=args.max_length, seed=cell.seed),
            ),
            self.model,
            self._examples(cell.task, adapter, cell.seed * _APART, args.num_examples),
            self._examples(cell.task, adapter, first, args.num_eval),
        )  # fmt: skip

    def _examples(self, task: str, adapter: AdapterConfig, first: int, count: int) -> list[Example]:
        """Return questions and answers of a task from ``first`` on, as an adapter edits them."""
        key = task, first, count
        if key not in self._encoded:
            self._encoded[key] = encoded_examples(task, first, count, self.model, self._args.max_length)
        return [
            dataclasses.replace(one, edit_mask=sequence_edit_mask(one.prompt, adapter, len(one.answer)))
            for one in self._encoded[key]
        ]

    def _keep(self, cell: Cell, job: Job, loss: float | None, adapter: Adapter | None) -> None:
        """Write what came of a cell."""
        accuracy = None
        if loss is not None and not cell.is_swept:
            accuracy = self._accuracy(cell.task, adapter)
        parameters = 0 if cell.kind == BASE else sum(leaf.size for leaf in jax.tree.leaves(job.initial.params))
        row = {"cell": dataclasses.asdict(cell), "parameters": parameters, "loss": loss, "accuracy": accuracy}
        self.rows.append(row | {"failed": job.failed})
        keep(self.figures, self._args.output_json)
        print(f"{cell.name}: loss {loss}, accuracy {accuracy}", file=sys.stderr, flush=True)

    def _accuracy(self, task: str, adapter: Adapter | None) -> float:
        """Return the part of held-out questions that the engine answers right."""
        asked = list(itertools.islice(questions(task, _TESTED), self._args.num_answers))
        requests = [
            Request(
                prompt=[{"role": "user", "content": entry["question"]}], adapter=adapter,
                sampling=SamplingParams(temperature=0.0), max_tokens=self._args.max_new_tokens,
            )
            for entry in asked
        ]  # fmt: skip
        scorer, done = gym.dataset(task, _TESTED), self._engine.generate(requests)
        scores = [scorer.score_answer(one.text.strip(), entry) for one, entry in zip(done, asked, strict=True)]
        return float(np.mean([score == 1 for score in scores]))


def encoded_examples(task: str, first: int, count: int, model: Model, max_length: int) -> list[Example]:
    """Return the examples of ``count`` questions of a task, without those that are too long.

    Raises:
        ConfigError: if most are.
    """
    found = list[Example]()
    for entry in itertools.islice(questions(task, first), count):
        row = {
            "prompt": [{"role": "user", "content": entry["question"]}],
            "completion": [{"role": "assistant", "content": entry["answer"]}],
        }
        with contextlib.suppress(RequestError):  # It is too long.
            found += make_examples(row, model, AdapterConfig(), DataOptions(max_length=max_length))
    if 2 * len(found) < count:
        raise ConfigError(f"most questions of {task} are longer than --max-length {max_length}; raise it")
    return found


def questions(task: str, first: int) -> Iterator[dict[str, Any]]:
    """Yield the questions of a task, the first of which is made from the seed ``first``.

    Raises:
        ConfigError: if there is no such task, or a question has no one answer.
    """
    dataset = gym.dataset(task, first)
    for number in itertools.count():
        entry = dataset[number]
        if not isinstance(entry["answer"], str):
            raise ConfigError(f"questions of {task} have no one answer to learn; choose another task")
        yield entry


def adapter_config(kind: str, rank: int, model: Model) -> AdapterConfig:
    """Return what an adapter of a kind is; a marker is the header that a chat has before an answer."""
    fields: dict[str, Any] = KINDS[kind][0]
    if kind == "marker":
        chat = [{"role": "user", "content": "?"}]
        asked = render_chat(model.tokenizer, chat, add_generation_prompt=False).token_ids
        fields = fields | {"alora_invocation_tokens": tuple(render_chat(model.tokenizer, chat).token_ids[len(asked) :])}
    return AdapterConfig(rank=rank, **fields)


def trained(trainer: Trainer) -> Iterator[tuple[Job, float | None, Adapter]]:
    """Train jobs, and yield each that ends with its loss on what is held out (None: it failed) and its adapter."""
    while trainer.jobs:
        trainer.step()
        if any(job.done for job in trainer.running):
            trainer.finish()
        for job in [job for job in trainer.running if job.done]:
            loss = trainer.evaluate(job, job.held_out)[0] if job.failed is None else None
            yield job, loss, trainer.adapter_of(job)
            trainer.release(job)


def _engine_config(args: argparse.Namespace) -> EngineConfig:
    most = max(map(int, args.ranks.split(",")))
    length = args.max_length + args.max_new_tokens + most
    return EngineConfig(
        max_num_seqs=args.max_num_seqs, max_model_len=length, prefill_seqs=min(args.max_num_seqs, 8), max_rank=most,
        bank_pages=8 * (-(-most // 16)) + 1, bank_sites=BANK_SITES, all_token=True,
        memory_utilization=args.memory_utilization,
    )  # fmt: skip


_NOT_OF_RESULTS = ("output_json", "output_png", "kinds", "max_num_seqs", "memory_utilization", "max_jobs")
"""Options that results do not depend on; of kinds, a file may get more."""


def _rates(text: str) -> tuple[str, float]:
    kind, _, rate = text.partition("=")
    return kind, float(rate)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sft_study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--model", default="smollm2-135m", help=f"name, path or Hub id {default}")
    add("--dtype", choices=DTYPES, default=None, help="of the base (default: float32 on CPU, bfloat16 elsewhere)")
    add("--tasks", default="chain_sum,letter_counting,spell_backward,word_sequence_reversal", help=f"{default}")
    add("--kinds", default=",".join(KINDS), help=f"{default}")
    add("--ranks", default="1,4,16,64", help=f"of a prefix, its positions {default}")
    add("--seeds", type=int, default=3, help=f"runs of each kind, rank and task {default}")
    add("--num-examples", type=int, default=2000, help=f"questions to learn {default}")
    add("--num-eval", type=int, default=128, help=f"held-out questions for losses {default}")
    add("--num-answers", type=int, default=64, help=f"held-out questions that are answered {default}")
    add("--max-steps", type=int, default=200, help=f"updates {default}")
    add("--batch-size", type=int, default=8, help=f"rows of a run's update {default}")
    add("--max-length", type=int, default=128, help=f"tokens; longer examples are left out {default}")
    add("--max-new-tokens", type=int, default=32, help=f"of an answer {default}")
    add("--learning-rate", action="append", type=_rates, default=[], metavar="KIND=RATE", help="in place of a default")
    add("--sweep-rates", default="", help="learning rates to choose from, with commas (default: none)")
    add("--sweep-ranks", default="4,64", help=f"at which they are compared {default}")
    add("--max-jobs", type=int, default=0, help="runs that are trained beside each other (default: all of a kind)")
    add("--gradient-checkpointing", choices=get_args(Remat), default="none", help=f"see train.sft {default}")
    add("--max-num-seqs", type=int, default=64, help=f"answers that are generated at a time {default}")
    add("--memory-utilization", type=float, default=0.3, help=f"of a device, for the engine {default}")
    add("--output-json", type=Path, default=None, help="where results are written as they come, and found again")
    add("--output-png", type=Path, default=None, help="also draw a picture")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise ``ConfigError`` for options that cannot work."""
    args.learning_rate = dict(args.learning_rate)
    for kind in (*args.kinds.split(","), *args.learning_rate):
        if kind not in KINDS:
            raise ConfigError(f"there is no kind {kind!r}{did_you_mean(kind, KINDS)}; allowed: {', '.join(KINDS)}")
    for name in ("seeds", "num_examples", "num_eval", "num_answers", "max_steps", "batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    args = make_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    try:
        check(args)
        study = Study(args)
        study.run()
        if args.output_png is not None:
            draw_picture(study.figures, args.output_png)
    except (PreftError, OSError) as error:
        print(f"bench.sft_study: {error}", file=sys.stderr)
        return 1
    print(sft_study(study.figures), file=sys.stderr)
    emit(study.figures, args.output_json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
