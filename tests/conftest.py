"""What many tests share: base models, one adapter of every kind, and training's forward pass."""

import contextlib
import dataclasses
import gc
import os
import sys
import zlib
from pathlib import Path

import filelock
import hypothesis
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import preft_jax
from preft_jax import AdapterConfig
from preft_jax.config import PRESETS
from preft_jax.io.gguf_file import open_gguf
from preft_jax.io.hub import SMOLLM2_135M, cache_dir, packaged_gguf
from preft_jax.models.forward import forward
from preft_jax.text.tokenizer import byte_tokenizer, gguf_tokenizer

sys.path.append(str(Path(__file__).parent))

import reference
from shared_programs import forget_shared

hypothesis.settings.register_profile("preft", deadline=None, max_examples=50)
hypothesis.settings.load_profile("preft")

jax.config.update("jax_numpy_dtype_promotion", "strict")
"""A cast that nobody wrote is an error, as in a product of bfloat16 and float32."""


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="draw other random inputs; each test has a stream of its own")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Run the whole suite in two processes, and give each whole files: a file's tests share models and programs.

    Paths, ``-n``, ``--pdb`` and tests of a GPU, which has one memory, are left as they were asked for. ``-m host``
    leaves out what the suite leaves out.
    """
    option = config.option
    if option.markexpr == "host":
        option.markexpr = "host and not slow and not gpu and not browser"
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and "not gpu" in option.markexpr
    if option.numprocesses is None and whole and not option.usepdb and not option.collectonly:
        option.numprocesses = 2
    if option.numprocesses and option.dist == "no":
        option.dist = "loadfile"
        option.loadscopereorder = False  # It would leave files of one long test to the end.


EARLIER_EMITTERS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
"""XLA's fusions on a CPU go straight to LLVM, not through MLIR: half the time of a small program."""


def _compiles_quickly(config):
    """Whether programs are to be compiled in the least time; ``JAX_DISABLE_MOST_OPTIMIZATIONS`` says it, or ``-m``."""
    return "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ and "not slow" in config.option.markexpr


def pytest_configure(config):
    """Set what XLA reads when it is used first; programs that tests start inherit it."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _compiles_quickly(config) and EARLIER_EMITTERS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {EARLIER_EMITTERS}".strip()


def pytest_collection_modifyitems(items):
    """Put files that compile nothing last: they are short, so that two processes end together."""
    compiling = {item.path for item in items if item.get_closest_marker("host") is None}
    items.sort(key=lambda item: item.path not in compiling)


def drop_cut_programs(folder):
    """Delete what a killed process wrote in part: JAX writes a program, and then when it was used last."""
    with filelock.FileLock(folder / ".lockfile"):
        for path in folder.glob("*-cache"):
            if not path.with_name(path.name.removesuffix("-cache") + "-atime").exists():
                path.unlink()


@pytest.fixture(autouse=True, scope="session")
def _compiled_quickly(request):
    """On a CPU, let LLVM optimise nothing, a third of the time to compile: most programs run a few times only.

    XLA's own passes, which fuse operations and alias buffers, run as ever. Slow tests, and whoever sets
    ``JAX_DISABLE_MOST_OPTIMIZATIONS=0``, run optimised code, of XLA's new emitters.
    """
    name = "JAX_DISABLE_MOST_OPTIMIZATIONS"
    if not _compiles_quickly(request.config) or jax.default_backend() != "cpu":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        jax.config.update(name.lower(), True)
        patch.setenv(name, "1")  # for programs that tests start
        yield


@pytest.fixture(autouse=True, scope="session")
def _kept_programs(request):
    """Keep what takes long to compile in ``.cache/programs``, for the run's other processes and for later runs.

    The key is the program itself, so that one that was changed is compiled anew. The least recently used go first.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        yield  # The caller's own cache; and a test that runs tests has this one.
        return
    folder = request.config.rootpath / ".cache" / "programs"
    folder.mkdir(parents=True, exist_ok=True)
    drop_cut_programs(folder)
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_compilation_cache_max_size": 2 * 2**30,
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))  # for programs that tests start
        yield


@contextlib.contextmanager
def compiles_nothing():
    """Fail when what is inside compiles a program, on any thread."""
    names = []

    def listen(event, _, fun_name="a program", **__):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    if names:
        pytest.fail(f"a test marked host compiled {', '.join(names)}: use NumPy, or take the marker out", pytrace=False)


WEIGHTS = {"tiny", "lively", "smollm2", "adapters", "trained"}
"""Fixtures that compile when they are made, though not when another test had them made."""


def _guarded(item):
    """Fail the setup or call of a ``host`` test that compiles."""
    if item.get_closest_marker("host") is None:
        return (yield)
    if asked := WEIGHTS & set(item.fixturenames):
        pytest.fail(f"a test marked host asks for {sorted(asked)}: take tiny_text or smollm2_text", pytrace=False)
    with compiles_nothing():
        return (yield)


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(_guarded)
pytest_runtest_call = pytest.hookimpl(wrapper=True)(_guarded)


@pytest.fixture(scope="module")
def compiled_here():
    """Compile in this process: of a program that was read, its compiler does not say all."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


MANY_MAPS = 30_000
"""Memory maps of the process, of the 65,530 that Linux allows: each compiled program takes some, and XLA crashes
without."""


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Drop compiled programs where a long run of many modules has made very many."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        forget_shared()  # Engines of one shape share theirs.
        gc.collect()


@pytest.fixture
def rng(request):
    """Return random numbers for one test, other ones for each test and each ``--seed``."""
    return np.random.default_rng([request.config.getoption("--seed"), zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(scope="session")
def tiny():
    """Return a small float32 model; on a GPU its heads are as wide as kernels there need, and no product is rounded."""
    if jax.default_backend() == "gpu":
        jax.config.update("jax_default_matmul_precision", "highest")
        pytest.MonkeyPatch().setitem(PRESETS, "tiny", dataclasses.replace(PRESETS["tiny"], head_dim=32))
    return preft_jax.load_model("tiny", dtype="float32")


@pytest.fixture(scope="session")
def tiny_text():
    """Return ``tiny`` without weights: what needs its shape and its tokenizer compiles nothing."""
    return preft_jax.Model(PRESETS["tiny"], None, byte_tokenizer(), "0" * 64, "tiny")


@pytest.fixture(scope="module")
def one_layer_tiny(tiny, tiny_text):
    """Let the name ``tiny`` stand for one layer, which compiles in half the time: for programs and what they write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", dataclasses.replace(PRESETS["tiny"], num_hidden_layers=1))
        yield


@pytest.fixture(scope="session")
def lively(tiny):
    """Return ``tiny`` with weights so large that every token and every edit changes the logits visibly.

    With the usual initialisation each token mostly predicts itself, and a test of attention or of an edit would
    hardly see either. It has two layers, a first one and a last one: most programs of the suite are of this model, and
    compile sooner than with three.
    """
    rng = np.random.default_rng(7)
    config = dataclasses.replace(tiny.config, num_hidden_layers=2)
    params = {**tiny.params, "layers": tiny.params["layers"][: config.num_hidden_layers]}

    def louder(path, leaf):
        if leaf.ndim == 1:
            return (1 + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)
        sigma = 0.15 if "embed" in jax.tree_util.keystr(path) else leaf.shape[0] ** -0.5
        return (sigma * rng.standard_normal(leaf.shape)).astype(np.float32)

    params = jax.tree.map(jax.numpy.asarray, jax.tree_util.tree_map_with_path(louder, params))
    return dataclasses.replace(tiny, config=config, params=params, digest="0" * 64)


@pytest.fixture(scope="session")
def smollm2_path():
    """Return the file of the real built-in model."""
    try:
        return packaged_gguf(SMOLLM2_135M, cache_dir())
    except preft_jax.ModelError as error:
        pytest.skip(f"smollm2-135m cannot be fetched here: {error}")


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    """Return the real built-in model."""
    return preft_jax.load_model("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_text(smollm2_path):
    """Return the real built-in model without weights."""
    config = PRESETS["smollm2-135m"]
    tokenizer = gguf_tokenizer(open_gguf(smollm2_path).metadata, config.vocab_size, "smollm2-135m")
    return preft_jax.Model(config, None, tokenizer, "0" * 64, "smollm2-135m")


ADAPTER_CONFIGS = {
    "lora": AdapterConfig(rank=8, alpha=12.0),
    "lora_r24": AdapterConfig(rank=24, targets=("q", "v", "o", "down")),
    "lora_pattern": AdapterConfig(
        rank=4,
        alpha=6.0,
        use_rslora=True,
        layers=(0,),
        rank_pattern={"q_proj": 40, "layers.0.mlp.up_proj": 17},
        alpha_pattern={"self_attn.k_proj": 9.0},
    ),
    "direft": AdapterConfig(kind="direft", rank=8),
    "direft_free": AdapterConfig(kind="direft", rank=5, orthonormal=False),
    "loreft": AdapterConfig(kind="loreft", rank=8),
    "loreft_f3l2": AdapterConfig(kind="loreft", rank=6, positions="f3+l2", share_weights=False),
    "lora_all": AdapterConfig(rank=8, positions="all"),
    "loreft_all": AdapterConfig(kind="loreft", rank=4, positions="all"),
    "lora_skip": AdapterConfig(rank=8, assistant_turns="skip"),
}
"""One configuration of every kind that edits tokens."""

PREFIX = AdapterConfig(kind="prefix", rank=5)

PREFILL_ONLY = tuple(name for name, config in ADAPTER_CONFIGS.items() if config.prefill_only)
ALL_TOKEN = tuple(name for name, config in ADAPTER_CONFIGS.items() if not config.prefill_only)


@pytest.fixture(scope="session")
def adapters(lively):
    """Return an adapter of ``lively`` for each of ``ADAPTER_CONFIGS``, each strong enough to change most tokens."""
    return {
        name: preft_jax.random_adapter(config, lively.config, jax.random.key(100 + i), strength=0.7)
        for i, (name, config) in enumerate(ADAPTER_CONFIGS.items())
    }


@pytest.fixture(scope="session")
def trained():
    """Return training's forward pass: ``(model, adapter, tokens, mask)`` to float64 log-softmax ``[T, V]``."""
    program = jax.jit(forward, static_argnums=0)

    def log_softmax(model, adapter, tokens, mask):
        edits = {}
        if adapter is not None:
            edits = {"folded": preft_jax.fold(adapter), "edit_mask_BSG": np.asarray(mask)[None]}
        logits = program(model.config, model.params, np.asarray(tokens, np.int32)[None], **edits)[0]
        return reference.log_softmax(reference.f64(logits))

    return log_softmax


@pytest.fixture
def trap(monkeypatch):
    """Return a function that puts a trap in: ``trap(owner, name, value, check)``: the check must fail with it."""

    def put(owner, name, value, check):
        check()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            with pytest.raises(AssertionError):
                check()
        check()

    return put
