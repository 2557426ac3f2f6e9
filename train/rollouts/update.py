"""One step of learning: samples are scored by the trainer, weighed, and learned in updates of all jobs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from train.data.documents import Document
from train.micro import DocumentRow
from train.results import Result
from train.rollouts.learning import Learned, corrected, importance, loss_of, nothing
from train.rollouts.samples import RolloutJob
from train.trainer import Trainer


class Mismatch(NamedTuple):
    """How far the trainer's log-probabilities are from the sampler's, over the tokens that are learned.

    Attributes:
        mean: of the differences, trainer minus sampler; 0 without tokens, as all of them.
        std: of the differences.
        largest: absolute difference.
        importance_mean: of the truncated weights.
        importance_max: largest weight before it is truncated.
    """

    mean: float = 0.0
    std: float = 0.0
    largest: float = 0.0
    importance_mean: float = 1.0
    importance_max: float = 1.0

    def metrics(self) -> dict[str, float]:
        """Return the numbers by TRL's names."""
        return {
            "sampling_logp_difference/mean": self.mean,
            "sampling_logp_difference/std": self.std,
            "sampling_logp_difference/max": self.largest,
            "importance_sampling_ratio/mean": self.importance_mean,
            "importance_sampling_ratio/max": self.importance_max,
        }


class Update(NamedTuple):
    """What a step of a job gave: the result of each update, the first mismatch, and the tokens that were learned."""

    results: list[Result]
    mismatch: Mismatch
    tokens: int


def learn(trainer: Trainer, given: Mapping[RolloutJob, Sequence[Learned]]) -> dict[RolloutJob, Update]:
    """Let jobs learn what is given for each: ``num_iterations`` updates each, on the same documents.

    Rows of jobs with the same loss share micro-batches. A job that is given nothing takes part with an empty update,
    so that its clock goes on.
    """
    documents: dict[RolloutJob, list[Document]] = {}
    mismatches: dict[RolloutJob, Mismatch] = {}
    for job, some in given.items():
        documents[job], mismatches[job] = [nothing(job)] if not some else [], Mismatch()
    for rows in _micro_batches({job: some for job, some in given.items() if some}):
        for job, corrected_rows in _corrected(trainer, rows).items():
            documents[job] += corrected_rows
    for job, some in given.items():
        if some:
            mismatches[job] = mismatch_of(some, documents[job], job.options.importance_sampling_cap)
    results: dict[RolloutJob, list[Result]] = {job: [] for job in given}
    for iteration in range(max(job.options.num_iterations for job in given)):
        taking = {job: own for job, own in documents.items() if iteration < job.options.num_iterations}
        taking = {job: own for job, own in taking.items() if job.failed is None}
        for result in _update(trainer, taking):
            results[result.job].append(result)  # pyright: ignore[reportArgumentType]
    tokens = {job: sum(int((one.weights > 0).sum()) for one in own) for job, own in documents.items()}
    return {job: Update(results[job], mismatches[job], tokens[job]) for job in given}


def _update(trainer: Trainer, documents: Mapping[RolloutJob, Sequence[Document]]) -> list[Result]:
    if not documents:
        return []
    by_loss: dict[str, dict[RolloutJob, Sequence[Document]]] = {}
    for job, own in documents.items():
        options = job.options
        name = loss_of(options.algorithm, options.epsilon, options.epsilon_high, options.beta)
        by_loss.setdefault(name, {})[job] = own
    for name, some in by_loss.items():
        for rows in _micro_batches(some):
            trainer.forward_backward({job: [[one] for one in own] for job, own in rows.items()}, name)
    trainer.optim_step(list(documents))
    done = trainer.finish()
    return [] if done is None else done.results


def _micro_batches[T](given: Mapping[RolloutJob, Sequence[T]]) -> list[dict[RolloutJob, Sequence[T]]]:
    """Return the rows of each micro-batch: so many of each job as its batch size, while it has some."""
    sizes = {job: job.config.batches.batch_size for job in given}
    count = max((-(-len(own) // sizes[job]) for job, own in given.items()), default=0)
    return [
        {
            job: own[number * sizes[job] : (number + 1) * sizes[job]]
            for job, own in given.items()
            if number * sizes[job] < len(own)
        }
        for number in range(count)
    ]


def _corrected(trainer: Trainer, rows: Mapping[RolloutJob, Sequence[Learned]]) -> dict[RolloutJob, list[Document]]:
    """Return documents with the trainer's log-probabilities, and the base model's where a loss needs them."""
    own: dict[RolloutJob, list[DocumentRow]] = {job: [[one.document] for one in some] for job, some in rows.items()}
    scored = trainer.score(own)  # pyright: ignore[reportArgumentType]
    near = {job: [[_unedited(one.document)] for one in some] for job, some in rows.items() if job.options.beta}
    reference = trainer.score(near) if near else {}  # pyright: ignore[reportArgumentType]
    return {
        job: [
            corrected(
                one, scored[job][i][0], reference[job][i][0] if job in reference else None,
                job.options.importance_sampling_cap,
            )
            for i, one in enumerate(some)
        ]
        for job, some in rows.items()
    }  # fmt: skip


def _unedited(document: Document) -> Document:
    """Return a document as the base model sees it."""
    return dataclasses.replace(document, edit_mask=np.zeros_like(document.edit_mask))


def mismatch_of(given: Sequence[Learned], scored: Sequence[Document], cap: float) -> Mismatch:
    """Return how far the log-probabilities of scored documents are from those of the sampler, token by token."""
    differences = np.concatenate(
        [
            (document.old_logprobs - one.sampler_logprobs)[document.weights > 0].astype(np.float64)
            for one, document in zip(given, scored, strict=True)
            if document.old_logprobs is not None
        ]
    )
    ratio = np.exp(differences)
    return Mismatch(
        float(differences.mean()), float(differences.std()), float(np.abs(differences).max()),
        float(importance(differences, cap).mean()) if cap else 1.0, float(ratio.max()),
    )  # fmt: skip
