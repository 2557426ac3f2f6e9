"""Samples of the engine are those of the trainer's adapter: their log-probabilities, the hand-over, shared prompts."""

import dataclasses
import sys

import jax
import numpy as np
import pytest
import rollout_cases as cases
from conftest import ADAPTER_CONFIGS, PREFIX
from engine_runs import ATOL, VISIBLE

from preft_jax import AdapterConfig, ConfigError
from preft_jax.adapters.init import random_adapter
from preft_jax.device.compiles import CompileCounter
from preft_jax.sampling.parameters import derived_seed
from preft_jax.shapes import SITES
from train.rollouts.learning import learned
from train.rollouts.samples import Asked, Sampler, engine_config, held_out_prompts, step_prompts
from train.rollouts.update import learn
from train.trainer import Trainer

CONFIGS = ADAPTER_CONFIGS | {"prefix": PREFIX}
KINDS = ("lora", "direft_free", "loreft", "loreft_f3l2", "lora_all", "prefix")

_opened = []


def _listen(event, arguments):
    if event == "open" and _listen.on:
        _opened.append(arguments[0])


_listen.on = False


def sampled(sampler, jobs, adapters, rng):
    """Return the groups of jobs' next steps, with rewards at random."""
    groups = sampler.sample({job: step_prompts(job) for job in jobs}, adapters)
    for own in groups.values():
        cases.rewarded(own, rng.standard_normal(sum(len(group.samples) for group in own)))
    return groups


def step(sampler, trainer, jobs, rng, adapters=None):
    """Sample and learn once; returns each job's update."""
    trainer.admit()
    now = {job: trainer.adapter_of(job) for job in jobs}
    groups = sampled(sampler, jobs, now | (adapters or {}), rng)
    return learn(trainer, {job: learned(job, groups[job]) for job in jobs})


@pytest.fixture(scope="module")
def small(lively):
    return cases.one_layer(lively)


def test_every_kinds_samples_have_the_trainers_logprobs_after_each_update(small, rng):
    """And those of an adapter of the step before, or of none at all, have not."""
    jobs = [
        cases.job(small, CONFIGS[name], name=name, prompts=1, optimizer={"learning_rate": 2e-2},
                  initial=random_adapter(CONFIGS[name], small.config, jax.random.key(i), strength=0.7),
                  temperature=0.8 if i % 2 else 1.0)
        for i, name in enumerate(KINDS)
    ]  # fmt: skip
    trainer = Trainer(small, jobs)
    sampler = Sampler(small, jobs, max_num_seqs=8)
    trainer.admit()
    first = {job: trainer.adapter_of(job) for job in jobs}
    for _ in range(2):
        for job, update in step(sampler, trainer, jobs, rng).items():
            assert update.mismatch.largest < ATOL, job.name
            assert update.results[0].grad_norm > 0
    none = {
        job: dataclasses.replace(
            adapter, params=jax.tree.map(np.zeros_like, adapter.params),
            config=dataclasses.replace(adapter.config, orthonormal=False),
        )
        for job, adapter in first.items()
        if job.initial.config.kind == "lora"
    }  # fmt: skip
    for job, update in step(sampler, trainer, jobs, rng, first).items():
        assert update.mismatch.largest > VISIBLE, f"{job.name}: what is stale is noticed"
    found = step(sampler, trainer, jobs, rng, none)
    for job in jobs:
        assert (found[job].mismatch.largest > VISIBLE) == (job in none), f"{job.name}: what is missing is noticed"


def test_samples_of_one_prefill_are_those_of_prompts_prefilled_apart(small, rng):
    """The same tokens for the same seeds, though a prompt is computed once for all of its samples."""
    job = cases.job(small, prompts=2, num_generations=4)
    sampler = Sampler(small, [job], max_num_seqs=8)
    policy = {job: random_adapter(job.initial.config, small.config, jax.random.key(1), strength=0.7)}
    asked = step_prompts(job)
    together = sampler.sample({job: asked}, policy)[job]
    forked = sampler.engine.stats.prompt_tokens
    apart = [Asked(one.prompt, 1, derived_seed(one.seed, index)) for one in asked for index in range(one.count)]
    alone = sampler.sample({job: apart}, policy)[job]
    assert sampler.engine.stats.prompt_tokens - forked == 4 * forked
    ours = [sample for group in together for sample in group.samples]
    assert len({tuple(sample.token_ids) for sample in ours}) > 4
    for one, (other,) in zip(ours, (group.samples for group in alone), strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=ATOL)


def test_an_update_is_handed_over_without_a_file_and_without_compiling(small, rng):
    jobs = [cases.job(small, name=name, num_generations=4) for name in "abc"]
    trainer, sampler = Trainer(small, jobs), Sampler(small, jobs, max_num_seqs=16)
    for _ in range(2):
        step(sampler, trainer, jobs, rng)
    before = {job: trainer.adapter_of(job).digest for job in jobs}
    sys.addaudithook(_listen)
    _opened.clear()
    with CompileCounter() as compiled:
        _listen.on = True
        try:
            for _ in range(3):
                step(sampler, trainer, jobs, rng)
        finally:
            _listen.on = False
    assert compiled.count == 0
    assert _opened == []
    assert all(trainer.adapter_of(job).digest != digest for job, digest in before.items())
    assert len(sampler.engine.adapters.on_host) == 0, "no version stays in host memory"


def test_equal_rewards_change_nothing_and_no_samples_only_move_the_clock(small, rng):
    jobs = [cases.job(small, name=name, num_generations=4) for name in ("equal", "none", "learns")]
    trainer, sampler = Trainer(small, jobs), Sampler(small, jobs, max_num_seqs=16)
    trainer.admit()
    now = {job: trainer.adapter_of(job) for job in jobs}
    groups = sampled(sampler, jobs, now, rng)
    cases.rewarded(groups[jobs[0]], [0.1] * 8)
    cases.rewarded(groups[jobs[1]], [None] * 8)
    updates = learn(trainer, {job: learned(job, groups[job]) for job in jobs})
    assert [updates[job].results[0].grad_norm > 0 for job in jobs] == [False, False, True]
    assert [updates[job].tokens > 0 for job in jobs] == [True, False, True]
    assert [job.step for job in jobs] == [1, 1, 1]
    assert [trainer.adapter_of(job).digest == now[job].digest for job in jobs] == [True, True, False]


def test_a_steps_prompts_follow_from_seed_and_step_and_long_ones_are_left_out(small, rng):
    job, other = cases.job(small), cases.job(small, seed=1)
    first = step_prompts(job)
    assert step_prompts(cases.job(small)) == first
    assert [one.seed for one in step_prompts(other)] != [one.seed for one in first]
    job.step = 1
    assert not {one.seed for one in step_prompts(job)} & {one.seed for one in first}
    assert held_out_prompts(job) == held_out_prompts(cases.job(small))
    sampler = Sampler(small, [job], max_num_seqs=4)
    long = [dataclasses.replace(first[0].prompt, prompt=list(range(cases.PROMPT + 1))), first[1].prompt]
    asked = [one._replace(prompt=prompt) for one, prompt in zip(first, long, strict=True)]
    (group,) = sampler.sample({job: asked}, {job: job.initial})[job]
    assert group.prompt == first[1].prompt
    assert sampler.sample({job: asked[:1]}, {job: job.initial}) == {job: []}
    with pytest.raises(
        ConfigError, match=r"first 32 prompts are all longer than max_prompt_length 1, the shortest has"
    ):
        Sampler(small, [cases.job(small, max_prompt_length=1)], max_num_seqs=4)


def test_an_engine_has_room_for_all_jobs_and_their_longest_samples(tiny):
    small = cases.job(tiny, AdapterConfig(rank=4), name="small")
    large = cases.job(tiny, AdapterConfig(kind="loreft", rank=40, positions="all"), name="large", num_generations=5)
    found = engine_config(tiny, [small, large], max_num_seqs=64)
    assert (found.max_num_seqs, found.max_rank, found.bank_pages, found.all_token) == (16, 64, 16, True)
    assert found.bank_sites == SITES
    found = engine_config(tiny, [small, large], max_num_seqs=3, max_jobs=1)
    assert (found.max_num_seqs, found.bank_pages) == (3, 8)
    assert engine_config(tiny, [cases.job(tiny)], max_num_seqs=64).bank_sites == ("q", "v", "down")
    with pytest.raises(ConfigError, match="positions; lower one"):
        engine_config(tiny, [cases.job(tiny, max_prompt_length=tiny.config.max_position_embeddings)], max_num_seqs=2)
