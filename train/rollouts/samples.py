"""Samples of an engine: groups of them, each of one prompt that was prefilled once, with an adapter or none."""

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.pages import adapter_page_counts
from preft_jax.errors import ConfigError
from preft_jax.loading import Model
from preft_jax.models.batch import bucket
from preft_jax.sampling.parameters import SamplingParams
from preft_jax.shapes import BANK_SITES, RANK_PAGE, SITES
from preft_jax.text.chat import EncodedPrompt, encode_prompt
from serve.engine.completion import Completion
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.request import Request
from train.jobs import Job
from train.rollouts.options import RolloutConfig, RolloutOptions
from train.rollouts.tasks import Prompt, Task

_LOOKED_AT = 32
"""Prompts of a job that are looked at before it begins: if all of them are too long, something is wrong."""


class RolloutJob(Job):
    """A job that is trained on samples of its own adapter.

    Attributes:
        task: what it is rewarded for.
        options: how samples are drawn and learned.
    """

    def __init__(self, config: RolloutConfig, model: Model, task: Task, initial: Adapter | None = None):
        super().__init__(config, model, [], initial=initial)
        self.task = task
        self.options: RolloutOptions = config.rollouts
        self.prompts_per_step = config.prompts
        self.steps = config.steps

    @property
    def data_digest(self) -> str:
        """SHA-256 (hex) of what the stream of prompts depends on."""
        return self.task.digest

    @property
    def batch(self) -> int:
        """Batches of samples that were learned from."""
        return self.step // self.options.num_iterations


@dataclasses.dataclass
class Sample:
    """One answer to a prompt.

    Attributes:
        text: without special tokens.
        token_ids: the end token included.
        logprobs: float32, of each token under the distribution that it was drawn from.
        is_truncated: whether it was cut off at its longest.
        reward: NaN if there is none, for the reason ``error``.
        error: why the sample is not learned from.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    is_truncated: bool
    reward: float = float("nan")
    error: str | None = None


@dataclasses.dataclass
class Group:
    """A prompt and its samples."""

    prompt: Prompt
    encoded: EncodedPrompt
    samples: list[Sample]


class Asked(NamedTuple):
    """A prompt that is to be sampled, how often, and the seed of the samples."""

    prompt: Prompt
    count: int
    seed: int


def step_prompts(job: RolloutJob, ahead: int = 0) -> list[Asked]:
    """Return what a job samples next: the same for the same seed and batch, whatever was before.

    ``ahead``: so many batches later.
    """
    first = (job.batch + ahead) * job.prompts_per_step
    return [
        Asked(job.task.at(place), job.options.num_generations, _seed(job, "train", place))
        for place in range(first, first + job.prompts_per_step)
    ]


def held_out_prompts(job: RolloutJob) -> list[Asked]:
    """Return what a job samples to be evaluated: always the same, with the same seeds."""
    return [
        Asked(prompt, job.options.num_generations_eval, _seed(job, "held out", i))
        for i, prompt in enumerate(job.task.held_out)
    ]


def _seed(job: RolloutJob, purpose: str, place: int) -> int:
    parts = [job.config.batches.seed, zlib.crc32(purpose.encode()), place]
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Sampler:
    """Draws samples for jobs beside each other, through one engine.

    An adapter is handed over as it is: no file is written, and nothing is compiled for it. A prompt is prefilled once
    for all of its samples. They are decoded by a program that knows no adapters, unless one edits generated tokens.

    Args:
        model: the base model.
        jobs: all that will ever be sampled for.
        max_num_seqs: samples that are generated at a time.
        max_jobs: jobs that are sampled for together; 0: all.

    Raises:
        ConfigError: if prompts and completions may be longer than the model, or a job's prompts are all too long.
    """

    def __init__(self, model: Model, jobs: Sequence[RolloutJob], *, max_num_seqs: int, max_jobs: int = 0):
        self._model = model
        for job in jobs:
            self._check_lengths(job, f"the first {_LOOKED_AT} prompts", map(job.task.at, range(_LOOKED_AT)))
            self._check_lengths(job, "the held-out prompts", job.task.held_out)
        self.engine = Engine(model, engine_config(model, jobs, max_num_seqs=max_num_seqs, max_jobs=max_jobs))

    def sample(
        self, asked: Mapping[RolloutJob, Sequence[Asked]], adapters: Mapping[RolloutJob, Adapter]
    ) -> dict[RolloutJob, list[Group]]:
        """Return the groups of each job; prompts that are too long are left out.

        Args:
            asked: by job.
            adapters: of the jobs, as they are now.
        """
        groups: dict[RolloutJob, list[Group]] = {job: [] for job in asked}
        requests: list[Request] = []
        waiting: list[Group] = []
        for job, some in asked.items():
            for one in some:
                encoded = self._encode(one.prompt, job.options)
                if encoded is None:
                    continue
                group = Group(one.prompt, encoded, [])
                groups[job].append(group)
                waiting.append(group)
                requests.append(_request(one, encoded, adapters[job], job.options))
        done = iter(self.engine.generate(requests) if requests else [])
        for group, request in zip(waiting, requests, strict=True):
            group.samples = [_sample(next(done)) for _ in range(request.n)]
        return groups

    def _encode(self, prompt: Prompt, options: RolloutOptions) -> EncodedPrompt | None:
        encoded = self._encoded(prompt)
        return encoded if len(encoded.token_ids) <= options.max_prompt_length else None

    def _encoded(self, prompt: Prompt) -> EncodedPrompt:
        return encode_prompt(self._model.tokenizer, prompt.prompt, vocab_size=self._model.config.vocab_size)

    def _check_lengths(self, job: RolloutJob, what: str, prompts: Iterable[Prompt]) -> None:
        """Raise ``ConfigError`` if all of some prompts would be left out."""
        shortest, most = None, job.options.max_prompt_length
        for prompt in prompts:
            length = len(self._encoded(prompt).token_ids)
            if length <= most:
                return
            shortest = length if shortest is None else min(shortest, length)
        if shortest is not None:
            raise ConfigError(
                f"{job.name}: {what} are all longer than max_prompt_length {most}, the shortest has {shortest} tokens; "
                "raise it"
            )


def _request(one: Asked, encoded: EncodedPrompt, adapter: Adapter, options: RolloutOptions) -> Request:
    return Request(
        prompt=encoded,
        adapter=adapter,
        n=one.count,
        seed=one.seed,
        sampling=SamplingParams(temperature=options.temperature),
        max_tokens=options.max_completion_length,
    )


def _sample(done: Completion) -> Sample:
    sample = Sample(done.text, done.token_ids, done.sampling_logprobs, done.finish_reason == "length")
    if done.finish_reason in ("error", "abort"):
        sample.error = f"it was not sampled: {done.error}"
    elif not done.token_ids:
        sample.error = "it is empty"
    return sample


def engine_config(model: Model, jobs: Sequence[RolloutJob], *, max_num_seqs: int, max_jobs: int = 0) -> EngineConfig:
    """Return sizes of an engine that fit jobs: their longest samples, and two versions of the adapters of some.

    Prefixes are not cached: a run that is resumed has none of the run before, and its calls must have the same shapes.

    Raises:
        ConfigError: if prompts and completions may be longer than the model.
    """
    longest = max(_longest(job) for job in jobs)
    most = model.config.max_position_embeddings
    if longest > most:
        raise ConfigError(
            f"max_prompt_length and max_completion_length are {longest} tokens together, with a learned prefix if "
            f"there is one, and the model has {most} positions; lower one of them"
        )
    counts = [adapter_page_counts(job.initial.config, model.config) for job in jobs]
    most_jobs = max_jobs or len(jobs)
    pages = sorted((max(count.values(), default=0) for count in counts), reverse=True)[:most_jobs]
    samples = sorted((job.prompts_per_step * job.options.num_generations for job in jobs), reverse=True)
    together = sum(samples[:most_jobs])
    size = min(max_num_seqs, bucket(together))
    sites = {site for count in counts for site, number in count.items() if number}
    return EngineConfig(
        max_num_seqs=size,
        max_model_len=min(bucket(longest, 64), most),
        prefill_seqs=min(size, 8),
        max_rank=RANK_PAGE * bucket(max(pages, default=1)),
        bank_pages=bucket(2 * sum(pages) + 1),
        bank_sites=tuple(site for site in BANK_SITES if site in sites) or SITES,
        all_token=any(not job.initial.config.prefill_only for job in jobs),
        prefix_caching=False,
    )


def _longest(job: RolloutJob) -> int:
    """Return the tokens of a job's longest sample, with its prompt and the learned prefix in front of it."""
    return job.initial.config.prefix_length + job.options.max_prompt_length + job.options.max_completion_length
