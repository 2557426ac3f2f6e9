"""Evaluates a run's adapters on the rows that are held out: by their loss, and by answers to their prompts."""

from collections.abc import Sequence

from preft_jax.loading import Model
from train.jobs import Job
from train.run.generation import answer, answerable
from train.run.report import Report
from train.trainer import Trainer


class Evaluation:
    """Evaluates running jobs.

    Args:
        model: the base model.
        trainer: of the jobs.
        report: is told the results.
        generations: held-out prompts that are answered, at most.
    """

    def __init__(self, model: Model, trainer: Trainer, report: Report, *, generations: int):
        self._model = model
        self._trainer = trainer
        self._report = report
        self._generations = generations

    def of_each(self, jobs: Sequence[Job]) -> None:
        """Evaluate the jobs that go on, unless that was done before the run was interrupted."""
        for job in jobs:
            if not job.done and (job.name, job.step) not in self._report.evaluated:
                self.of(job)

    def of(self, job: Job) -> None:
        """Evaluate a job that has rows held out."""
        if not job.held_out:
            return
        loss, count = self._trainer.evaluate(job, job.held_out)
        values: dict[str, float] = {"eval_loss": loss, "eval_tokens": count}
        text = f"held out: loss {loss:.4f}"
        adapter = self._trainer.adapter_of(job)
        asked = answerable(self._model, adapter, job.held_out)[: self._generations]
        if asked:
            some = answer(self._model, adapter, asked)
            values["exact_match"] = some.exact_match
            text += f", {some.exact_match:.0%} of answers exact; {_short(some.texts[0])}"
            text += "" if some.texts[0] == some.expected[0] else f" for {_short(some.expected[0])}"
        self._report.evaluation(job, values, text)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
