"""Our forward passes against what transformers, peft and pyreft compute: fixtures made by ``tests/oracle``."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import preft_jax
from preft_jax.adapters.adapter import fold
from preft_jax.adapters.edit_mask import make_edit_mask
from preft_jax.io import pyreft
from preft_jax.models import forward
from preft_jax.text.chat import EncodedPrompt
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.request import Request

FIXTURES = Path(__file__).parents[2] / "fixtures"
F32_TOLERANCE = 2e-4
"""Of logits of order 10, between two float32 implementations that sum in different orders."""

FAMILIES = sorted(path.name for path in (FIXTURES / "models").iterdir())
PEFT_ADAPTERS = ("lora", "rslora", "patterns", "regex", "all_linear")


@functools.cache
def train_logits(config):
    return jax.jit(functools.partial(forward.forward, config))


def error(ours, theirs):
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_small_models_equal_transformers_in_float32(family):
    expected = np.load(FIXTURES / "models" / family / "logits.npz")
    model = preft_jax.load_model(FIXTURES / "models" / family, dtype="float32")
    ours = train_logits(model.config)(model.params, expected["tokens"])
    assert np.abs(expected["logits"]).max() > 0.1
    assert error(ours, expected["logits"]) <= F32_TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_small_models_in_bfloat16_err_at_most_twice_as_much_as_transformers(family):
    expected = np.load(FIXTURES / "models" / family / "logits.npz")
    model = preft_jax.load_model(FIXTURES / "models" / family, dtype="bfloat16")
    ours = train_logits(model.config)(model.params, expected["tokens"])
    assert error(ours, expected["logits"]) <= 2 * float(expected["bf16_max_abs_error"])


@pytest.mark.parametrize("family", FAMILIES)
def test_nnx_module_computes_the_same(family):
    """The module is the model's definition, so a checkpoint put into it must give the family's logits."""
    expected = np.load(FIXTURES / "models" / family / "logits.npz")
    model = preft_jax.load_model(FIXTURES / "models" / family, dtype="float32")
    module = preft_jax.Llama(model.config, rngs=nnx.Rngs(0))
    for name in ("embed", "norm", "lm_head"):
        if name in model.params:
            getattr(module, name)[...] = model.params[name]
    for layer, weights in zip(module.layers, model.params["layers"], strict=True):
        for name, value in weights.items():
            getattr(layer, name)[...] = value
    assert error(module(jnp.asarray(expected["tokens"])), expected["logits"]) <= F32_TOLERANCE


@pytest.fixture(scope="module")
def texts():
    return json.loads((FIXTURES / "smollm2" / "prompts.json").read_text())["texts"]


@pytest.fixture(scope="module")
def greedy_prompts():
    prompts = json.loads((FIXTURES / "smollm2" / "prompts.json").read_text())["greedy"]
    return prompts, json.loads((FIXTURES / "smollm2" / "greedy.json").read_text())


def test_smollm2_equals_transformers_in_float32(smollm2, texts):
    expected = np.load(FIXTURES / "smollm2" / "logits.npz")
    for i, text in enumerate(texts):
        logits = train_logits(smollm2.config)(smollm2.params, jnp.asarray([text["token_ids"]]))[0]
        assert error(logits[:, ::16], expected[f"logits_{i}"]) <= F32_TOLERANCE
        assert error(jax.nn.logsumexp(logits, axis=-1), expected[f"logsumexp_{i}"]) <= F32_TOLERANCE


def test_smollm2_in_bfloat16_errs_at_most_twice_as_much_as_transformers(smollm2, texts):
    expected = np.load(FIXTURES / "smollm2" / "logits.npz")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), smollm2.params)
    worst = 0.0
    for i, text in enumerate(texts):
        logits = train_logits(smollm2.config)(params, jnp.asarray([text["token_ids"]]))[0]
        worst = max(worst, error(logits[:, ::16], expected[f"logits_{i}"]))
    assert worst <= 2 * float(expected["bf16_max_abs_error"])


def test_smollm2_greedy_text_of_twenty_prompts_equals_transformers(smollm2, greedy_prompts):
    prompts, expected = greedy_prompts
    assert len(prompts) == 20
    # One prefill of them all, and more than a quarter of the rows to the end: three programs.
    sizes = EngineConfig(max_num_seqs=20, max_model_len=128, prefill_tokens=640, prefill_seqs=20, prefix_caching=False)
    greedy = preft_jax.SamplingParams(temperature=0)
    requests = [
        Request(prompt=EncodedPrompt(prompt["token_ids"], ()), sampling=greedy, max_tokens=32) for prompt in prompts
    ]
    done = Engine(smollm2, sizes).generate(requests)
    for ours, theirs in zip(done, expected, strict=True):
        assert ours.token_ids == theirs["token_ids"]


@pytest.mark.filterwarnings("ignore:.* was trained on 'tiny-llama'")
@pytest.mark.parametrize("name", PEFT_ADAPTERS)
def test_lora_on_all_tokens_equals_peft(name):
    expected = np.load(FIXTURES / "peft" / "logits.npz")
    model = preft_jax.load_model(FIXTURES / "peft" / "base", dtype="float32")
    adapter = preft_jax.load_adapter(FIXTURES / "peft" / name, model)
    tokens = expected["tokens"]
    mask = np.stack([make_edit_mask(tokens.shape[1], adapter.config.positions)] * len(tokens))
    ours = train_logits(model.config)(model.params, tokens, folded=fold(adapter), edit_mask_BSG=mask)
    assert error(expected["base"], expected[name]) > 100 * F32_TOLERANCE, "the fixture's adapter does nothing"
    assert error(ours, expected[name]) <= F32_TOLERANCE


def stored_state_dict(file):
    """Return a pyreft file's tensors without torch, from the copy that the fixture holds beside it."""
    stored = np.load(Path(file).parent / "state.npz")
    prefix = f"{Path(file).stem}/"
    return {key.removeprefix(prefix): stored[key] for key in stored if key.startswith(prefix) and stored[key].ndim}


@pytest.mark.parametrize("name", ["loreft", "loreft_unshared", "direft", "nodireft"])
def test_converted_pyreft_folder_equals_pyreft(name, monkeypatch):
    expected = np.load(FIXTURES / "peft" / "pyreft" / "logits.npz")
    monkeypatch.setattr(pyreft, "_load_state_dict", stored_state_dict)
    model = preft_jax.load_model(FIXTURES / "peft" / "base", dtype="float32")
    adapter = pyreft.convert_pyreft(FIXTURES / "peft" / "pyreft" / name, model.config, positions="f3+l2")
    tokens = expected["tokens"]
    config = adapter.config
    mask = np.stack([make_edit_mask(tokens.shape[1], config.positions, groups=config.groups)] * len(tokens))
    ours = train_logits(model.config)(model.params, tokens, folded=fold(adapter), edit_mask_BSG=mask)
    base = train_logits(model.config)(model.params, tokens)
    assert error(base, expected[name]) > 100 * F32_TOLERANCE, "the fixture's adapter does nothing"
    assert error(ours, expected[name]) <= F32_TOLERANCE
