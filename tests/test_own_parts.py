"""Kinds, rules, losses, edits and masks of one's own: trained, saved, served, and collected by name."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import own_parts
import pytest
import reference
from engine_runs import TIGHT, request
from train_cases import example

import preft_jax as pj
from preft_jax.adapters.edit_mask import make_edit_mask
from preft_jax.adapters.kinds import KINDS
from serve import Engine
from train import BatchOptions, Job, JobConfig, Trainer

ATOL = 1e-4
"""Float32 rounding of log-probabilities in programs of other shapes."""

own_parts.register()
GATED = pj.AdapterConfig(kind="gated", rank=3, alpha=6.0, rank_pattern={"v_proj": 18}, positions="after-newline")
PROMPT = [7, 8, own_parts.NEWLINE, 9, 11, 12]
AFTER = np.array([False] * 3 + [True] * 3)


@pytest.fixture(scope="module")
def engine(lively):
    return Engine(lively, dataclasses.replace(TIGHT, all_token=True))


@pytest.fixture(scope="module")
def gated(lively):
    return pj.random_adapter(GATED, lively.config, jax.random.key(4), strength=0.7)


def greedy(prompt, adapter, **fields):
    return request(prompt, adapter, max_tokens=4, sampling=pj.SamplingParams(temperature=0.0), **fields)


def assert_served(engine, trained, model, one, mask):
    """The engine's log-probabilities are those of ``forward`` under this mask of the prompt."""
    (done,) = engine.generate([one])
    tokens = np.array([*one.token_ids, *done.token_ids])
    generated = not one.adapter.config.prefill_only
    whole = np.concatenate([mask, np.full(len(done.token_ids), generated)])
    expected = trained(model, one.adapter, tokens, np.stack([whole, np.zeros_like(whole)], axis=1))
    at = np.arange(len(one.token_ids) - 1, len(tokens) - 1)
    np.testing.assert_allclose(done.logprobs, expected[at, tokens[at + 1]], atol=10 * ATOL)
    return done


def test_the_parts_take_few_lines():
    text = Path(own_parts.__file__).read_text()
    assert len(text.splitlines()) < 3 * 40


def test_a_kind_folds_as_it_says(gated):
    edit = pj.fold(gated)["layers"][1]["v"]
    leaves = gated.params["layers"][1]["v"]
    assert edit.a_DR.shape == (64, 18)
    np.testing.assert_allclose(edit.a_DR, np.tanh(leaves["down"]), rtol=1e-6)
    np.testing.assert_allclose(edit.b_RF, 6 / 18 * leaves["gate"][:, None] * leaves["up"], rtol=1e-5)


def test_a_kind_and_a_rule_are_trained_saved_and_served(engine, trained, lively, rng, tmp_path):
    config = JobConfig(name="own", adapter=GATED, max_steps=3, batches=BatchOptions(batch_size=2))
    job = Job(config, lively, [])
    rows = [[dataclasses.replace(example(pj.AdapterConfig(), rng), edit_mask=np.ones((14, 2), bool))] for _ in range(2)]
    trainer = Trainer(lively, [job])
    for _ in range(3):  # The first warms up, and the gate is shut until one has moved it.
        trainer.forward_backward({job: rows}, "own-focal")
        trainer.optim_step()
    (result,) = trainer.finish().results
    assert result.finite
    assert 0 < result.metrics["miss"] < 1
    adapter = trainer.adapter_of(job)
    for leaf in ("down", "gate", "up"):
        before, after = (one.params["layers"][0]["block"][leaf] for one in (job.initial, adapter))
        assert np.abs(after - before).max() > 0, leaf
    pj.save_adapter(tmp_path, adapter)
    loaded = pj.load_adapter(tmp_path, lively)
    assert loaded.config == adapter.config
    assert loaded.digest == adapter.digest
    assert_served(engine, trained, lively, greedy(PROMPT, loaded), AFTER)


def test_a_kind_that_is_not_registered_here_is_named(gated, lively, tmp_path, monkeypatch):
    pj.save_adapter(tmp_path, gated)
    monkeypatch.delitem(KINDS, "gated")
    with pytest.raises(pj.AdapterError, match=r"unknown kind 'gated'; allowed: lora.*import the module"):
        pj.load_adapter(tmp_path, lively)
    own_parts.register()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["preft"]["positions"] = "after-tab"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(pj.AdapterError, match=r"positions 'after-tab' is not a rule.*register_positions"):
        pj.load_adapter(tmp_path, lively)


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (lambda config, leaves, scale: None, "gives NoneType; it is to return"),
        (lambda config, leaves, scale: (leaves["a"].T, None, leaves["b"]), r"at 'q' of layer 0: a has the shape"),
        (lambda config, leaves, scale: (leaves["a"], None, leaves["b"][:1]), r"b has the shape \[1, 64\], expected"),
    ],
)
def test_a_fold_that_gives_no_edit_is_named(fold, message, tiny, monkeypatch):
    monkeypatch.setitem(KINDS, "wrong", dataclasses.replace(KINDS["edits"], name="wrong", fold=fold))
    config = pj.AdapterConfig(kind="wrong", rank=2, targets=("q",))
    with pytest.raises(pj.ConfigError, match=message):
        pj.fold(pj.init_adapter(config, tiny.config, jax.random.key(0)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lora", 1, 2, 3), "there is a kind 'lora' already"),
        (("a b", 1, 2, 3), "the kind's name is 'a b'"),
        (("mine", 1, 2, 3), "shapes of the kind 'mine' is 1; give a function"),
    ],
)
def test_what_is_no_kind_is_refused(arguments, message):
    with pytest.raises(pj.ConfigError, match=message):
        pj.register_kind(*arguments)


def test_a_rule_sees_the_prompt_and_is_checked():
    assert make_edit_mask(6, "after-newline", token_ids=PROMPT)[:, 0].tolist() == AFTER.tolist()
    wrong = {
        "short": (lambda ids, n: np.ones(n - 1, bool), r"the mask of the rule 'short' has the shape \[5\], expected"),
        "floats": (lambda ids, n: np.ones(n), "the mask of the rule 'floats' is float64, expected bool"),
        "raises": (lambda ids, n: ids[99], "the rule 'raises' failed: IndexError"),
    }
    for name, (rule, message) in wrong.items():
        pj.register_positions(name, rule, replace=True)
        with pytest.raises(pj.RequestError, match=message):
            make_edit_mask(6, name, token_ids=PROMPT)
    with pytest.raises(pj.ConfigError, match="there is a rule 'f3' already"):
        pj.register_positions("f3", own_parts.after_the_last_newline)
    with pytest.raises(pj.ConfigError, match="positions is a function; register_positions"):
        pj.AdapterConfig(positions=own_parts.after_the_last_newline)


def test_a_mask_of_ones_own_is_served(engine, trained, lively, adapters):
    mask = np.array([True, False, True, False, False, True])
    one = greedy(PROMPT, adapters["lora"], edit_mask=mask)
    assert_served(engine, trained, lively, one, mask)
    by_rule = greedy(PROMPT, adapters["lora"], edit_mask=np.ones(6, bool))
    assert engine.generate([by_rule])[0].logprobs == engine.generate([greedy(PROMPT, adapters["lora"])])[0].logprobs


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(5, bool), r"edit_mask has the shape \[5\], expected \[P=6\]"),
        (np.ones((6, 1), bool), r"edit_mask has the shape \[6, 1\], expected \[P=6, G=2\]"),
        (np.ones(6), "edit_mask is float64, expected bool"),
        (np.eye(2, dtype=bool)[np.ones(6, int)], "edit_mask marks tokens in column 1, .* reads column 0 alone"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, message, engine, adapters):
    with pytest.raises(pj.RequestError, match=message):
        engine.add(greedy(PROMPT, adapters["lora"], edit_mask=mask))
    with pytest.raises(pj.RequestError, match="edit_mask is given without an adapter"):
        engine.add(greedy(PROMPT, None, edit_mask=np.ones(6, bool)))


def test_folded_edits_are_an_adapter(engine, trained, lively, adapters):
    lora = adapters["lora_pattern"]
    own = pj.adapter_of_edits(pj.fold(lora), lively.config)
    done = assert_served(engine, trained, lively, greedy(PROMPT, own), np.ones(6, bool))
    np.testing.assert_allclose(done.logprobs, engine.generate([greedy(PROMPT, lora)])[0].logprobs, atol=10 * ATOL)


@pytest.mark.parametrize("positions", ["prompt", "all", "l2"])
def test_steering_adds_a_vector(positions, engine, trained, lively, rng):
    vector = rng.standard_normal(64).astype(np.float32)
    steering = pj.steering_adapter({1: vector}, lively.config, strength=3.0, positions=positions)
    rule = make_edit_mask(6, positions)
    done = assert_served(engine, trained, lively, greedy(PROMPT, steering), rule[:, 0])
    assert done.logprobs != engine.generate([greedy(PROMPT, None)])[0].logprobs
    tokens, names = np.array([PROMPT], np.int32), ["layers.1.block", "layers.1.q.input"]
    base = pj.activations(lively.config, lively.params, tokens, names)
    moved = pj.activations(
        lively.config, lively.params, tokens, names, folded=pj.fold(steering), edit_mask_BSG=rule[None]
    )
    np.testing.assert_allclose(
        moved["layers.1.block"][0] - base["layers.1.block"][0], rule[:, :1] * 3 * vector, atol=ATOL
    )
    assert list(moved) == names


def test_activations_are_those_of_the_forward_pass(lively, rng):
    tokens = rng.integers(0, 250, (1, 9)).astype(np.int32)
    found = pj.activations(lively.config, lively.params, tokens, ["layers.1.block", "layers.0.k", "layers.0.q.input"])
    h = reference.f64(found["layers.1.block"][0])
    normed = h / np.sqrt((h**2).mean(axis=1, keepdims=True) + lively.config.rms_norm_eps)
    logits = normed * reference.f64(lively.params["norm"]) @ reference.f64(lively.params["embed"]).T
    np.testing.assert_allclose(logits, pj.forward(lively.config, lively.params, tokens)[0], atol=1e-3)
    x, k = found["layers.0.q.input"][0], found["layers.0.k"][0]
    np.testing.assert_allclose(jnp.dot(x, lively.params["layers"][0]["k"]), k, atol=ATOL)
    for name in ("layers.2.block", "block", "layers.0.norm", 3):
        with pytest.raises(pj.ConfigError, match="there is no activation"):
            pj.activations(lively.config, lively.params, tokens, [name])


def test_an_edit_without_a_constant_has_zeros(tiny):
    made = pj.adapter_of_edits({(0, "q"): (np.ones((64, 2)), None, np.ones((2, 64)))}, tiny.config)
    np.testing.assert_array_equal(pj.fold(made)["layers"][0]["q"].c_R, np.zeros(2))


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        ({}, pj.ConfigError, "there are no edits"),
        ({(9, "q"): ()}, pj.ConfigError, "there is no place"),
        ({(0, "x"): ()}, pj.ConfigError, "there is no place"),
        ({(0, "q"): 1}, pj.ShapeError, r"the edit of layers.0.q is 1; give"),
        ({(0, "q"): (np.ones((3, 1)), np.ones(1), np.ones((1, 64)))}, pj.ShapeError, r"layers.0.q.a_DR has the shape"),
        ({(0, "q"): (np.ones((64, 1)), np.full(1, np.nan), np.ones((1, 64)))}, pj.ConfigError, "not finite"),
        ([1], pj.ConfigError, "edits is"),
    ],
)
def test_what_is_no_edit_is_named(edits, error, message, tiny):
    with pytest.raises(error, match=message):
        pj.adapter_of_edits(edits, tiny.config)
    with pytest.raises(pj.ShapeError, match=r"the vector of layer 1 has the shape \[3\], expected \[D=64\]"):
        pj.steering_adapter({1: np.ones(3)}, tiny.config)
