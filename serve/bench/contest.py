"""Contenders of a benchmark: they serve the same requests in turn, round after round, and are compared in pairs.

A machine that slows down slows all of them, and a ratio is taken within a round before it is averaged.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from preft_jax.device.compiles import CompileCounter
from preft_jax.errors import PreftError
from serve.bench.load import LoadRequest, Target
from serve.bench.metrics import LoadResult, MetricOptions, adapter_figures, first_and_later, ratios, summarize

MODES = ("base", "prefill-only", "all-token")


@dataclasses.dataclass(frozen=True)
class Contender:
    """What serves the requests: a mode, and how many adapters they use (0 for the base model)."""

    mode: str
    num_adapters: int

    @property
    def label(self) -> str:
        """A short name."""
        return f"{self.mode}, {self.num_adapters}" if self.num_adapters else self.mode

    @property
    def key(self) -> str:
        """The mode as JSON has it."""
        return self.mode.replace("-", "_")


@dataclasses.dataclass(eq=False)
class Entry:
    """A contender with its requests, and what was measured so far.

    Attributes:
        contender: which one.
        make_target: called once, before anything is measured.
        warmups: requests that are served first and not counted.
        rounds: the requests of each round.
        in_process: whether what is compiled in this process is the target's doing.
        results: of the rounds so far.
        recompiles: programs compiled while rounds were measured.
        counters: how much each of the target's own counters rose meanwhile.
    """

    contender: Contender
    make_target: Callable[[], Target]
    warmups: Sequence[LoadRequest]
    rounds: Sequence[Sequence[LoadRequest]]
    in_process: bool = True
    results: list[LoadResult] = dataclasses.field(default_factory=list)
    recompiles: int = 0
    counters: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    _target: Target | None = None

    @property
    def target(self) -> Target:
        """The target, made at the first use."""
        if self._target is None:
            self._target = self.make_target()
        return self._target

    def warm_up(self) -> None:
        """Make the target and serve the warm-ups."""
        result = self.target.run(self.warmups)
        if self.warmups:
            self._refuse_without_answers("warm-ups", result)

    def measure(self, number: int, on_done: Callable[[], None]) -> None:
        """Serve one round and keep its result.

        Raises:
            PreftError: if no request at all completed: there is nothing to report then.
        """
        before = self.target.counters()
        with CompileCounter() as compiles:
            result = self.target.run(self.rounds[number], on_done)
        after = self.target.counters()
        self._refuse_without_answers("requests", result)
        self.results.append(result)
        self.recompiles += compiles.count
        self.counters.update({name: after[name] - before[name] for name in after if name in before})

    def _refuse_without_answers(self, what: str, result: LoadResult) -> None:
        if not result.completed:
            first = next((record.error for record in result.records if record.error), "no reason was given")
            raise PreftError(
                f"none of the {len(result.records)} {what} of {self.contender.label} completed; the first: {first}"
            )

    def figures(self, base: "Entry | None", options: MetricOptions) -> dict[str, Any]:
        """Return everything that was measured, beside ``base`` if it took part."""
        records = [record for result in self.results for record in result.records]
        return {
            "mode": self.contender.key,
            "num_adapters": self.contender.num_adapters,
            "figures": summarize(self.results, options),
            "ratio": {} if base is None else ratios(base.results, self.results),
            **adapter_figures(self.results, options),
            "ttft": first_and_later(self.results, options),
            "recompiles": self.recompiles if self.in_process else None,
            "counters": {name: value for name, value in self.counters.items() if value},
            "errors": dict(collections.Counter(r.error for r in records if r.error).most_common(5)),
            "estimated_token_counts": sum(record.estimated for record in records),
        }


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress


def compete(entries: Sequence[Entry], console: Console) -> None:
    """Warm every contender up, then let them serve each round in turn, every other round in reverse."""
    with _progress(console) as progress:
        task = progress.add_task("warming up", total=len(entries))
        for entry in entries:
            entry.warm_up()
            progress.advance(task)
        task = progress.add_task("serving", total=sum(len(requests) for e in entries for requests in e.rounds))
        for number in range(len(entries[0].rounds)):
            for entry in entries if number % 2 == 0 else entries[::-1]:
                progress.update(task, description=f"round {number + 1}: {entry.contender.label}")
                entry.measure(number, lambda: progress.advance(task))


def collect(entries: Sequence[Entry], options: MetricOptions) -> dict[str, Any]:
    """Return the figures of all contenders; ``modes`` and ``ratio_to_base`` hold the first of each mode."""
    base = next((entry for entry in entries if entry.contender.mode == "base"), None)
    contenders = [entry.figures(base, options) for entry in entries]
    first = {figures["mode"]: figures for figures in reversed(contenders)}
    first = {mode: first[mode] for mode in (m.replace("-", "_") for m in MODES) if mode in first}
    counts = [figures["recompiles"] for figures in contenders]
    collected: dict[str, Any] = {
        "modes": {mode: figures["figures"] for mode, figures in first.items()},
        "recompiles": None if None in counts else sum(counts),
        "contenders": contenders,
    }
    if base is not None:
        collected["ratio_to_base"] = {
            mode: figures["ratio"]["output_throughput"]
            for mode, figures in first.items()
            if "output_throughput" in figures["ratio"]  # A round without any token has no ratio.
        }
    return collected
