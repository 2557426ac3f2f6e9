"""``load_model``: from a name or a path to a ``Model`` with its parameters on the device, and to its serving layout."""

import dataclasses
import re
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from preft_jax.adapters.adapter import Adapter, check_fits
from preft_jax.adapters.config import AdapterConfig
from preft_jax.config import PRESETS, ModelConfig
from preft_jax.device.mesh import SINGLE, Placement
from preft_jax.errors import AdapterError, ConfigError, ModelError, check_type, did_you_mean
from preft_jax.io.digest import digest_parts, model_digest, preset_digest
from preft_jax.io.gguf import load_gguf
from preft_jax.io.hf import load_hf_model, weight_files
from preft_jax.io.hub import SMOLLM2_135M, cache_dir, hub_snapshot, packaged_gguf
from preft_jax.io.weights import MAX_DIFFERENCES
from preft_jax.models.layout import fused_layout
from preft_jax.models.modules import init_params
from preft_jax.models.params import Params
from preft_jax.models.shard import shard_config
from preft_jax.quantize import Quantization, quantize
from preft_jax.shapes import DTYPES
from preft_jax.text.ends import end_token_ids
from preft_jax.text.tokenizer import byte_tokenizer

_BUILT_IN = "smollm2-135m"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A base model.

    Attributes:
        config: its shape, and the tokens that end an answer (``text.ends`` says which).
        params: the parameter tree (see ``preft_jax.models.modules``), on the default device.
        tokenizer: a transformers ``PreTrainedTokenizerFast``, or ``None`` if the model came without one.
        digest: SHA-256 (hex) of config and weights, the same for every dtype it is loaded in.
        name: of the model, or what it was loaded as; empty if it was made by hand.
        quantization: what was made of the weights since they were read (``Quantization.name``).
        placement: devices that the weights are cut over.
    """

    config: ModelConfig
    params: Any
    tokenizer: Any
    digest: str
    name: str = ""
    quantization: str = "none"
    placement: Placement = SINGLE

    @property
    def kv_digest(self) -> str:
        """What the KV of a token depends on: the digest, and what the weights were quantised to after loading."""
        if self.quantization == "none":
            return self.digest
        return digest_parts(b"preft-quantized-1", self.digest.encode(), self.quantization.encode())

    def __repr__(self) -> str:
        dtype = getattr(self.params["embed"], "dtype", "?") if isinstance(self.params, Mapping) else "no weights"
        millions, name = self.config.num_params() / 1e6, self.name or self.config.model_type
        how = "" if self.quantization == "none" else f", {self.quantization}"
        how += "" if self.placement.mesh is None else f", on {self.placement.num_devices} devices"
        return f"Model({name!r}, {millions:,.1f}M parameters, {dtype}{how}, digest {str(self.digest)[:12]})"


def resolve_dtype(dtype: Any = None) -> jnp.dtype:
    """Return the dtype to load a model in: float32 on CPU and bfloat16 elsewhere, unless one is given.

    Raises:
        ConfigError: for anything but float32, bfloat16 and float16, by name or as a dtype.
    """
    if dtype is None:
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or resolved.name not in DTYPES:
        raise ConfigError(
            f"dtype {dtype!r} is not allowed{did_you_mean(str(dtype), DTYPES)}; allowed: {', '.join(DTYPES)}"
        )
    return resolved


def load_model(
    name_or_path: str | Path,
    dtype: Any = None,
    check_finite: bool = False,
    seed: int = 0,
    quantization: str = "none",
    keep_layers: Sequence[int] = (),
    mesh: str | Placement | None = None,
) -> Model:
    """Load a base model.

    Args:
        name_or_path: in this order: a directory with Hugging Face safetensors; a ``.gguf`` file; ``"smollm2-135m"``,
            the built-in model (fetched by pip once, then cached); another preset's name (random weights); a Hub id
            ``"org/name"``.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; by default float32 on CPU, bfloat16 elsewhere.
        check_finite: look for NaN and infinity in the weights (reads all of them).
        seed: of a preset's random weights; not used otherwise.
        quantization: ``"none"``, or ``"fp8"``: the layers' linears are in e4m3 and so are the activations that they
            read, scales for each output and each token; the rest is in ``dtype``. A checkpoint that is in FP8 stays so
            in either case.
        keep_layers: layers that ``"fp8"`` leaves as they are, such as ``(0, -1)``.
        mesh: devices that the model is cut over, to serve it (docs/scale.md): ``"tp=2"``, or ``"tp"`` for all. Each
            weight goes to its devices as it is read or drawn: none has the whole model.

    Raises:
        ModelError: if there is no such model, or it cannot be read or trusted.
        ConfigError: if the model's kind, ``dtype`` or ``quantization`` is not supported, or it cannot be cut so.
    """
    resolved = resolve_dtype(dtype)
    how = Quantization(scheme=quantization, keep_layers=tuple(keep_layers))
    placement = _serving_placement(mesh)
    model = _load(name_or_path, resolved, seed, _How(how, placement))
    if how.scheme != "none":
        params = placement.put_params(quantize(model.params, how.keep_layers, consume=True))
        model = dataclasses.replace(model, params=params, quantization=how.name(model.config.num_hidden_layers))
    if not model.name:
        model = dataclasses.replace(model, name=str(name_or_path))
    if check_finite:
        _check_finite(model.params, str(name_or_path))
    return model


def _serving_placement(mesh: "str | Placement | None") -> Placement:
    placement = mesh if isinstance(mesh, Placement) else Placement.parse(mesh, cuts="tp")
    if placement.mesh is not None and not placement.cuts_model:
        raise ConfigError(f"mesh has the axes {', '.join(placement.mesh.axis_names)}; a model is cut by tp=N alone")
    return placement


class _How(NamedTuple):
    """What becomes of weights as they are read, and where they go."""

    quantization: Quantization
    placement: Placement


def _load(name_or_path: str | Path, dtype: jnp.dtype, seed: int, how: _How) -> Model:
    name = str(name_or_path)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _load_directory(path, dtype, how)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {path}; give the path of a GGUF file that exists")
        return _load_gguf(path, dtype, how)
    if name == _BUILT_IN:
        model = _load_gguf(packaged_gguf(SMOLLM2_135M, cache_dir()), dtype, how)
        return dataclasses.replace(model, name="SmolLM2-135M-Instruct")
    if name in PRESETS:
        return _make_preset(name, dtype, seed, how.placement)
    if HUB_ID.fullmatch(name):
        return _load_directory(hub_snapshot(name), dtype, how)
    raise ModelError(
        f"there is no model {name!r}{did_you_mean(name, PRESETS)}; allowed: a directory with safetensors, a .gguf "
        f"file, {', '.join(PRESETS)}, or a Hugging Face Hub id such as 'org/name'"
    )


def _load_directory(directory: Path, dtype: jnp.dtype, how: _How) -> Model:
    config, params, tokenizer = load_hf_model(directory, dtype, *how)
    config = _with_ends(config, tokenizer, directory)
    digest = model_digest(config, weight_files(directory), cache_dir())
    return Model(config, params, tokenizer, digest, placement=how.placement)


def _load_gguf(path: Path, dtype: jnp.dtype, how: _How) -> Model:
    config, params, tokenizer = load_gguf(path, dtype, *how)
    config = _with_ends(config, tokenizer, path)
    return Model(config, params, tokenizer, model_digest(config, [path], cache_dir()), placement=how.placement)


def _with_ends(config: ModelConfig, tokenizer: Any, where: Path) -> ModelConfig:
    """Return a config with all tokens that end an answer: serving stops at them and training teaches them."""
    ends = end_token_ids(config.eos_token_ids, tokenizer, config.vocab_size, str(where))
    return dataclasses.replace(config, eos_token_ids=ends)


def _make_preset(name: str, dtype: jnp.dtype, seed: int, placement: Placement) -> Model:
    """Make a preset with random weights: the same ones, rounded, in every dtype, as the digest promises."""
    config = PRESETS[name]
    params = init_params(config, jax.random.key(seed), dtype, placement)
    tokenizer = byte_tokenizer() if name == "tiny" else None
    return Model(config, params, tokenizer, preset_digest(config, name, seed), placement=placement)


def _check_finite(params: Any, where: str) -> None:
    """Raise ``ModelError`` naming the parameters that hold NaN or infinity."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    finite = jax.device_get([jnp.isfinite(leaf).all() for _, leaf in leaves])
    bad = [jax.tree_util.keystr(path) for (path, _), good in zip(leaves, finite, strict=True) if not good]
    if bad:
        more = f" and {len(bad) - MAX_DIFFERENCES} more" if len(bad) > MAX_DIFFERENCES else ""
        raise ModelError(
            f"{where} has NaN or infinite weights in {', '.join(bad[:MAX_DIFFERENCES])}{more}; get the model again, or "
            "load it in a dtype with a wider range"
        )


_serving_params: weakref.WeakKeyDictionary[Model, tuple[bool, Params]] = weakref.WeakKeyDictionary()


def serving_params(model: Model, max_num_seqs: int) -> Params:
    """Return a model's weights in the layout that this backend serves from, kept until another layout is asked for.

    A CPU multiplies a matrix with one token fastest from ``[output, input]`` and with several from ``[input, output]``.
    """
    transpose = _transposed(max_num_seqs)
    made = _serving_params.get(model)
    if made is None or made[0] != transpose:
        params = fused_layout(model.params, transpose=transpose, shards=model.placement.tensor)
        made = _serving_params[model] = (transpose, model.placement.put_params(params))
    return made[1]


def serving_model(model: Model, max_num_seqs: int) -> Model:
    """Return a model that holds its weights in the serving layout alone; the one given is used up.

    Its weights change place layer by layer, so that both are never in memory, and free memory stays in one piece.

    Raises:
        ModelError: if it was used up before.
    """
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(model.params) if isinstance(leaf, jax.Array)):
        raise ModelError("this model's weights were moved to a serving layout before; load it again")
    shards = model.placement.tensor
    params = fused_layout(model.params, transpose=_transposed(max_num_seqs), consume=True, shards=shards)
    return dataclasses.replace(model, params=model.placement.put_params(params))


def spread_model(model: Model, mesh: str | Placement) -> Model:
    """Return a model, which lies on one device in the canonical layout, cut over several, as ``load_model`` cuts it.

    Raises:
        ConfigError: it cannot be cut so.
        ModelError: it lies on several devices, or in another layout.
    """
    placement = _serving_placement(mesh)
    if model.placement.mesh is not None or "qkv" in model.params["layers"][0]:
        raise ModelError("this model lies on several devices or in the serving layout; load it with mesh instead")
    shard_config(model.config, placement.tensor)
    return dataclasses.replace(model, params=placement.put_params(model.params), placement=placement)


def _transposed(max_num_seqs: int) -> bool:
    return jax.default_backend() == "cpu" and max_num_seqs == 1


def check_whole(model: Model) -> None:
    """Raise ``ModelError`` if a model is cut over devices, which an engine alone computes with."""
    if model.placement.mesh is not None:
        raise ModelError(
            f"this model is cut over {model.placement.num_devices} devices to be served; load it without mesh"
        )


def check_base(adapter: Adapter, model: Model) -> None:
    """Raise ``AdapterError`` if an adapter was made for another base model or does not fit this one."""
    check_type("model", model, Model, "what load_model returns", ModelError)
    check_made_for(adapter.config, model)
    check_fits(adapter, model.config)


def check_made_for(config: AdapterConfig, model: Model) -> None:
    """``check_base`` by an adapter's configuration alone: raise ``AdapterError`` if it names another base model."""
    expected, given = model.digest, config.base_model_digest
    if expected is not None and given is not None and expected != given:
        raise AdapterError(
            f"the adapter was made for the base model {given[:12]}..., this one is {expected[:12]}...; "
            "load the right base model"
        )
