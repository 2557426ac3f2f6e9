"""``python -m bench.accuracy``: what adapters learn of one task, by kind: held-out loss and accuracy over seeds.

The task is one of reasoning-gym's (extra ``rl``), asked as a chat. All adapters are trained beside each other on one
base model, as many jobs of one trainer: every contender of ``--adapters`` with every seed of ``--seeds``, on the same
examples and for the same number of updates; a seed draws an adapter's first weights and the order of its examples.
Then each answers the held-out questions greedily, and the task's own scorer judges the text: ``accuracy`` is the part
of answers with the full score, ``score`` the mean, which some tasks give in part. The base model goes first. Answers
may have a few tokens more than the longest true one. With ``--adapter-dtype`` each adapter also answers as rank pages
of that dtype serve it; the 95% interval of the difference is that of paired answers, and the KL divergence is the mean
over the tokens of true answers. A table for people, then one JSON line.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from preft_jax.adapters.adapter import Adapter, fold
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.own import adapter_in_fp8
from preft_jax.cli import add_adapter_dtype, hyphenated
from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError, PreftError, did_you_mean
from preft_jax.loading import Model, load_model, serving_model
from preft_jax.models.forward import forward
from preft_jax.models.params import Params
from serve.bench.environment import environment
from serve.bench.output import emit
from train.data.batches import BatchOptions
from train.data.rows import DataOptions, Example, make_examples
from train.jobs import Job, JobConfig
from train.optimizer import OptimizerConfig
from train.run.generation import answer
from train.trainer import Trainer

SCHEMA = "preft-jax/accuracy/1"

ADAPTERS = {
    "lora": AdapterConfig(kind="lora", positions="all"),
    "lora-p": AdapterConfig(kind="lora", positions="prompt"),
    "direft-p": AdapterConfig(kind="direft", positions="prompt"),
    "loreft-p": AdapterConfig(kind="loreft", positions="prompt"),
}
"""Contenders by name; ``-p`` acts on the prompt only."""

TASK_OPTIONS = (
    '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2, "operators": ["+", "-"], '
    '"allow_parentheses": false}'
)
"""Of basic_arithmetic: sums and differences of two numbers from 0 to 100, half of them of numbers up to 10."""

_TOLD = 10
"""Updates between two lines of progress, and over which the training loss is averaged at the end."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions with their answers, and who judges other answers.

    Attributes:
        entries: each has ``question`` and ``answer``.
        score: of an answer's text and its entry, from 0 to 1.
        versions: of what made it, by package.
    """

    entries: Sequence[dict[str, Any]]
    score: Callable[[str, dict[str, Any]], float]
    versions: dict[str, str]


def load_task(name: str, options: dict[str, Any], seed: int, count: int) -> Task:
    """Draw a reasoning-gym task's entries.

    Raises:
        ConfigError: if reasoning-gym is missing, or knows no such task or option.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("the tasks are reasoning-gym's, which is missing; install the extra 'rl'") from error
    try:
        dataset = reasoning_gym.create_dataset(name, seed=seed, size=count, **options)
        entries = list(dataset)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"reasoning-gym cannot make the task {name!r} with {options}: {error}") from error
    version = importlib.metadata.version("reasoning-gym")
    return Task(entries, lambda text, entry: dataset.score_answer(text, entry=entry), {"reasoning-gym": version})


def split(task: Task, train: int, held_out: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return entries to train on and entries held out; no question comes twice in all of them.

    Raises:
        ConfigError: if there are too few different questions.
    """
    different = list({entry["question"]: entry for entry in task.entries}.values())
    if len(different) < train + held_out:
        raise ConfigError(
            f"only {len(different)} questions differ and {train} + {held_out} are needed; lower --train-size or "
            "--held-out, or make the task larger with --task-options"
        )
    return different[held_out : held_out + train], different[:held_out]


@dataclasses.dataclass(frozen=True)
class Contender:
    """An adapter's name in ``ADAPTERS`` and its learning rate."""

    name: str
    learning_rate: float

    @classmethod
    def parse(cls, text: str) -> "Contender":
        """Parse ``lora-p:1e-3``."""
        name, _, rate = text.strip().partition(":")
        if name not in ADAPTERS:
            raise ConfigError(f"unknown adapter {name!r}{did_you_mean(name, ADAPTERS)}; allowed: {', '.join(ADAPTERS)}")
        try:
            return cls(name, float(rate))
        except ValueError as error:
            raise ConfigError(f"{text!r} has no learning rate; give such as lora-p:1e-3") from error


def make_all(
    args: argparse.Namespace, model: Model, adapter: AdapterConfig, entries: Sequence[dict[str, Any]]
) -> list[Example]:
    """Return the entries as examples: the question is the user's, the answer the assistant's."""
    examples, data = [], DataOptions(max_length=args.max_length)
    for line, entry in enumerate(entries, 1):
        messages = [
            {"role": "system", "content": args.system},
            {"role": "user", "content": entry["question"]},
            {"role": "assistant", "content": str(entry["answer"])},
        ]
        examples += make_examples({"messages": messages}, model, adapter, data, line=line)
    return examples


def make_job(
    args: argparse.Namespace, model: Model, contender: Contender, seed: int, train: Sequence[dict[str, Any]]
) -> Job:
    """Return one contender's job for one seed."""
    adapter = dataclasses.replace(ADAPTERS[contender.name], rank=args.rank)
    config = JobConfig(
        name=f"{contender.name}-{contender.learning_rate:g}-seed-{seed}",
        adapter=adapter,
        optimizer=OptimizerConfig(learning_rate=contender.learning_rate, warmup_ratio=args.warmup_ratio),
        batches=BatchOptions(batch_size=args.batch_size, max_length=args.max_length, seed=seed),
        max_steps=args.updates,
    )
    return Job(config, model, make_all(args, model, adapter, train))


def train_all(trainer: Trainer, updates: int, console: Console) -> dict[str, list[float]]:
    """Train all jobs to their end; returns the losses of each by name."""
    losses: dict[str, list[float]] = {job.name: [] for job in trainer.jobs}
    start = time.perf_counter()
    for step in range(updates + 1):
        done = trainer.step() if step < updates else trainer.finish()
        for result in done.results if done else ():
            losses[result.job.name].append(result.loss)
        if done and step % _TOLD == 0:
            mean = statistics.fmean(result.loss for result in done.results)
            console.print(f"update {step}/{updates}: mean loss {mean:.3f}, {time.perf_counter() - start:.0f} s")
    return losses


def judge(
    args: argparse.Namespace, model: Model, adapter: Adapter | None, task: Task, entries: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the accuracy and the mean score of greedy answers, which are right, and the first few of them."""
    config = AdapterConfig() if adapter is None else adapter.config
    texts = answer(model, adapter, make_all(args, model, config, entries)).texts
    scores = [float(task.score(text.strip(), entry)) for text, entry in zip(texts, entries, strict=True)]
    return {
        "accuracy": round(sum(score >= 1 for score in scores) / len(scores), 4),
        "score": round(statistics.fmean(scores), 4),
        "right": [int(score >= 1) for score in scores],
        "answers": [[text, str(entry["answer"])] for text, entry in zip(texts[:4], entries, strict=False)],
    }


def base_figures(
    args: argparse.Namespace, model: Model, task: Task, held_out: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the base model's loss, which is that of a LoRA that was never updated, and its accuracy."""
    config = JobConfig(
        adapter=AdapterConfig(rank=1, targets=("q",), layers=(0,)),
        batches=BatchOptions(batch_size=args.batch_size, max_length=args.max_length),
        max_steps=1,
    )
    examples = make_all(args, model, config.adapter, held_out)
    trainer = Trainer(model, [job := Job(config, model, examples)])
    trainer.admit()
    loss, _ = trainer.evaluate(job, examples)
    return {"eval_loss": round(loss, 4), **judge(args, model, None, task, held_out)}


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(config: ModelConfig, params: Params, folded: Any, tokens_BS: jax.Array, mask_BSG: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(forward(config, params, tokens_BS, folded=folded, edit_mask_BSG=mask_BSG))


def mean_kl(model: Model, adapter: Adapter, other: Adapter, examples: Sequence[Example]) -> float:
    """Return the mean KL divergence of one adapter's distributions from another's at the tokens of true answers."""
    longest = max(map(len, examples))
    tokens_BS = np.stack([np.pad(one.token_ids, (0, longest - len(one))) for one in examples])
    mask_BSG = np.stack([np.pad(one.edit_mask, ((0, longest - len(one)), (0, 0))) for one in examples])
    learned_BS = np.stack([np.pad(one.loss_mask, (0, longest - len(one))) for one in examples])
    p, q = (_logprobs(model.config, model.params, fold(one), tokens_BS, mask_BSG) for one in (adapter, other))
    kl_BS = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    return float(kl_BS[:, :-1][learned_BS[:, 1:]].mean())


def judge_stored(
    args: argparse.Namespace, model: Model, adapter: Adapter, task: Task, entries: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """``judge``; with ``--adapter-dtype`` also as rank pages of that dtype serve the adapter, in ``stored``."""
    found = judge(args, model, adapter, task, entries)
    if args.adapter_dtype is not None:
        other = adapter_in_fp8(adapter, model.config)
        kl = mean_kl(model, adapter, other, make_all(args, model, adapter.config, entries))
        found["stored"] = {**judge(args, model, other, task, entries), "mean_kl": float(f"{kl:.3g}")}
    return found


def difference(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the accuracy with rank pages of another dtype less that without, with the 95% interval of pairs."""
    pairs = [pair for run in runs if "stored" in run for pair in zip(run["right"], run["stored"]["right"], strict=True)]
    if not pairs:
        return {}
    changes = [after - before for before, after in pairs]
    mean, spread = statistics.fmean(changes), 1.96 * statistics.pstdev(changes) / len(changes) ** 0.5
    kl = statistics.fmean(run["stored"]["mean_kl"] for run in runs if "stored" in run)
    return {
        "stored_accuracy": round(statistics.fmean(after for _, after in pairs), 4), "difference": round(mean, 4),
        "difference_low": round(mean - spread, 4), "difference_high": round(mean + spread, 4), "pairs": len(pairs),
        "stored_mean_kl": float(f"{kl:.3g}"),
    }  # fmt: skip


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and sample standard deviation of runs' figures; None where there are too few runs."""
    found: dict[str, Any] = {}
    for name in ("eval_loss", "accuracy", "score"):
        values = [run[name] for run in runs if name in run]
        found[name] = round(statistics.fmean(values), 4) if values else None
        found[f"{name}_std"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return found


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train and judge all contenders; returns the figures that the JSON line holds."""
    contenders = [Contender.parse(text) for text in args.adapters.split(",")]
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
        task_options = json.loads(args.task_options)
    except ValueError as error:
        raise ConfigError(f"{error}; give --seeds such as 1,2,3 and --task-options as a JSON object") from error
    for name in ("train_size", "held_out", "updates", "batch_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    task = load_task(args.task, task_options, args.data_seed, 2 * (args.train_size + args.held_out))
    train, held_out = split(task, args.train_size, args.held_out)
    model = serving_model(load_model(args.model), 2)
    start = time.perf_counter()
    base = base_figures(args, model, task, held_out)
    console.print(f"base: loss {base['eval_loss']:.3f}, accuracy {base['accuracy']:.1%}, {base['answers'][0]}")

    jobs = {(one, seed): make_job(args, model, one, seed, train) for one, seed in itertools.product(contenders, seeds)}
    trainer = Trainer(model, list(jobs.values()))
    training = time.perf_counter()
    losses = train_all(trainer, args.updates, console)
    train_seconds = time.perf_counter() - training
    rows = []
    for contender in contenders:
        runs = []
        for seed in seeds:
            job = jobs[contender, seed]
            run: dict[str, Any] = {"seed": seed}
            if job.failed is None:
                run["train_loss"] = round(statistics.fmean(losses[job.name][-_TOLD:]), 4)
                loss, _ = trainer.evaluate(job, make_all(args, model, job.config.adapter, held_out))
                run["eval_loss"] = round(loss, 4)
                run |= judge_stored(args, model, trainer.adapter_of(job), task, held_out)
                console.print(f"{job.name}: loss {loss:.3f}, accuracy {run['accuracy']:.1%}, {run['answers'][0]}")
            else:
                run["failed"] = job.failed
                console.print(f"{job.name}: {job.failed}")
            runs.append(run)
        adapter = jobs[contender, seeds[0]].initial
        rows.append(
            {
                "adapter": contender.name,
                "kind": adapter.config.kind,
                "positions": adapter.config.positions,
                "learning_rate": contender.learning_rate,
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(adapter.params)),
                **summary(runs),
                **difference(runs),
                "runs": runs,
            }
        )
    some = make_all(args, model, AdapterConfig(), [*train, *held_out])
    options = {name: value for name, value in vars(args).items() if name != "output_json"}
    return {
        "schema": SCHEMA,
        "model": model.name,
        "options": options | {"task_options": task_options},
        "task_versions": task.versions,
        "longest_prompt": max(len(one.prompt.token_ids) for one in some),
        "longest_answer": max(len(one.answer) for one in some),
        "train_seconds": round(train_seconds, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "base": base,
        "rows": rows,
        **environment(),
    }


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="(default: %(default)s)")
    add("--task", default="basic_arithmetic", help="of reasoning-gym (default: %(default)s)")
    add(
        "--task-options",
        default=TASK_OPTIONS,
        help="its own, a JSON object (default: %(default)s)",
    )
    add("--system", default="", help="the system message; empty, as rows are short without it (default: none)")
    add("--data-seed", type=int, default=0, help="draws the questions (default: %(default)s)")
    add("--train-size", type=int, default=160, help="questions to train on (default: %(default)s)")
    add("--held-out", type=int, default=32, help="questions to judge by (default: %(default)s)")
    add(
        "--adapters",
        default="lora:1e-3,lora-p:1e-3,direft-p:1e-3,loreft-p:5e-4",
        help=f"NAME:LEARNING-RATE, with commas; names: {', '.join(ADAPTERS)} (default: %(default)s)",
    )
    add("--seeds", default="1,2,3", help="with commas (default: %(default)s)")
    add("--rank", type=int, default=16, help="of every adapter (default: %(default)s)")
    add_adapter_dtype(add)
    add("--updates", type=int, default=40, help="of every adapter (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="examples of an update (default: %(default)s)")
    add("--max-length", type=int, default=32, help="most tokens of an example (default: %(default)s)")
    add("--warmup-ratio", type=float, default=0.1, help="then the rate falls to zero (default: %(default)s)")
    add("--output-json", type=Path, default=None, help="also write the JSON line here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    args = make_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    try:
        found = measure(args, console)
    except (PreftError, OSError) as error:
        print(f"bench.accuracy: {error}", file=sys.stderr)
        return 1
    _print(found, console)
    emit(found, args.output_json)
    return 0


def spread(row: dict[str, Any], name: str, form: str) -> str:
    """Return a figure with its standard deviation, or alone where there is none."""
    if row[name] is None:
        return "diverged"
    std = row.get(f"{name}_std")
    return f"{row[name]:{form}}" + ("" if std is None else f" ± {std:{form}}")


def _print(found: dict[str, Any], console: Console) -> None:
    title = "{model}, {task}, {updates} updates of {batch_size}".format(**found["options"])
    table = Table(title=title, title_justify="left")
    for column in ("adapter", "learning rate", "parameters", "held-out loss", "accuracy", "score"):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    for row in [{"adapter": "base"} | found["base"], *found["rows"]]:
        rate, count = (f"{row[name]:{form}}" if name in row else "" for name, form in _SHAPE)
        figures = (spread(row, name, form) for name, form in _FIGURES)
        table.add_row(row["adapter"], rate, count, *figures)
    console.print(table)


_SHAPE = (("learning_rate", "g"), ("parameters", ","))
_FIGURES = (("eval_loss", ".3f"), ("accuracy", ".1%"), ("score", ".3f"))


if __name__ == "__main__":
    sys.exit(main())
