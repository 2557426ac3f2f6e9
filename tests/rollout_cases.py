"""Jobs, tasks and groups that the tests of ``train.rl`` share."""

import dataclasses

import numpy as np

from preft_jax import AdapterConfig
from preft_jax.text.chat import EncodedPrompt
from train.data.batches import BatchOptions
from train.optimizer import OptimizerConfig
from train.rollouts.options import RolloutConfig, RolloutOptions
from train.rollouts.samples import Group, RolloutJob, Sample
from train.rollouts.tasks import Prompt, Task

LORA = AdapterConfig(rank=4, targets=("q", "v", "down"))
PROMPT, COMPLETION = 12, 8
"""Most tokens: of one padded length."""


def one_layer(lively):
    """Return ``lively`` with one layer, which compiles sooner than two."""
    config = dataclasses.replace(lively.config, num_hidden_layers=1)
    return dataclasses.replace(lively, config=config, params={**lively.params, "layers": lively.params["layers"][:1]})


def task(seed=0):
    """Return a task of random prompts."""

    def at(place):
        rng = np.random.default_rng([seed, place])
        return Prompt(rng.integers(0, 250, int(rng.integers(4, PROMPT + 1))).tolist(), {"place": place})

    return Task("random prompts", "nothing:here", at, tuple(at(10_000 + i) for i in range(3)), f"random {seed}")


def job(model, config=LORA, *, name="adapter", initial=None, prompts=2, optimizer=None, steps=10, seed=0, **options):
    """Return a job whose steps have two samples of so many prompts each, unless ``options`` say how many."""
    options = {
        "num_generations": 2, "max_prompt_length": PROMPT, "max_completion_length": COMPLETION, **options,
    }  # fmt: skip
    rollouts = RolloutOptions(**options)
    made = RolloutConfig(
        name=name, adapter=config, max_steps=steps * rollouts.num_iterations, steps=steps, rollouts=rollouts,
        optimizer=OptimizerConfig(
            **{"lr_scheduler_type": "constant", "learning_rate": 3e-3, "max_grad_norm": 0.0, **(optimizer or {})}
        ),
        batches=BatchOptions(batch_size=rollouts.num_generations, max_length=PROMPT + COMPLETION, seed=seed),
        gradient_accumulation_steps=prompts,
    )  # fmt: skip
    found = RolloutJob(made, model, task(seed), None)
    if initial is not None:
        found.initial = dataclasses.replace(initial, config=config)
    return found


def rewarded(groups, rewards):
    """Give samples rewards, in their order; None drops one."""
    samples = [sample for group in groups for sample in group.samples]
    for sample, reward in zip(samples, rewards, strict=True):
        if reward is None:
            sample.error = "dropped"
        else:
            sample.reward = float(reward)
    return groups


def groups(rng, count=2, size=2, *, longest=COMPLETION):
    """Return groups of samples that nobody has drawn, with rewards and log-probabilities at random."""
    made = []
    for _ in range(count):
        tokens = rng.integers(0, 250, int(rng.integers(4, PROMPT + 1))).tolist()
        samples = []
        for _ in range(size):
            length = int(rng.integers(1, longest + 1))
            samples.append(
                Sample(
                    "", rng.integers(0, 250, length).tolist(), rng.uniform(-7, -3, length).tolist(), length == longest,
                    float(rng.standard_normal()),
                )
            )  # fmt: skip
        made.append(Group(Prompt(tokens, {}), EncodedPrompt(tokens, ()), samples))
    return made
