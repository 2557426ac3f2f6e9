"""The two halves of training: gradients that are gathered, and updates of those jobs that are asked to step."""

import dataclasses

import jax
import numpy as np
import pytest
import train_cases as cases

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.errors import ConfigError
from train import losses
from train.data.documents import Document
from train.losses import register_loss
from train.trainer import Trainer, TrainOptions

CONFIG = AdapterConfig(rank=4, targets=("q", "down"))
OTHER = AdapterConfig(kind="direft", rank=3)

ATOL = 1e-4
"""Of parameters after an update of 3e-3 by Adam, where programs have other shapes."""


@pytest.fixture(scope="module")
def lively(lively):
    """Return ``lively`` with one layer, which compiles sooner than two."""
    config = dataclasses.replace(lively.config, num_hidden_layers=1)
    return dataclasses.replace(lively, config=config, params={**lively.params, "layers": lively.params["layers"][:1]})


@pytest.fixture
def linear(monkeypatch):
    """Register a loss whose slope is the advantage."""
    monkeypatch.setattr(losses, "_LOSSES", dict(losses._LOSSES))

    def linear(logprob_T, inputs):
        assert inputs.old_logprobs_T is None
        return -inputs.advantages_T * logprob_T, {"advantage": inputs.advantages_T}

    register_loss("linear", linear, needs=("advantages",))


def document(example, **fields):
    """Return an example as a document, with fields of its own."""
    made = {"weights": example.loss_mask.astype(np.float32), **fields}
    return Document(token_ids=example.token_ids, edit_mask=example.edit_mask, **made)


def one_job(model, config=CONFIG, data=(), name="a", **fields):
    return cases.job(model, config, list(data), name=name, **fields)


def same(one, other, atol=0.0):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def result_of(trainer):
    (result,) = trainer.finish().results
    return result


def test_the_halves_are_a_step(lively, rng):
    """Bitwise, over two updates of two micro-batches each; examples are documents whose weights are 0 or 1."""
    data = cases.examples(CONFIG, rng, 8)
    jobs = [one_job(lively, data=data, batches={"batch_size": 2}, gradient_accumulation_steps=2) for _ in range(2)]
    whole, halves = (Trainer(lively, [job]) for job in jobs)
    results = [whole.step(), whole.step(), whole.finish()][1:]
    for expected in results:
        for micro_batch in jobs[1].micro_batches():
            rows = [[document(example) for example in row] for row in jobs[1].rows(micro_batch)]
            halves.forward_backward({jobs[1]: rows})
        assert halves.optim_step() is None
        found = halves.finish()
        assert (found.tokens, found.padded_tokens) == (expected.tokens, expected.padded_tokens)
        assert found.results[0][1:] == expected.results[0][1:]
    same(halves.state_of(jobs[1]), whole.state_of(jobs[0]))


def test_jobs_step_when_they_are_asked_to_and_others_keep_what_they_gathered(lively, rng):
    """As each alone; one joins, with a group of its own, while another has gathered something."""
    rows = {name: [[document(example)] for example in cases.examples(config, rng, 3)]
            for name, config in (("a", CONFIG), ("b", OTHER), ("c", CONFIG))}  # fmt: skip

    def make():
        # SGD, which would step by numbers of any kind.
        sgd = {"optim": "sgd", "learning_rate": 0.1}
        return (
            one_job(lively, optimizer=sgd),
            one_job(lively, OTHER, name="b"),
            one_job(lively, name="c", optimizer=sgd),
        )

    alone = {}
    for job in make():
        trainer = Trainer(lively, [job])
        trainer.forward_backward({job: rows[job.name]})
        trainer.optim_step()
        alone[job.name] = result_of(trainer), trainer.state_of(job).params
    a, b, c = make()
    trainer = Trainer(lively, [a])
    trainer.forward_backward({a: rows["a"][:1]})
    trainer.add(b)
    trainer.add(c)
    trainer.forward_backward({b: rows["b"], c: rows["c"][:2]})
    first = {job: jax.tree.map(np.array, trainer.state_of(job)) for job in (a, c)}
    assert trainer.optim_step([b]) is None
    assert [result.job for result in trainer.finish().results] == [b]
    for job, state in first.items():
        same(trainer.state_of(job), state)
    trainer.forward_backward({a: rows["a"][1:], c: rows["c"][2:]})
    trainer.optim_step()
    results = {result.job: result for result in trainer.finish().results}
    assert results.keys() == {a, c}
    for job in (a, c):
        assert results[job].loss == pytest.approx(alone[job.name][0].loss, abs=1e-5)
    for job in (a, b, c):
        assert job.step == 1
        same(trainer.state_of(job).params, alone[job.name][1], ATOL)


def test_each_micro_batch_of_an_update_draws_its_own_dropout(lively, rng):
    config = dataclasses.replace(CONFIG, dropout=0.5)
    rows, norms = [[document(cases.example(config, rng))]], []
    for count in (1, 1, 2):
        job = one_job(lively, config)
        trainer = Trainer(lively, [job])
        for _ in range(count):
            trainer.forward_backward({job: rows})
        trainer.optim_step()
        norms.append(result_of(trainer).grad_norm)
    assert norms[0] == norms[1]
    assert abs(norms[2] - norms[0]) > 1e-3 * norms[0]


def test_a_slot_that_is_taken_again_has_gathered_nothing(lively, rng):
    rows = [[document(example)] for example in cases.examples(CONFIG, rng, 3)]
    a, b = (one_job(lively, name=name) for name in "ab")
    trainer = Trainer(lively, [a, b], TrainOptions(max_jobs=1))
    trainer.forward_backward({a: rows[:2]})
    trainer.release(a)
    trainer.forward_backward({b: rows[2:]})
    trainer.optim_step()
    found, own = result_of(trainer), one_job(lively, name="b")
    alone = Trainer(lively, [own])
    alone.forward_backward({own: rows[2:]})
    alone.optim_step()
    assert found.loss == result_of(alone).loss
    same(trainer.state_of(b), alone.state_of(own))


def test_weights_and_advantages_are_the_slope_of_the_loss(linear, lively, rng):
    """Advantages weigh tokens as weights do, but for what the sum is divided by; and may be negative."""
    examples = cases.examples(CONFIG, rng, 3)
    factors = [rng.uniform(0.2, 2, len(one)).astype(np.float32) for one in examples]
    advantages = [document(one, advantages=factor) for one, factor in zip(examples, factors, strict=True)]
    weights = [document(one, weights=one.loss_mask * factor) for one, factor in zip(examples, factors, strict=True)]
    negative = [dataclasses.replace(one, advantages=-one.advantages) for one in advantages]
    count = sum(one.weights[1:].sum() for one in advantages)
    total = sum(one.weights[1:].sum() for one in weights)
    found = {}
    for name, documents, loss in (
        ("a", advantages, "linear"),
        ("w", weights, "cross_entropy"),
        ("n", negative, "linear"),
    ):
        job = one_job(lively, optimizer={"optim": "sgd", "adam_beta1": 0.0, "max_grad_norm": 0.0})
        trainer = Trainer(lively, [job])
        trainer.forward_backward({job: [[one] for one in documents]}, loss)
        trainer.optim_step()
        moved = jax.tree.map(np.subtract, trainer.state_of(job).params, job.initial.params)
        found[name] = result_of(trainer), moved
    (by_advantage, moved), (by_weight, weighted) = found["a"], found["w"]
    assert by_advantage.loss == pytest.approx(by_weight.loss * total / count, rel=1e-5)
    assert by_advantage.metrics == {"advantage": pytest.approx(total / count, rel=1e-5)}
    assert by_weight.metrics == {}
    same(moved, jax.tree.map(lambda leaf: leaf * total / count, weighted), 1e-6)
    same(moved, jax.tree.map(np.negative, found["n"][1]), 1e-6)
    assert by_advantage.grad_norm > 0.01


def test_an_update_of_two_losses_is_their_sum_and_metrics_are_means_of_their_own_tokens(linear, lively, rng):
    examples = cases.examples(CONFIG, rng, 2)
    plain = [[document(one)] for one in examples]
    ones = [[document(one, advantages=np.full(len(one), 3.0))] for one in examples]
    both, simple = one_job(lively), one_job(lively)
    trainer = Trainer(lively, [both])
    trainer.forward_backward({both: plain[:1]})
    trainer.forward_backward({both: ones[1:]}, "linear")
    trainer.forward_backward({both: ones[1:]}, "linear")
    trainer.optim_step()
    found = result_of(trainer)
    assert found.metrics == {"advantage": pytest.approx(3.0)}
    alone = Trainer(lively, [simple])
    for row in [plain[0], *[plain[1]] * 6]:
        alone.forward_backward({simple: [row]})
    alone.optim_step()
    expected, counts = result_of(alone), [one.loss_mask.sum() for one in examples]
    assert found.loss == pytest.approx(
        expected.loss * (counts[0] + 6 * counts[1]) / (counts[0] + 2 * counts[1]), rel=1e-5
    )


def test_a_loss_that_sums_by_itself_is_refused_and_what_was_gathered_stays(linear, lively, rng):
    register_loss("sum", lambda logprob_T, inputs: (-logprob_T, {"surprise": -logprob_T.mean()}))
    rows = [[document(cases.example(CONFIG, rng))]]
    job = one_job(lively)
    trainer = Trainer(lively, [job])
    trainer.forward_backward({job: rows})
    with pytest.raises(ConfigError, match=r"the loss 'sum' gives surprise the shape \[\], expected \[128\]"):
        trainer.forward_backward({job: rows}, "sum")
    trainer.optim_step()
    assert result_of(trainer).finite


def test_the_optimizers_numbers_may_be_given(lively, rng):
    rows = [[document(cases.example(CONFIG, rng))]]
    job = one_job(lively)
    trainer = Trainer(lively, [job])
    trainer.forward_backward({job: rows})
    trainer.optim_step(numbers={job: job.numbers()._replace(learning_rate=np.float32(0))})
    assert result_of(trainer).learning_rate == 0
    same(trainer.adapter_of(job).params, job.initial.params)


def test_a_job_that_failed_has_gathered_nothing_and_takes_no_more_rows(lively, rng):
    rows = [[document(cases.example(CONFIG, rng))]]
    good, bad = one_job(lively), one_job(lively, name="bad")
    trainer = Trainer(lively, [good, bad])
    trainer.forward_backward({good: rows, bad: rows})
    trainer.optim_step(numbers={bad: bad.numbers()._replace(learning_rate=np.float32(np.inf))})
    trainer.forward_backward({good: rows, bad: rows})
    trainer.finish()
    assert "updated adapter is not finite" in bad.failed
    with pytest.raises(ConfigError, match="'bad' was given up: the updated adapter"):
        trainer.forward_backward({bad: rows})
    trainer.optim_step()
    assert result_of(trainer).job is good
    same(Adapter(bad.initial.config, trainer.state_of(bad).params).params, bad.initial.params)


def test_what_does_not_fit_is_refused_before_anything_is_gathered(lively, rng):
    one = cases.example(CONFIG, rng)
    job, waits = one_job(lively), one_job(lively, name="waits")
    trainer = Trainer(lively, [job, waits], TrainOptions(max_jobs=1))
    strange = dataclasses.replace(document(one), token_ids=one.token_ids + lively.config.vocab_size)
    for rows, loss, message in (
        ({job: [[one]]}, "cross-entropy", r"loss is 'cross-entropy' \(did you mean 'cross_entropy'\?\)"),
        ({job: [[one]]}, "ppo", "the loss 'ppo' needs old_logprobs, and a document of 'a' has none"),
        ({waits: [[one]]}, "cross_entropy", "'waits' has no slot: .* max_jobs is 1; running: a"),
        ({job: [[one] * 9]}, "cross_entropy", "a row of 'a' has 126 tokens and max_length is 64"),
        ({job: [[strange]]}, "cross_entropy", "token ids outside 0 to"),
        ({job: []}, "cross_entropy", "there are no rows"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer.forward_backward(rows, loss)
    with pytest.raises(ConfigError, match="'a' has gathered no gradients"):
        trainer.optim_step([job])
    assert trainer.optim_step() is None
    with pytest.raises(ConfigError, match="'a' has no examples"):
        trainer.step()
