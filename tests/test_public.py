"""The public names of the library, of serving and of training: what there is, and how each is called."""

import copy
import dataclasses
import importlib
import inspect
import pickle
import pkgutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import preft_jax
import serve
import train
from preft_jax import AdapterConfig, ConfigError
from preft_jax.config import PRESETS
from preft_jax.frozen import FrozenDict
from preft_jax.sampling.parameters import derived_seed
from preft_jax.text import chat
from train.run import options

pytestmark = pytest.mark.host

PACKAGES = preft_jax, serve, train
TINY = PRESETS["tiny"]

SIGNATURES = {
    "preft_jax.activations": (
        "config, params, tokens_BS, names, *, folded=None, edit_mask_BSG=None, segments_BS=None, positions_BS=None"
    ),
    "preft_jax.adapter_of_edits": "edits, model, config",
    "preft_jax.register_positions": "name, function, *, replace=False",
    "preft_jax.steering_adapter": "vectors, model, *, strength=1.0, positions='prompt'",
    "preft_jax.text_prefix": "config, model, text=None",
    "preft_jax.collate": "examples, *, length=None",
    "preft_jax.encode_prompt": "tokenizer, prompt, *, vocab_size, add_generation_prompt=True, add_special_tokens=None",
    "preft_jax.extend_edit_mask": "mask_TG, num_generated, positions",
    "preft_jax.fold": "adapter",
    "preft_jax.fold_params": "config, params",
    "preft_jax.forward": (
        "config, params, tokens_BS, *, folded=None, edit_mask_BSG=None, segments_BS=None, positions_BS=None"
    ),
    "preft_jax.fused_layout": "params, *, transpose, consume=False, shards=1",
    "preft_jax.generate": (
        "model, prompts, adapters=None, sampling=SamplingParams(), max_tokens=64, *, max_num_seqs=16, seed=0, "
        "edit_masks=None"
    ),
    "preft_jax.hidden_states": (
        "config, params, tokens_BS, edits, *, segments_BS=None, positions_BS=None, attention='xla', remat='none'"
    ),
    "preft_jax.init_adapter": "config, model, key",
    "preft_jax.load_adapter": "path, model, *, allow_base_mismatch=False, limits=None",
    "preft_jax.load_model": (
        "name_or_path, dtype=None, check_finite=False, seed=0, quantization='none', keep_layers=(), mesh=None"
    ),
    "preft_jax.logprobs": "model, prompts, answers, adapters=None, *, edit_masks=None, batch_size=8",
    "preft_jax.perplexity": "model, prompts, answers, adapters=None, options",
    "preft_jax.prompt_edit_mask": "prompt, config",
    "preft_jax.sequence_edit_mask": "prompt, config, num_generated, *, own=None",
    "preft_jax.random_adapter": "config, model, key, *, strength=0.05",
    "preft_jax.register_kind": (
        "name, shapes, init, fold, *, sites=('q', 'k', 'v', 'o', 'gate', 'up', 'down', 'block'), targets=(), "
        "ranked=True, scaled=False, grouped=False, replace=False"
    ),
    "preft_jax.save_adapter": ("path, adapter, *, format='preft', allow_prefill_only_as_peft=False, base_model=None"),
    "serve.Engine.add": "self, request",
    "serve.Engine.cancel": "self, request_id, error=None",
    "serve.Engine.generate": "self, requests",
    "serve.Engine.step": "self",
    "serve.Request": (
        "*, prompt, adapter=None, sampling=SamplingParams(), max_tokens=64, n=1, stop=(), logprobs=None, "
        "prompt_logprobs=None, priority=0, deadline=None, seed=None, tenant=None, cache_salt=None, edit_mask=None, "
        "handover=None"
    ),
    "serve.hand_over": "engine, requests",
    "train.Job": "config, model, examples, held_out=(), initial=None",
    "train.Trainer": "model, jobs=(), options=TrainOptions(), placement=None",
    "train.Trainer.forward_backward": "self, rows, loss='cross_entropy'",
    "train.Trainer.optim_step": "self, jobs=None, numbers=None",
    "train.fit": "model, jobs, options=TrainOptions(), placement=None, on_result=None",
    "train.register_loss": "name, function, needs=(), *, replace=False",
    "train.sampled_document": "prompt, answer, config, *, logprobs, advantage, weight=1.0",
}
"""Arguments and their defaults. A change here is one that users notice: CHANGELOG says it."""


def signature(path):
    package, *names = path.split(".")
    found = importlib.import_module(package)
    for name in names:
        found = getattr(found, name)
    shown = []
    star = False
    for parameter in inspect.signature(found).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            shown.append("*")
            star = True
        default = parameter.default
        if default is parameter.empty:
            shown.append(parameter.name)
        elif dataclasses.is_dataclass(default):
            assert default == type(default)()
            shown.append(f"{parameter.name}={type(default).__name__}()")
        else:
            shown.append(f"{parameter.name}={default!r}")
    return ", ".join(shown)


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures_stay(path):
    assert signature(path) == SIGNATURES[path]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_is_there(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    assert len(set(package.__all__)) == len(package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_there_is_one_request():
    assert serve.Request is importlib.import_module("serve.engine.request").Request
    assert serve.Engine is importlib.import_module("serve.engine.engine").Engine


@pytest.mark.parametrize("package", ["preft_jax", "serve", "train", "serve.engine"])
def test_importing_a_package_loads_no_jax(package):
    code = f"import sys, {package}; print(sorted({{'jax', 'numpy', 'flax'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


CONFIGS = (
    AdapterConfig(rank_pattern={"q": 2, "v_proj": 3}, alpha_pattern={"q": 1.0}, layers=[0, 1], targets=["q", "v"]),
    TINY,
    PRESETS["llama3-8b"],
    preft_jax.SamplingParams(logit_bias={1: 2.0}, stop_token_ids=[3]),
    serve.EngineConfig(),
    train.JobConfig(asked={"rank": 3}),
    train.TrainOptions(),
    train.OptimizerConfig(),
    train.BatchOptions(),
    train.DataOptions(),
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_configurations_hash_and_equal_ones_alike(config):
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert hash(again) == hash(config) == hash(copy.deepcopy(config))


def test_the_order_of_patterns_counts_for_the_first_match_wins():
    one, other = ({"q": 1, "v": 2}, {"v": 2, "q": 1})
    assert AdapterConfig(rank_pattern=one) != AdapterConfig(rank_pattern=other)
    assert AdapterConfig(rank_pattern=one) == AdapterConfig(rank_pattern=dict(one))
    assert AdapterConfig(layers=[1]) == AdapterConfig(layers=(1,))
    frozen = AdapterConfig(rank_pattern=one).rank_pattern
    assert isinstance(frozen, FrozenDict)
    with pytest.raises(TypeError, match="cannot be changed"):
        frozen["q"] = 3


KEY_CONFIGS = [
    AdapterConfig(rank=4, rank_pattern={"v": 3}),
    AdapterConfig(kind="direft", rank=3),
    AdapterConfig(kind="loreft", rank=2, positions="f2+l2", share_weights=False),
    AdapterConfig(kind="edits", rank=2, targets=("q", "block"), layers=(1,)),
]


@pytest.mark.parametrize("config", KEY_CONFIGS, ids=lambda config: config.kind)
def test_an_adapter_is_a_pytree(config):
    adapter = preft_jax.init_adapter(config, TINY, np.full(2, 3, np.uint32))
    leaves, tree = jax.tree.flatten(adapter)
    assert len(leaves) == len(jax.tree.leaves(adapter.params))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, adapter)
    assert isinstance(doubled, preft_jax.Adapter)
    assert doubled.config is config
    assert jax.tree.unflatten(tree, leaves).params == adapter.params
    assert hash(tree) == hash(jax.tree.structure(doubled))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((AdapterConfig(), TINY, 0), "key is 0; give what jax.random.key returns"),
        ((AdapterConfig(), "tiny", None), "model is of type str; give the ModelConfig"),
        (("lora", TINY, None), "config is of type str; give an AdapterConfig"),
        ((AdapterConfig(kind="loreft", rank=100), TINY, None), "rank 100 is larger than the model's hidden size 64"),
    ],
)
def test_init_adapter_says_what_it_takes(arguments, message):
    config, model, key = arguments
    with pytest.raises(ConfigError, match=message):
        preft_jax.init_adapter(config, model, np.zeros(2, np.uint32) if key is None else key)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: preft_jax.load_adapter(model, "a"), "path is of type Model; give the adapter's directory"),
        (lambda model: preft_jax.save_adapter(AdapterConfig(), "a"), "path is of type AdapterConfig; give a directory"),
        (
            lambda model: preft_jax.save_adapter("a", AdapterConfig()),
            "adapter is of type AdapterConfig; give an Adapter",
        ),
        (lambda model: preft_jax.fold(AdapterConfig()), "adapter is of type AdapterConfig; give an Adapter"),
        (
            lambda model: preft_jax.prompt_edit_mask("a", AdapterConfig()),
            "prompt is of type str; give what encode_prompt",
        ),
        (lambda model: preft_jax.steering_adapter({}, model), "model is of type Model; give the ModelConfig"),
        (lambda model: serve.Engine(model.config), "model is of type ModelConfig; give what load_model returns"),
        (lambda model: serve.Engine(model, {}), "config is of type dict; give an EngineConfig"),
    ],
)
def test_what_is_given_in_place_of_something_else_is_named(call, message, tiny_text):
    with pytest.raises(preft_jax.PreftError, match=message):
        call(tiny_text)


def test_rows_are_padded_and_shifted():
    mask = np.ones((3, 2), bool)
    rows = preft_jax.collate([([5, 6, 7], mask, [1, 0, 1]), ([8], mask[:1], [1.0])])
    assert rows.tokens_BS.shape == rows.targets_BS.shape == rows.weights_BS.shape == (2, 16)
    assert rows.tokens_BS[0, :4].tolist() == [5, 6, 7, 0]
    assert rows.targets_BS[0, :4].tolist() == [6, 7, 0, 0]
    assert rows.weights_BS[0, :4].tolist() == [0, 1, 0, 0]
    assert rows.weights_BS[1].sum() == 0
    assert rows.edit_mask_BSG.sum() == 8
    assert preft_jax.collate([([1], mask[:1], [0])], length=3).tokens_BS.shape == (1, 3)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            ([1, 2], np.ones((2, 1), bool), [0, 1]),
            r"edit_mask of example 0 has the shape \[2, 1\], expected",
        ),
        (([1, 2], np.ones((2, 2), bool), [0]), r"weights of example 0 has the shape \[1\]"),
        (([[1, 2]], np.ones((2, 2), bool), [0, 1]), r"token_ids of example 0 has the shape \[1, 2\]"),
        (([1.0], np.ones((1, 2), bool), [0]), "token_ids of example 0 is float64, expected int"),
    ],
)
def test_rows_of_other_shapes_are_named(example, message):
    with pytest.raises(preft_jax.ShapeError, match=message):
        preft_jax.collate([example])


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_no_public_name_is_a_module_too(package):
    """Importing the module would put it where the name was."""
    assert not {module.name for module in pkgutil.iter_modules(package.__path__)} & set(package.__all__)


def test_one_line_says_what_a_thing_is(tiny_text):
    adapter = preft_jax.init_adapter(AdapterConfig(rank=2, layers=(0,)), TINY, np.zeros(2, np.uint32))
    for thing in (tiny_text, adapter, TINY, AdapterConfig(), serve.EngineConfig()):
        assert len(repr(thing)) < 700
        assert "\n" not in repr(thing)
    assert repr(tiny_text) == "Model('tiny', 0.1M parameters, no weights, digest 000000000000)"
    assert repr(adapter) == "Adapter('lora', rank 2, q,k,v,o,gate,up,down of 1 layers, 'prompt')"


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "refused",
    [
        lambda: serve.Request(prompt="a", adapter=LONG),
        lambda: serve.Request(prompt="a", sampling=LONG),
        lambda: serve.Request(prompt="a", stop=(7, LONG)),
        lambda: serve.Request(prompt=object(), adapter=LONG),
        lambda: preft_jax.encode_prompt(None, [LONG], vocab_size=9),
        lambda: chat.check_messages(LONG),
        lambda: chat.check_messages([LONG]),
        lambda: chat.check_messages([{"role": LONG, "content": ""}]),
        lambda: chat.check_messages([{"role": "user", "content": [LONG] * 99}]),
        lambda: AdapterConfig(kind=LONG),
        lambda: AdapterConfig(positions=LONG),
        lambda: AdapterConfig(targets=(LONG,)),
        lambda: AdapterConfig(targets=LONG),
        lambda: AdapterConfig(rank=LONG),
        lambda: preft_jax.SamplingParams(temperature=LONG),
        lambda: preft_jax.SamplingParams(stop_token_ids=LONG),
        lambda: serve.EngineConfig(max_num_seqs=LONG),
        lambda: train.BatchOptions(seed=LONG),
    ],
)
def test_errors_show_a_line_at_most(refused):
    with pytest.raises((preft_jax.PreftError, TypeError)) as caught:
        refused()
    assert len(str(caught.value)) < 600


def test_neighbours_draw_from_other_seeds():
    seeds = [derived_seed(seed, index) for seed in range(200) for index in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert derived_seed(7, 0) == 7


def test_defaults_of_python_are_those_of_the_command_line():
    """An option has the name of a field, or of the part of it that is behind ``lora_`` or ``per_device_train_``."""
    parts = [train.JobConfig(), train.OptimizerConfig(), train.BatchOptions(), train.DataOptions(), AdapterConfig()]
    compared = set()
    for name, option in options.JOB_OPTIONS.items():
        field = name.removeprefix("per_device_train_").removeprefix("lora_").replace("adapter_kind", "kind")
        for part in parts:
            if hasattr(part, field) and "default" in option and field not in ("targets", "layers"):
                assert getattr(part, field) == option["default"], name
                compared.add(name)
    assert compared >= {"learning_rate", "warmup_ratio", "num_train_epochs", "rank", "max_length", "seed", "optim"}
