"""The library as research code uses it: adapters under transformations, ``engine.generate``, ``fit``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_runs import TIGHT, request
from train_cases import examples

import preft_jax as pj
from serve import Engine, Request
from train import BatchOptions, Job, JobConfig, OptimizerConfig, TrainOptions, fit

LORA = pj.AdapterConfig(rank=2, targets=("q", "down"))
GREEDY = pj.SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def engine(lively):
    return Engine(lively, TIGHT)


@pytest.mark.parametrize(
    "config",
    [LORA, pj.AdapterConfig(kind="loreft", rank=2), pj.AdapterConfig(kind="edits", rank=3)],
    ids=lambda c: c.kind,
)
def test_init_adapter_under_jit_is_the_same(config, tiny):
    key = jax.random.key(5)
    eager = pj.init_adapter(config, tiny.config, key)
    jitted = jax.jit(functools.partial(pj.init_adapter, config, tiny.config))(key)
    assert jitted.config == config
    jax.tree.map(np.testing.assert_array_equal, jitted.params, eager.params)


def test_many_adapters_are_drawn_by_vmap(tiny):
    keys = jax.random.split(jax.random.key(1), 3)
    many = jax.vmap(functools.partial(pj.random_adapter, LORA, tiny.config))(keys)
    third = pj.random_adapter(LORA, tiny.config, keys[2])
    jax.tree.map(lambda some, one: np.testing.assert_array_equal(some[2], one), many, third)


def test_an_adapter_is_differentiated_and_jitted_as_it_is(tiny):
    adapter = pj.random_adapter(LORA, tiny.config, jax.random.key(2))
    tokens, mask = np.arange(8, dtype=np.int32)[None], np.ones((1, 8, 2), bool)

    @jax.jit
    def slope(adapter):
        def loss(adapter):
            logits = pj.forward(tiny.config, tiny.params, tokens, folded=pj.fold(adapter), edit_mask_BSG=mask)
            return jnp.square(logits).mean()

        return jax.grad(loss)(adapter)

    grads = slope(adapter)
    assert grads.config == LORA
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    new = jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, adapter, grads)
    assert new.digest != adapter.digest


def test_an_engine_generates_for_requests_of_every_prompt(engine, lively):
    ids = lively.tokenizer.encode("Hello")
    prompts = "Hello", ids, np.asarray(ids), pj.encode_prompt(lively.tokenizer, "Hello", vocab_size=256)
    done = engine.generate([Request(prompt=prompt, sampling=GREEDY, max_tokens=4) for prompt in prompts])
    assert len(done) == 4
    assert {tuple(one.token_ids) for one in done} == {tuple(done[0].token_ids)}
    assert all(one.finish_reason in ("stop", "length") for one in done)


def test_samples_come_request_by_request(engine, rng):
    one = Request(prompt="Hello", n=2, seed=3, max_tokens=3, logprobs=1)
    done = engine.generate([one, request([1, 2, 3], max_tokens=2)])
    assert [completion.index for completion in done] == [0, 1, 0]
    assert [len(completion.top_logprobs) for completion in done[:2]] == [3, 3]
    assert len(done[2].token_ids) == 2
    assert done[0].token_ids != done[1].token_ids


def test_a_request_that_is_refused_leaves_none_behind(engine):
    good, bad = Request(prompt="Hello", max_tokens=3), Request(prompt=[1, 999], max_tokens=3)
    with pytest.raises(pj.RequestError, match="999"):
        engine.generate([good, bad])
    assert not engine.has_work
    assert len(engine.generate([good])[0].token_ids) == 3
    with pytest.raises(pj.RequestError, match="requests holds 'Hello'; give a list of Request"):
        engine.generate(["Hello"])
    engine.add(good)
    with pytest.raises(pj.RequestError, match="1 requests are unfinished"):
        engine.generate([good])
    while engine.has_work:
        engine.step()


def job(model, name, rng, steps, **optimizer):
    config = JobConfig(
        name=name, adapter=LORA, max_steps=steps, batches=BatchOptions(batch_size=2),
        optimizer=OptimizerConfig(**optimizer),
    )  # fmt: skip
    return Job(config, model, examples(LORA, rng, 4))


def test_fit_trains_jobs_to_their_end_and_says_which_failed(lively, rng):
    jobs = [job(lively, "ann", rng, 2), job(lively, "bob", rng, 3), job(lively, "bad", rng, 3, learning_rate=1e38)]
    told = []
    ann, bob, bad = fit(lively, jobs, TrainOptions(max_jobs=2), on_result=told.append)
    assert [result.step for result in ann.results] == [1, 2]
    assert [result.step for result in bob.results] == [1, 2, 3]
    assert len(told) == len(ann.results) + len(bob.results) + len(bad.results)
    assert (ann.failed, bob.failed) == (None, None)
    assert "lower learning_rate" in bad.failed
    assert ann.adapter.digest != ann.job.initial.digest
    with pytest.raises(pj.ConfigError, match="jobs holds a str; give Job"):
        fit(lively, ["ann"])
