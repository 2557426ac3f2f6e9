"""Units of layers and windows give the gradients of the whole micro-batch. Float32, sums in another order: 2e-5."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import train_cases as cases
from conftest import ADAPTER_CONFIGS, PREFIX

from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.init import random_adapter
from preft_jax.errors import ConfigError
from train.cutting import WindowOptions
from train.data.batches import Rows, collate
from train.flat import trees_of
from train.step import Group, Programs, empty_slots, fold_config, sums_of
from train.window import Windowed

TOLERANCE = 2e-5
"""Of the largest number of a leaf's gradient."""

KINDS = ADAPTER_CONFIGS | {"small": AdapterConfig(rank=8, alpha=12.0, targets=("q", "down")), "prefix": PREFIX}


@pytest.fixture(autouse=True)
def full_float32():
    """On a GPU, XLA multiplies float32 matrices in TF32 unless it is told not to."""
    with jax.default_matmul_precision("highest"):
        yield


def setting(model, names, rng, *, prompts=((30, 9), (3, 40)), packed=False, rows_each=2):
    """Return groups, parameters and a micro-batch: for each adapter rows with prompts and answers so long."""
    groups, params, parts = [], [], []
    for slot, name in enumerate(names):
        config = KINDS[name]
        adapter = random_adapter(config, model.config, jax.random.key(slot), strength=0.5)
        groups.append(Group(fold_config(config), "adamw", 1))
        params.append(empty_slots(groups[-1], adapter.params).params)
        rows = [[cases.example(config, rng, *prompts[i % len(prompts)])] for i in range(rows_each)]
        if packed:
            rows = [[one, cases.example(config, rng, 6, 5)] for (one,) in rows]
        parts.append(Rows(rows, slot, 7, 0, config.prefix_length))
    batch = collate(parts, num_rows=len(names) * rows_each, max_length=64, packed=packed)
    return tuple(groups), tuple(params), batch


def check(model, groups, params, batch, options, dropout=None):
    """Compare with ``step.gradients``; return the sums of units."""
    programs = Programs(model.config, groups, attention="xla", remat="none")
    whole = sums_of(programs.accumulate(model.params, params, None, batch, dropout), params)
    units = Windowed(model.config, groups, options).units(params, batch, dropout)
    sums = units.finish(model.params)
    np.testing.assert_allclose(sums.loss_J, whole.loss_J, rtol=1e-5)
    np.testing.assert_array_equal(sums.count_J, whole.count_J)
    for ours, expected in zip(*(jax.tree.leaves(trees_of(own)) for own in (sums.grads, whole.grads)), strict=True):
        largest = np.abs(expected).max()
        np.testing.assert_allclose(ours, expected, atol=TOLERANCE * max(largest, 1e-3))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(trees_of(whole.grads))) > 1e-2
    return sums


@pytest.mark.parametrize("order", ["layers", "windows"])
def test_windows_of_one_adapter_add_up(order, lively, rng):
    groups, params, batch = setting(lively, ["loreft_f3l2" if order == "layers" else "prefix"], rng)
    check(lively, groups, params, batch, WindowOptions(tokens=32, layers=1, order=order))


def test_units_add_up_whose_layers_are_not_equally_many(lively, rng):
    """Three layers by two."""
    config = dataclasses.replace(lively.config, num_hidden_layers=3)
    layers = [*lively.params["layers"], lively.params["layers"][0]]
    model = dataclasses.replace(lively, config=config, params={**lively.params, "layers": layers})
    groups, params, batch = setting(model, ["small"], rng)
    check(model, groups, params, batch, WindowOptions(tokens=64, layers=2))


def test_windows_of_many_adapters_add_up(lively, rng):
    groups, params, batch = setting(lively, ["lora", "direft", "lora_pattern", "prefix"], rng, rows_each=1)
    check(lively, groups, params, batch, WindowOptions(tokens=32))


@pytest.mark.parametrize("order", ["layers", "windows"])
def test_windows_add_up_if_products_are_kept(order, lively, rng):
    groups, params, batch = setting(lively, ["lora", "prefix"], rng, rows_each=1, packed=True)
    options = WindowOptions(tokens=32, layers=1, order=order, remat="cheap")
    check(lively, groups, params, batch, options, np.full(2, 0.3, np.float32))


def test_what_is_kept_is_what_products_gave_and_no_weight(lively, rng):
    """Little besides: the angles of rotations and what masks say."""
    groups, params, batch = setting(lively, ["lora"], rng)
    windowed = Windowed(lively.config, groups, WindowOptions(tokens=32, layers=2, remat="cheap"))
    units, kept = windowed.units(params, batch), []

    class Noting:
        def __call__(self, *args, **static):
            out = forward(*args, **static)
            kept.append(sum(leaf.nbytes for leaf in jax.tree.leaves(out[2])))
            return out

    forward, windowed._forward = windowed._forward, Noting()
    units.finish(lively.params)
    itemsize = lively.params["embed"].dtype.itemsize
    less = windowed.kept_bytes(batch.tokens_BS.size, lively.params["embed"].dtype)
    less -= Windowed(lively.config, groups, WindowOptions(layers=2)).kept_bytes(batch.tokens_BS.size, np.float32)
    assert itemsize == 4
    assert 0.9 * less <= sum(kept) <= 1.1 * less


def test_windows_of_packed_rows_with_dropout_and_a_sliding_window(lively, rng):
    """And rows that no number of windows fills."""
    groups, params, batch = setting(lively, ["small"], rng, packed=True)
    model = dataclasses.replace(lively, config=dataclasses.replace(lively.config, sliding_window=7))
    check(model, groups, params, batch, WindowOptions(tokens=40, layers=1), np.full(1, 0.3, np.float32))


def test_what_needs_no_unit_has_none(lively, rng):
    """Of six windows the last two hold padding alone; only the third is edited: answers' windows hand cotangents on."""
    config = KINDS["small"]
    groups, params, _ = setting(lively, ["small"], rng)
    one = cases.example(config, rng, 20, 40)
    mask = np.zeros_like(one.edit_mask)
    mask[[33, 35]] = one.edit_mask[0]
    rows = [[dataclasses.replace(one, edit_mask=mask)]]
    batch = collate([Rows(rows, 0, 0, 0)], num_rows=1, max_length=96, packed=False)
    options = WindowOptions(tokens=16, layers=2)
    windowed = Windowed(lively.config, groups, options)
    units = windowed.units(params, batch)
    names = []
    while units.name is not None:
        names.append(units.name)
        units.start(lively.params)
    # Four windows forward, three of which are learned from; two backward, one of which has no edits.
    forward = ["forward-16", "forward-32", "loss", "forward-64", "loss", "forward-64", "loss"]
    assert names == ["edits", *forward, "backward-64-plain", "backward-64", "fold"]
    check(lively, groups, params, batch, options)


def test_sums_go_on_and_programs_are_few(lively, rng):
    groups, params, batch = setting(lively, ["small"], rng)
    windowed = Windowed(lively.config, groups, WindowOptions(tokens=32, layers=2))
    once = windowed.units(params, batch).finish(lively.params)
    programs = windowed.num_programs
    twice = windowed.units(params, batch, sums=once).finish(lively.params)
    assert windowed.num_programs == programs + 1, "the sum of two micro-batches"
    np.testing.assert_allclose(twice.count_J, 2 * once.count_J)
    for ours, half in zip(*map(jax.tree.leaves, (twice.grads, once.grads)), strict=True):
        np.testing.assert_allclose(ours, 2 * half, rtol=1e-6)


def test_an_evaluation_is_the_loss_without_gradients_and_adds_one_program(lively, rng):
    groups, params, batch = setting(lively, ["small"], rng)
    windowed = Windowed(lively.config, groups, WindowOptions(tokens=32, layers=2))
    sums = windowed.units(params, batch).finish(lively.params)
    programs = windowed.num_programs
    units = windowed.evaluation(params, batch)
    found = units.finish(lively.params)
    assert (found.grads, found.metrics, units.name) == ((), {}, None)
    np.testing.assert_allclose(found.loss_J, sums.loss_J, rtol=1e-6)
    np.testing.assert_array_equal(found.count_J, sums.count_J)
    assert windowed.num_programs == programs + 1
    nothing = batch._replace(weights_BS=np.zeros_like(batch.weights_BS))
    assert windowed.evaluation(params, nothing).finish(lively.params).count_J == 0


def test_rows_share_the_tokens_of_a_window():
    assert [WindowOptions(tokens=512).in_a_row(rows) for rows in (1, 2, 3, 4, 8, 9)] == [512, 256, 128, 128, 64, 64]
    assert [WindowOptions(tokens=40).in_a_row(rows) for rows in (1, 2, 64)] == [40, 40, 40]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"remat": "none"}, "allowed: cheap, full"),
        ({"tokens": 0}, "tokens of a window is 0"),
        ({"layers": 1.5}, "layers"),
        ({"order": "rows"}, "allowed: layers, "),
    ],
)
def test_options_that_cut_nothing_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        WindowOptions(**fields)


EXACT = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
jnp.float32 = jnp.float64  # What the code does in float32 it does in float64.
import test_window as w
import preft_jax
from preft_jax.config import PRESETS
from train.step import Programs, sums_of

def attention(q, k, v, mask=None, is_causal=False, **_):
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhc,bshc->bhqs", q, k) * q.shape[3] ** -0.5
    seen = jnp.tril(jnp.ones(scores.shape[2:], bool)) if mask is None else mask
    return jnp.einsum("bhqs,bshc->bqhc", jax.nn.softmax(jnp.where(seen, scores, -1e30)), v)

jax.nn.dot_product_attention = attention  # JAX's own has its softmax in float32.
from train.cutting import WindowOptions
from train.window import Windowed
jax.config.update("jax_numpy_dtype_promotion", "standard")  # Rotations are float32 in any case.
PRESETS["tiny"] = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=2)
model = preft_jax.load_model("tiny", dtype="float32")
def wide(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
groups, params, batch = w.setting(model, ["lora"], np.random.default_rng(0))
base, params, batch = wide(model.params), wide(params), jax.tree.map(np.asarray, wide(batch))
programs = Programs(model.config, groups, attention="xla", remat="none")
whole = sums_of(programs.accumulate(base, params, None, batch, None), params)
for order in ("layers", "windows"):
    options = WindowOptions(tokens=16, layers=1, order=order)
    sums = Windowed(model.config, groups, options).units(params, batch).finish(base)
    for ours, expected in zip(*(jax.tree.leaves(w.trees_of(own)) for own in (sums.grads, whole.grads)), strict=True):
        assert ours.dtype == np.float64
        print(float(np.abs(ours - expected).max() / np.abs(expected).max()))
"""


def test_in_float64_they_are_the_gradients_to_the_last_digits():
    here = str(Path(__file__).parent)
    paths = [here, str(Path(here).parent), str(Path(here).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", EXACT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) >= 4
    assert max(errors) <= 1e-12
