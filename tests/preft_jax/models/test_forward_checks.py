"""What ``forward`` and its like are given is checked axis by axis, traced or not, before anything is computed.

Nothing here computes: programs are traced with ``jax.eval_shape``.
"""

import functools

import jax
import numpy as np
import pytest

from preft_jax import PRESETS, AdapterConfig, ShapeError
from preft_jax.adapters.config import adapter_shapes
from preft_jax.adapters.edit_mask import extend_edit_mask
from preft_jax.adapters.fold import fold_params
from preft_jax.models.forward import forward, hidden_states
from preft_jax.models.modules import init_params

pytestmark = pytest.mark.host

CONFIG = PRESETS["tiny"]
B, S = 2, 16
TOKENS = np.zeros((B, S), np.int32)
MASK = np.ones((B, S, 2), bool)
LORA = AdapterConfig(rank=4)


@pytest.fixture(scope="module")
def params():
    return jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0), "float32"))


@pytest.fixture(scope="module")
def folded():
    shapes = adapter_shapes(LORA, CONFIG)["layers"]
    leaves = [{s: {n: np.zeros(x, np.float32) for n, x in own.items()} for s, own in layer.items()} for layer in shapes]
    return jax.eval_shape(functools.partial(fold_params, LORA), {"layers": leaves})


def traced(params, folded, tokens=TOKENS, **arrays):
    """Return the shape of the logits; arrays are closed over, as NumPy has them, and the trees are traced."""
    mask = {"edit_mask_BSG": MASK} | arrays
    return jax.eval_shape(lambda p, f: forward(CONFIG, p, tokens, folded=f, **mask), params, folded).shape


def test_numpy_arrays_closed_over_are_taken(params, folded):
    given = {"segments_BS": np.ones((B, S), np.int32), "positions_BS": np.zeros((B, S), np.int32)}
    assert traced(params, folded, **given) == (B, S, CONFIG.vocab_size)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"edit_mask_BSG": MASK[..., 0]}, r"edit_mask_BSG has the shape \[2, 16\], expected \[B=2, S=16, G=2\]"),
        ({"edit_mask_BSG": MASK[..., :1]}, r"edit_mask_BSG has the shape \[2, 16, 1\], expected"),
        ({"edit_mask_BSG": MASK[:1]}, r"edit_mask_BSG has the shape \[1, 16, 2\], expected"),
        ({"edit_mask_BSG": MASK.swapaxes(0, 1)}, r"edit_mask_BSG has the shape \[16, 2, 2\], expected"),
        ({"edit_mask_BSG": MASK.astype(np.float32)}, r"edit_mask_BSG is float32, expected bool"),
        ({"edit_mask_BSG": MASK.tolist()}, r"edit_mask_BSG is \[.*; give an array of NumPy or JAX, bool"),
        ({"edit_mask_BSG": None}, "give both, or neither"),
        ({"segments_BS": np.ones(S, np.int32)}, r"segments_BS has the shape \[16\], expected \[B=2, S=16\]"),
        ({"segments_BS": np.ones((B, S), bool)}, "segments_BS is bool, expected int"),
        ({"positions_BS": np.ones((1, S), np.int32)}, r"positions_BS has the shape \[1, 16\]"),
        ({"tokens": TOKENS[0]}, r"tokens_BS has the shape \[16\], expected \[B, S\]"),
        ({"tokens": TOKENS.astype(np.float32)}, "tokens_BS is float32, expected int"),
        ({"tokens": TOKENS - 1}, "tokens_BS holds the token id -1; the model's vocabulary is 0 to 255"),
        ({"tokens": TOKENS + CONFIG.vocab_size}, "tokens_BS holds the token id 256"),
    ],
)
def test_what_does_not_fit_is_named(arrays, message, params, folded):
    with pytest.raises(ShapeError, match=message):
        traced(params, folded, **arrays)


def test_a_traced_mask_is_checked_too(params, folded):
    def run(p, f, mask):
        return forward(CONFIG, p, TOKENS, folded=f, edit_mask_BSG=mask)

    with pytest.raises(ShapeError, match=r"\[2, 16\], expected"):
        jax.eval_shape(run, params, folded, MASK[..., 0])


def edited(folded, **leaves):
    """Return the fold with other leaves at one site of the second layer."""
    layers = [dict(layer) for layer in folded["layers"]]
    layers[1]["q"] = layers[1]["q"]._replace(**leaves)
    return {"layers": layers}


def zeros(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def test_edits_of_other_widths_are_named_by_layer_and_site(params, folded):
    with pytest.raises(ShapeError, match=r"layers.1.q.a_DR has the shape \[32, 4\], expected \[D=64, R=4\]"):
        traced(params, edited(folded, a_DR=zeros(32, 4)))
    with pytest.raises(ShapeError, match=r"layers.1.q.b_RF has the shape \[5, 64\], expected \[R=4, F=64\]"):
        traced(params, edited(folded, b_RF=zeros(5, 64)))
    with pytest.raises(ShapeError, match=r"layers.1.q.c_R has the shape \[\], expected"):
        traced(params, edited(folded, c_R=zeros()))
    with pytest.raises(ShapeError, match=r"layers.1.q.group_R is float32, expected int \[R=4\]"):
        traced(params, edited(folded, group_R=zeros(4)))


def test_a_fold_of_other_layers_and_what_is_none(params, folded):
    with pytest.raises(ShapeError, match="folded is for 2 layers and the model has 3"):
        traced(params, {"layers": folded["layers"][:2]})
    with pytest.raises(ShapeError, match=r"folded is of type tuple; give what fold\(adapter\)"):
        forward(CONFIG, params, TOKENS, folded=(1,), edit_mask_BSG=MASK)


def test_a_model_in_place_of_its_parts(tiny_text, params):
    with pytest.raises(ShapeError, match=r"config is of type Model; give .* model.config"):
        forward(tiny_text, params, TOKENS)
    with pytest.raises(ShapeError, match=r"params is of type Model; give .* model.params"):
        hidden_states(CONFIG, tiny_text, TOKENS, None)


def test_a_prompt_mask_without_groups_is_not_extended():
    with pytest.raises(ShapeError, match=r"mask_TG has the shape \[3\], expected \[T, G=2\]"):
        extend_edit_mask(np.ones(3, bool), 2, "prompt")
