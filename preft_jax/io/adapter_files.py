"""Adapter directories: ``adapter_config.json`` and ``adapter_model.safetensors``.

For LoRA this is Hugging Face PEFT's layout, which PEFT reads and writes, plus a ``preft`` object in the config that
holds what PEFT has no keys for: ``version``, ``kind``, ``positions``, ``assistant_turns``, ``base_model_digest``. A
PEFT adapter with neither it nor its mark (``peft_mark``) edits every token. Other kinds use the same two files with
tensors named ``layers.{i}.{site}.{leaf}`` (``layers.0.block.w``) and no ``peft_type``; a learned prefix may be PEFT's,
too (``peft_prefix``).

A save is atomic, see ``file_pair``. A directory may be anybody's: ``adapter_limits`` says how much of it is read, and
its tensors are read once the file's header names exactly those of the config, in the shapes that fit.
"""

import dataclasses
import functools
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import PEFT_MODULES, AdapterConfig, adapter_shapes
from preft_jax.adapters.kinds import KINDS, Kind, find_kind
from preft_jax.config import ModelConfig
from preft_jax.errors import AdapterError, ConfigError, check_type, did_you_mean, plain, reject_unknown, shown
from preft_jax.io import peft_prefix
from preft_jax.io.adapter_limits import AdapterLimits, limits_for
from preft_jax.io.file_pair import ADVICE, CONFIG_FILE, TENSORS_FILE, open_pair, write_pair
from preft_jax.io.peft_config import BASE_MODEL_KEY, MARKER_KEY, config_from_peft, peft_from_config, peft_pattern
from preft_jax.io.peft_mark import check_mark, mark_of, preft_of
from preft_jax.io.safetensors_io import serialize_safetensors
from preft_jax.io.tensor_checks import Shape, check_finite, check_tensors
from preft_jax.shapes import PREFIX

FORMAT_VERSION = 1
"""Version of the ``preft`` object."""

FORMATS = ("preft", "peft")


_COMMON_KEYS = ("version", "kind", "positions", "assistant_turns", "base_model_digest", "share_weights", "orthonormal")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(AdapterConfig)}


def _keys(kind: Kind) -> tuple[str, ...]:
    """Return the keys of the ``preft`` object of a kind; PEFT's own keys hold the others of LoRA."""
    if kind.name == "lora":
        return (*_COMMON_KEYS, "alpha", "rank_pattern", "alpha_pattern")
    own = ("targets",) if len(kind.sites) > 1 else ()
    patterns = ("rank_pattern",) if kind.ranked else ()
    scales = ("alpha", "use_rslora", "alpha_pattern") if kind.scaled else ()
    return (*_COMMON_KEYS, "rank", "layers", "dropout", MARKER_KEY, *own, *patterns, *scales)


def load_adapter(
    path: str | os.PathLike[str],
    model: Any,
    *,
    allow_base_mismatch: bool = False,
    limits: AdapterLimits | None = None,
) -> Adapter:
    """Load an adapter for a base model.

    Args:
        path: the adapter's directory.
        model: a ``Model``, or a ``ModelConfig`` to check shapes only.
        allow_base_mismatch: load an adapter that was trained on another base model of the same shape; its config then
            names this one.
        limits: how much is read; None: what an adapter of the largest rank takes, see ``limits_for``.

    Returns:
        The adapter; parameters are float32 NumPy arrays, cast exactly from float32, float16 or bfloat16.

    Raises:
        AdapterError: if a file is missing, damaged or larger than ``limits`` allow, the config asks for what is not
            supported, tensors are missing, extra, of a wrong shape or dtype or not finite, or the base model is another
            one.
    """
    check_type("path", path, (str, os.PathLike), "the adapter's directory, and the model behind it", AdapterError)
    config = model if isinstance(model, ModelConfig) else model.config
    adapter = _read(Path(path), config, limits_for(config) if limits is None else limits)
    _check_base(Path(path), adapter.config, model, allow_base_mismatch)
    digest = getattr(model, "digest", None)
    if allow_base_mismatch and adapter.config.base_model_digest is not None and digest is not None:
        return Adapter(dataclasses.replace(adapter.config, base_model_digest=digest), adapter.params)
    return adapter


def read_adapter(path: str | os.PathLike[str], *, limits: AdapterLimits | None = None) -> Adapter:
    """Load an adapter without its base model, to look at it or convert it.

    The adapter's layers end with the last one that it edits. Widths are not checked against a model.

    Raises:
        AdapterError: as ``load_adapter`` does.
    """
    return _read(Path(path), None, limits or AdapterLimits())


def save_adapter(
    path: str | os.PathLike[str],
    adapter: Adapter,
    *,
    format: str = "preft",
    allow_prefill_only_as_peft: bool = False,
    base_model: str | None = None,
) -> None:
    """Save an adapter to a directory, replacing the adapter that is there; other files of the directory stay.

    Args:
        path: the directory; made if it does not exist.
        adapter: parameters are stored in their own dtype: float32, float16 or bfloat16.
        format: ``preft`` restores the same adapter, bit for bit. ``peft`` (LoRA and prefixes) is PEFT's alone.
        allow_prefill_only_as_peft: write a prefill-only adapter as ``peft`` although every tool, this one included,
            will then apply it to all tokens.
        base_model: name of the base model to write, in place of the config's.

    Raises:
        AdapterError: if the adapter's parameters are not those of its config or not finite, the format cannot hold it,
            or a file cannot be written. The adapter that was there is then still there.
    """
    check_type("path", path, (str, os.PathLike), "a directory, and the adapter behind it", AdapterError)
    check_type("adapter", adapter, Adapter, "an Adapter", AdapterError)
    config = adapter.config
    if base_model is not None:
        config = dataclasses.replace(config, base_model=base_model)
    if format not in FORMATS:
        raise AdapterError(f"unknown format {format!r}{did_you_mean(format, FORMATS)}; allowed: {', '.join(FORMATS)}")
    if format == "peft":
        _check_peft_can_hold(config, allow_prefill_only_as_peft)
    contents = _contents(config, with_preft=format == "preft")
    tensors = _tensors(config, adapter.params)
    if format == "peft" and config.kind == "prefix":
        contents, tensors = peft_prefix.contents_of_prefix(config), peft_prefix.tensors_of_prefix(adapter.params)
    text = json.dumps(contents, indent=2, allow_nan=False) + "\n"
    write_pair(Path(path), text.encode(), serialize_safetensors(tensors, {"format": "pt"}))


def _check_peft_can_hold(config: AdapterConfig, allow_prefill_only: bool) -> None:
    if config.kind == "prefix":
        return
    if config.kind != "lora":
        raise AdapterError(f"PEFT has no {config.kind} adapters; save with format 'preft'")
    if (config.prefill_only or config.assistant_turns == "skip") and not allow_prefill_only:
        which = "ALL TOKENS" if config.alora_invocation_tokens is None else "ALL TOKENS FROM ITS MARKER ON"
        raise AdapterError(
            f"this adapter has positions {config.positions!r} and assistant_turns {config.assistant_turns!r}, and "
            f"PEFT's format cannot say so: EVERY TOOL THAT READS THE EXPORT WILL APPLY IT TO {which}, generated "
            "ones too, which it was not trained for. Save with format 'preft', or pass "
            "allow_prefill_only_as_peft=True (--allow-prefill-only-as-peft) if that is what you want"
        )


# Config -> file.


def _contents(config: AdapterConfig, *, with_preft: bool) -> dict[str, Any]:
    """Return the contents of ``adapter_config.json``."""
    contents = peft_from_config(config) if config.kind == "lora" else {BASE_MODEL_KEY: config.base_model}
    if not with_preft:
        return contents
    preft = _preft_object(config)
    return contents | (mark_of(preft) if config.kind == "lora" else {}) | {"preft": preft}


def _preft_object(config: AdapterConfig) -> dict[str, Any]:
    """Return what PEFT's keys cannot hold of a config: five fields always, others where they are not the default."""
    fields: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "kind": config.kind,
        "positions": config.positions,
        "assistant_turns": config.assistant_turns,
        "base_model_digest": config.base_model_digest,
    }
    if config.kind == "lora":
        if config.alpha is None:
            fields["alpha"] = None
        for key in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(config, key)
            if list(peft_pattern(pattern)) != list(pattern):
                fields[key] = dict(pattern)
    else:
        fields |= {"rank": config.rank, "layers": None if config.layers is None else list(config.layers)}
        fields |= {"share_weights": config.share_weights}
        if config.dropout:
            fields["dropout"] = float(config.dropout)
        if config.alora_invocation_tokens is not None:
            fields[MARKER_KEY] = list(config.alora_invocation_tokens)
        for key in _keys(find_kind(config.kind)):
            if key in ("targets", "rank_pattern", "alpha", "use_rslora", "alpha_pattern"):
                fields[key] = _jsonable(getattr(config, key))
    if config.kind == "direft" or config.orthonormal != _DEFAULTS["orthonormal"]:
        fields["orthonormal"] = config.orthonormal
    return fields


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value


def tensor_name(kind: str, layer: int, site: str, leaf: str) -> str:
    """Return the name that an adapter's leaf has in ``adapter_model.safetensors``."""
    if kind != "lora":
        return f"layers.{layer}.{site}.{leaf}"
    matrix = {"lora_a": "lora_A", "lora_b": "lora_B"}.get(leaf, leaf)
    return f"base_model.model.model.layers.{layer}.{PEFT_MODULES.get(site, site)}.{matrix}.weight"


def _tensors(config: AdapterConfig, params: Any) -> dict[str, np.ndarray]:
    """Name the parameters as the file does, after checking that they are exactly those of the config."""
    given = {
        tensor_name(config.kind, i, site, leaf): np.asarray(value)
        for i, sites in enumerate(params["layers"])
        for site, leaves in sites.items()
        for leaf, value in leaves.items()
    }
    names = _tensor_names(config, max(len(params["layers"]), 1 + max(config.layers or (), default=0)))
    check_tensors("the adapter", _ranked_shapes(config, names), given)
    check_finite("the adapter", given)
    return given


# File -> adapter.


def _read(path: Path, model: ModelConfig | None, limits: AdapterLimits) -> Adapter:
    where = path / CONFIG_FILE
    with open_pair(path, limits) as (raw, file):
        contents = _parse_json(raw, where)
        _check_lengths(contents, limits, str(where))
        if contents.get("peft_type") == peft_prefix.PEFT_TYPE:
            return _read_prefix(path, contents, file, model, limits)
        depth = _depth(contents, file.entries, limits, where) if model is None else model.num_hidden_layers
        config = _config(contents, num_layers=depth, depth_known=model is not None, where=str(where))
        check_mark(contents, str(where))
        names = _tensor_names(config, depth)
        _check_ranks(config, names, limits, str(where))
        expected = _ranked_shapes(config, names) if model is None else _model_shapes(config, model, names, str(where))
        check_tensors(str(path / TENSORS_FILE), expected, file.entries)
        tensors = file.read()
    check_finite(str(path / TENSORS_FILE), tensors)
    layers: list[dict[str, Any]] = [{} for _ in range(depth)]
    for name, (layer, site, leaf) in names.items():
        layers[layer].setdefault(site, {})[leaf] = tensors[name].astype(np.float32)
    return Adapter(config, {"layers": layers})


def _read_prefix(
    path: Path, contents: Mapping[str, Any], file: Any, model: ModelConfig | None, limits: AdapterLimits
) -> Adapter:
    """Read a learned prefix as PEFT has one."""
    where = str(path / CONFIG_FILE)
    config = peft_prefix.config_of_prefix(contents, where)
    _check_ranks(config, {"": (0, PREFIX, "")}, limits, where)
    shape = peft_prefix.prefix_shape(config, contents, model, limits.max_layers, where)
    check_tensors(str(path / TENSORS_FILE), {peft_prefix.TENSOR: shape}, file.entries)
    tensors = file.read()
    check_finite(str(path / TENSORS_FILE), tensors)
    depth = contents["num_layers"] if model is None else model.num_hidden_layers
    return peft_prefix.prefix_adapter(config, tensors[peft_prefix.TENSOR], depth, where)


def _parse_json(raw: bytes, where: Path) -> dict[str, Any]:
    try:
        contents = json.loads(raw)
    except (ValueError, RecursionError) as cause:
        raise AdapterError(f"{where} is not valid JSON: {cause}; {ADVICE}") from None
    if not isinstance(contents, dict):
        raise AdapterError(f"{where} holds a JSON {type(contents).__name__}, not an object; {ADVICE}")
    return contents


_LISTS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "layers")


def _check_lengths(contents: Mapping[str, Any], limits: AdapterLimits, where: str) -> None:
    preft = contents.get("preft")
    for part in (contents, preft if isinstance(preft, dict) else {}):
        for key in _LISTS:
            value = part.get(key)
            if isinstance(value, list) and len(value) > limits.max_modules:
                raise AdapterError(
                    f"{where}: {key} has {len(value)} entries; allowed: up to {limits.max_modules}; name each "
                    "module once"
                )


def _check_ranks(
    config: AdapterConfig, names: Mapping[str, tuple[int, str, str]], limits: AdapterLimits, where: str
) -> None:
    """Look up every rank and scale, so that no later look-up fails, and refuse ranks that are too large."""
    try:
        for layer, site, _ in names.values():
            config.scale_at(layer, site)
            rank = config.rank_at(layer, site) * config.groups
            if rank > limits.max_rank:
                raise AdapterError(
                    f"{where}: rank {rank} at {site!r} of layer {layer} is too large; allowed: up to "
                    f"{limits.max_rank}; give an adapter of lower rank, or raise the limit"
                )
    except ConfigError as error:
        raise AdapterError(f"{where}: {error}") from None


def _config(contents: Mapping[str, Any], *, num_layers: int, depth_known: bool, where: str) -> AdapterConfig:
    """Build the config from the file's contents: PEFT's keys, the ``preft`` object, or both."""
    peft = {key: value for key, value in contents.items() if key != "preft"}
    preft = preft_of(contents, where)
    if preft is None and "preft" not in contents:
        if "peft_type" not in peft:
            raise AdapterError(f"{where} has neither 'peft_type' nor a 'preft' object; {ADVICE}")
        return config_from_peft(peft, {}, num_layers=num_layers, depth_known=depth_known, where=where)
    fields = _preft_fields(preft, where)
    if fields["kind"] == "lora":
        del fields["kind"]
        return config_from_peft(peft, fields, num_layers=num_layers, depth_known=depth_known, where=where)
    reject_unknown(
        [key for key, value in peft.items() if value], (BASE_MODEL_KEY,), what=f"key of {where}", error=AdapterError
    )
    base_model = peft.get(BASE_MODEL_KEY)
    if base_model is not None and not isinstance(base_model, str):
        raise AdapterError(f"{where}: {BASE_MODEL_KEY} is {shown(base_model)}; give a name")
    try:
        return AdapterConfig(base_model=base_model, **fields)
    except ConfigError as error:
        raise AdapterError(f"{where}: {error}") from None


def _preft_fields(preft: Any, where: str) -> dict[str, Any]:
    """Check the ``preft`` object and return its ``AdapterConfig`` fields, ``kind`` included."""
    if not isinstance(preft, dict):
        raise AdapterError(f"{where}: 'preft' is {shown(preft)}, not an object; save the adapter again")
    if preft.get("version") != FORMAT_VERSION:
        raise AdapterError(
            f"{where}: the 'preft' object has version {shown(preft.get('version'))}; this release reads version "
            f"{FORMAT_VERSION}: upgrade preft-jax, or save the adapter with this release"
        )
    kind = preft.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise AdapterError(
            f"{where}: unknown kind {shown(kind)}{did_you_mean(shown(kind), KINDS)}; allowed: {', '.join(KINDS)}, and "
            "what register_kind adds: import the module that does before the adapter is loaded"
        )
    reject_unknown(preft, _keys(KINDS[kind]), what=f"key of the 'preft' object in {where}:", error=AdapterError)
    for key in ("positions",) if kind == "lora" else ("positions", "rank"):
        if key not in preft:
            raise AdapterError(f"{where}: the 'preft' object lacks {key!r}; save the adapter again")
    for key, value in preft.items():
        allowed, what = _VALUES[key] if key != "alpha" or kind == "lora" else _ALPHA
        if not allowed(value):
            raise AdapterError(f"{where}: {key} of the 'preft' object is {shown(value)}; give {what}")
    fields = {key: value for key, value in preft.items() if key != "version"}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_layers(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(type(layer) is int for layer in value))


def _is_pattern(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


_VALUES = {
    "version": (lambda value: type(value) is int, "an integer"),
    "kind": (lambda value: isinstance(value, str), "a kind"),
    "positions": (lambda value: isinstance(value, str), "a position rule"),
    "assistant_turns": (lambda value: isinstance(value, str), "'edit' or 'skip'"),
    "base_model_digest": (lambda value: value is None or isinstance(value, str), "a SHA-256 in hex, or null"),
    "share_weights": (lambda value: isinstance(value, bool), "true or false"),
    "orthonormal": (lambda value: isinstance(value, bool), "true or false"),
    "alpha": (lambda value: value is None, "null, or leave it out and give lora_alpha"),
    "rank_pattern": (_is_pattern, "an object of names and ranks"),
    "alpha_pattern": (_is_pattern, "an object of names and numbers"),
    "rank": (lambda value: type(value) is int, "an integer"),
    "layers": (_is_layers, "a list of layers, or null for all"),
    "dropout": (_is_number, "a number"),
    MARKER_KEY: (lambda value: isinstance(value, list), "a list of token ids"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "targets": (lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value), "a list of sites"),
}  # fmt: skip
"""Key of the ``preft`` object -> (is this value of the right type, what to give)."""


_ALPHA = (lambda value: value is None or _is_number(value), "a number, or null for the rank")
"""``alpha`` of kinds that have no ``lora_alpha`` beside the ``preft`` object."""

# Tensors.


def _depth(contents: Mapping[str, Any], names: Iterable[str], limits: AdapterLimits, where: Path) -> int:
    """Return the number of layers that the tensors' names and our own config show, at least 1."""
    found = (re.search(r"(?:^|\.)layers\.(\d{1,9})\.", name, re.ASCII) for name in names)
    layers = [int(match[1]) for match in found if match]
    preft = contents.get("preft")
    if isinstance(preft, dict):
        named = [contents.get("layers_to_transform"), preft.get("layers")]
        layers += [layer for part in named if _is_layers(part) for layer in part or ()]
    depth = 1 + max(layers, default=0)
    if depth > limits.max_layers:
        raise AdapterError(
            f"{where} and its tensors name layer {shown(depth - 1)}; allowed without a base model: up to "
            f"{limits.max_layers - 1}; load the adapter for its base model"
        )
    return depth


def _tensor_names(config: AdapterConfig, num_layers: int) -> dict[str, tuple[int, str, str]]:
    """Return ``{tensor name: (layer, site, leaf)}`` of every tensor that the config asks for."""
    leaves = tuple(_leaf_shapes(config, config.rank * config.groups))
    return {
        tensor_name(config.kind, layer, site, leaf): (layer, site, leaf)
        for layer in range(num_layers)
        if config.edits_layer(layer)
        for site in config.targets
        for leaf in leaves
    }


def _leaf_shapes(config: AdapterConfig, rank: int) -> dict[str, Shape]:
    """Return the shape of each leaf of a site of unknown widths: None where it follows from them."""
    shapes = find_kind(config.kind).shapes
    one, other = shapes(config, 10007, 10009, rank), shapes(config, 10037, 10039, rank)
    return {
        name: tuple(n if n == m else None for n, m in zip(shape, other[name], strict=True))
        for name, shape in one.items()
    }


def _model_shapes(
    config: AdapterConfig, model: ModelConfig, names: Mapping[str, tuple[int, str, str]], where: str
) -> dict[str, Shape]:
    """Return the shape of each tensor for a base model."""
    try:
        shapes = adapter_shapes(config, model)["layers"]
    except ConfigError as error:
        raise AdapterError(f"{where}: {error}") from None
    return {name: shapes[layer][site][leaf] for name, (layer, site, leaf) in names.items()}


def _ranked_shapes(config: AdapterConfig, names: Mapping[str, tuple[int, str, str]]) -> dict[str, Shape]:
    """Return the shape of each tensor as far as the config alone decides it."""

    made = functools.cache(functools.partial(_leaf_shapes, config))
    return {
        name: made(config.rank_at(layer, site) * config.groups)[leaf] for name, (layer, site, leaf) in names.items()
    }


def _check_base(path: Path, config: AdapterConfig, model: Any, allow_mismatch: bool) -> None:
    """Compare the base model that the adapter was trained on with the one it is loaded for."""
    digest, name = getattr(model, "digest", None), getattr(model, "name", None)
    trained_on = f" ({plain(config.base_model)})" if config.base_model else ""
    if config.base_model_digest is not None:
        if digest is not None and digest != config.base_model_digest and not allow_mismatch:
            raise AdapterError(
                f"{path} was trained on a base model with digest {plain(config.base_model_digest)}{trained_on}; "
                f"this one has {digest}. Load that model, or pass allow_base_mismatch=True (--allow-base-mismatch) "
                "to use the adapter anyway"
            )
    elif config.base_model and isinstance(name, str) and name and not allow_mismatch:
        ends = [Path(text.rstrip("/")).name.lower() for text in (config.base_model, name)]
        if ends[0] != ends[1]:
            warnings.warn(
                f"{path} was trained on {shown(config.base_model)} and is loaded for {name!r}; it has no base "
                "model digest, so only its shapes were checked",
                stacklevel=3,
            )
