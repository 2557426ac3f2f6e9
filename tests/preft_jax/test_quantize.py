"""Models in FP8: what is quantised, what identifies them, and that they run as ``forward`` says."""

import dataclasses

import jax
import numpy as np
import pytest

import preft_jax
from preft_jax import ConfigError, Model, SamplingParams, generate, load_model
from preft_jax.adapters.merge import merge_lora
from preft_jax.errors import AdapterError, ModelError
from preft_jax.io.hf import save_hf_model
from preft_jax.loading import check_base
from preft_jax.models.linear import Quantized
from preft_jax.quantize import Quantization, is_quantized, quantize
from preft_jax.text.chat import EncodedPrompt

GREEDY = SamplingParams(temperature=0.0)
LINEARS = {"q", "k", "v", "o", "gate", "up", "down"}


@pytest.fixture(scope="module")
def quiet(lively):
    """Return ``lively`` in FP8."""
    return dataclasses.replace(lively, params=quantize(lively.params), quantization="fp8")


def in_fp8(model: Model) -> list[set[str]]:
    return [{name for name, w in layer.items() if isinstance(w, Quantized)} for layer in model.params["layers"]]


def test_linears_are_quantised_and_nothing_else(tiny):
    model = load_model("tiny", dtype="bfloat16", quantization="fp8")
    assert in_fp8(model) == [LINEARS] * 3
    assert not isinstance(model.params["embed"], Quantized)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {"bfloat16", "float8_e4m3fn", "float32"}
    assert "bfloat16, fp8, digest" in repr(model)
    assert not is_quantized(tiny.params)
    kept = load_model("tiny", quantization="fp8", keep_layers=(-1, 0))
    assert in_fp8(kept) == [set(), LINEARS, set()]
    assert kept.quantization == "fp8, layers 0,2 kept"


def test_kv_is_known_by_the_quantisation_and_adapters_are_not(tiny):
    """An adapter that was made for a base model loads on it in FP8."""
    models = [load_model("tiny", quantization="fp8", keep_layers=kept) for kept in ((), (0,), (-3,), (1,))]
    assert {model.digest for model in models} == {tiny.digest}
    assert len({model.kv_digest for model in (tiny, *models)}) == 4
    assert models[1].kv_digest == models[2].kv_digest
    assert tiny.kv_digest == tiny.digest
    adapter = preft_jax.random_adapter(preft_jax.AdapterConfig(rank=8), tiny.config, jax.random.key(0))
    made_for = dataclasses.replace(adapter.config, base_model_digest=tiny.digest)
    check_base(preft_jax.Adapter(made_for, adapter.params), models[0])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quantization": "fp4"}, "quantization 'fp4' is not supported .did you mean 'fp8'.*; allowed: none, fp8"),
        ({"quantization": "fp8", "keep_layers": (3,)}, "keep_layers has 3, and the model has 3 layers; give -3 to 2"),
        ({"keep_layers": (0,)}, "keep_layers is given and quantization is 'none'"),
    ],
)
def test_what_cannot_be_quantised_is_said(options, reason):
    with pytest.raises(ConfigError, match=reason):
        load_model("tiny", **options)


@pytest.mark.parametrize("name", [None, "lora", "loreft_f3l2", "lora_all"])
def test_generated_tokens_are_those_of_forward(quiet, lively, adapters, name):
    """Prompts are prefilled, tokens decoded, in other shapes than ``forward``'s: a row's scale is its own.

    0.1: a difference of float32 rounding moves an activation to the next number of FP8 at times.
    """
    adapter, prompt = adapters.get(name), list(range(40, 61))
    (done,) = generate(quiet, prompt, adapter, GREEDY, 4)
    tokens = np.array([[*prompt, *done.token_ids]], np.int32)
    edits = {}
    if adapter is not None:
        mask = preft_jax.prompt_edit_mask(EncodedPrompt(tuple(prompt), ()), adapter.config)
        mask = preft_jax.extend_edit_mask(mask, len(done.token_ids), adapter.config.positions)
        edits = {"folded": preft_jax.fold(adapter), "edit_mask_BSG": mask[None]}
    at = np.arange(len(prompt) - 1, tokens.shape[1] - 1)
    logprobs = {}
    for kind, model in (("fp8", quiet), ("plain", lively)):
        logits = preft_jax.forward(model.config, model.params, tokens, **edits)[0]
        logprobs[kind] = np.asarray(jax.nn.log_softmax(logits))[at]
    assert list(done.token_ids) == list(logprobs["fp8"].argmax(-1))
    chosen = {kind: values[np.arange(len(at)), list(done.token_ids)] for kind, values in logprobs.items()}
    np.testing.assert_allclose(done.logprobs, chosen["fp8"], atol=0.1)
    assert np.abs(logprobs["fp8"] - logprobs["plain"]).max() > 0.1


def test_an_adapter_on_fp8_does_what_it_does_on_the_plain_model(quiet, lively, adapters):
    """Not gibberish, as in vLLM #42007: rounding moves log-probabilities far less than the adapter does."""
    adapter, tokens = adapters["lora"], np.arange(40, 65, dtype=np.int32)[None]
    edits = {"folded": preft_jax.fold(adapter), "edit_mask_BSG": np.array([[[True, False]] * 25])}

    def logprobs(model, **edits):
        return np.asarray(jax.nn.log_softmax(preft_jax.forward(model.config, model.params, tokens, **edits)))

    plain, own = logprobs(lively), logprobs(lively, **edits)
    moved = np.abs(logprobs(quiet, **edits) - own).mean()
    assert 0 < moved < np.abs(own - plain).mean() / 3


def test_weights_in_fp8_are_neither_merged_nor_written(quiet, adapters, tmp_path):
    with pytest.raises(AdapterError, match="cannot be merged into weights in FP8"):
        merge_lora(quiet.params, adapters["lora_all"])
    with pytest.raises(ModelError, match="is in FP8, which is not written"):
        save_hf_model(tmp_path / "model", quiet.config, quiet.params)


def test_a_name_is_one_for_all_ways_to_say_it():
    assert Quantization(scheme="fp8", keep_layers=(-1, 29, 0)).name(30) == "fp8, layers 0,29 kept"
    assert Quantization().name(30) == "none"
