"""Between ``AdapterConfig`` and the ``adapter_config.json`` of Hugging Face PEFT (kind ``lora``).

PEFT says what it edits with module names, a regular expression and layer numbers; ``AdapterConfig`` with sites and
layers. The rules here are PEFT's own, checked against PEFT 0.21: what they select in a model of this family is worked
out by matching the path of every linear, ``model.layers.{i}.self_attn.q_proj`` and so on (``module_pattern`` says which
expressions are read). Whatever would change the
computation and cannot be said in an ``AdapterConfig`` is refused by name.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from preft_jax.adapters.config import PEFT_MODULES, AdapterConfig
from preft_jax.adapters.patterns import Matcher, parse
from preft_jax.errors import AdapterError, ConfigError, did_you_mean, shown
from preft_jax.shapes import LINEAR_SITES

PEFT_TYPE = "LORA"
BASE_MODEL_KEY = "base_model_name_or_path"
MARKER_KEY = "alora_invocation_tokens"

_ALL_LINEAR = "all-linear"
_LAYERS_NAME = re.compile(r"[\w.]{1,128}", re.ASCII)
_SITE_OF_NAME = {path.rpartition(".")[2]: site for site, path in PEFT_MODULES.items()}
_NAME_OF_SITE = {site: name for name, site in _SITE_OF_NAME.items()}
_OTHER_MODULES = ("model.embed_tokens", "lm_head")

_READ = (
    "peft_type", BASE_MODEL_KEY, "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", MARKER_KEY,
)  # fmt: skip

_WITHOUT_EFFECT = (
    "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config", "megatron_core",
    "qalora_group_size", "ensure_weight_tying", "velora_config", "eva_config", "corda_config", "lora_ga_config",
    "loftq_config",
)  # fmt: skip
"""Keys that touch training, initialisation or bookkeeping only, whatever their value."""

_INITS_KEEPING_BASE = ("gaussian", "eva", "orthogonal", "mica")


def _falsy(value: Any) -> bool:
    return not value


_REFUSED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "use_dora": (_falsy, "DoRA rescales the base weights, which no low-rank edit can say"),
    "modules_to_save": (_falsy, "it replaces whole modules of the base model"),
    "bias": (lambda value: value in (None, "none"), "it changes biases of the base model; train with bias 'none'"),
    "lora_bias": (_falsy, "a bias on lora_B is not part of a low-rank edit"),
    "fan_in_fan_out": (_falsy, "the linears of this model family store [output, input]"),
    "target_parameters": (_falsy, "only linears can be edited; name them in target_modules"),
    "trainable_token_indices": (_falsy, "it changes rows of the embedding"),
    "layer_replication": (_falsy, "it changes the layers of the base model"),
    "use_qalora": (_falsy, "QALoRA pools the input of the edit"),
    "use_bdlora": (_falsy, "BD-LoRA stores block-diagonal matrices"),
    "arrow_config": (_falsy, "Arrow routes between adapters"),
    "kasa_config": (_falsy, "KaSA changes the base weights"),
    "monteclora_config": (_falsy, "MonteCLoRA samples its weights"),
    "megatron_config": (_falsy, "only Hugging Face's module layout is read"),
    "task_type": (lambda value: value in (None, "CAUSAL_LM"), "only CAUSAL_LM models are served"),
    "init_lora_weights": (
        lambda value: value is None or isinstance(value, bool) or value in _INITS_KEEPING_BASE,
        "this initialisation changes the base weights, so the adapter does not fit the original ones; convert it with "
        "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)",
    ),
}
"""Key -> (is this value harmless, why others are refused)."""


def check_peft_keys(peft: Mapping[str, Any], where: str) -> None:
    """Refuse a PEFT config that asks for anything an ``AdapterConfig`` cannot say.

    Unknown keys whose value is empty (``null``, ``false``, 0, ``[]``) pass: newer versions of PEFT write them for
    features that are off.

    Raises:
        AdapterError: naming the key, its value and why.
    """
    peft_type = peft.get("peft_type")
    if peft_type != PEFT_TYPE:
        raise AdapterError(f"{where}: peft_type {shown(peft_type)} is not supported; allowed: {PEFT_TYPE!r}")
    for key, value in peft.items():
        if key in _REFUSED:
            harmless, reason = _REFUSED[key]
            if not harmless(value):
                raise AdapterError(f"{where}: {key} {shown(value)} is not supported: {reason}")
        elif value and key not in _READ and key not in _WITHOUT_EFFECT:
            near = did_you_mean(key, (*_READ, *_REFUSED, *_WITHOUT_EFFECT))
            raise AdapterError(
                f"{where}: unknown key {shown(key)} with value {shown(value)}{near}; it may change what the "
                "adapter computes, so the adapter is not loaded: remove the key if it does not"
            )
    for key in ("r", "lora_alpha", "target_modules"):
        if peft.get(key) is None:
            raise AdapterError(f"{where} lacks {key!r}; write the adapter with PEFT's save_pretrained")


def config_from_peft(
    peft: Mapping[str, Any], extra: Mapping[str, Any], *, num_layers: int, depth_known: bool, where: str
) -> AdapterConfig:
    """Build the ``AdapterConfig`` of a PEFT LoRA.

    Args:
        peft: contents of ``adapter_config.json`` without the ``preft`` object.
        extra: ``AdapterConfig`` fields that PEFT's keys cannot say, from the ``preft`` object; they win over PEFT's
            keys. Empty for an adapter that PEFT wrote: it edits every token, or every one from its marker on.
        num_layers: layers of the base model.
        depth_known: false if ``num_layers`` is only the depth that the adapter's tensors show.
        where: the file, for errors.

    Raises:
        AdapterError: if the config asks for something that is not supported.
    """
    check_peft_keys(peft, where)
    for key, kinds, what in _FIELD_KINDS:
        value = peft.get(key)
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool)):
            raise AdapterError(f"{where}: {key} is {shown(value)}; give {what}")
    targets, layers = _targets_and_layers(peft, num_layers, depth_known, keep_order=bool(extra), where=where)
    fields = {
        "rank": peft["r"],
        "alpha": peft["lora_alpha"],
        "use_rslora": bool(peft.get("use_rslora")),
        "targets": targets,
        "layers": layers,
        "rank_pattern": _pattern(peft, "rank_pattern", where),
        "alpha_pattern": _pattern(peft, "alpha_pattern", where),
        "dropout": peft.get("lora_dropout") or 0.0,
        "base_model": peft.get(BASE_MODEL_KEY),
        "positions": "all",
        MARKER_KEY: peft.get(MARKER_KEY),
    }
    _check_agreement(fields, extra, where)
    try:
        return AdapterConfig(kind="lora", **(fields | dict(extra)))
    except ConfigError as error:
        raise AdapterError(f"{where}: {error}") from None


def peft_from_config(config: AdapterConfig) -> dict[str, Any]:
    """Return the contents of the ``adapter_config.json`` that PEFT reads for a LoRA that edits at least one layer."""
    marker = config.alora_invocation_tokens
    return {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        BASE_MODEL_KEY: config.base_model,
        "revision": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.rank if config.alpha is None else plain_number(config.alpha),
        "lora_dropout": float(config.dropout),
        "use_rslora": bool(config.use_rslora),
        "target_modules": [_NAME_OF_SITE[site] for site in config.targets],
        "layers_to_transform": None if config.layers is None else [int(layer) for layer in config.layers],
        "layers_pattern": None,
        "rank_pattern": peft_pattern(config.rank_pattern),
        "alpha_pattern": peft_pattern(config.alpha_pattern),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    } | ({} if marker is None else {MARKER_KEY: list(marker)})


def peft_pattern(pattern: Mapping[str, Any]) -> dict[str, Any]:
    """Return a rank or alpha pattern with sites (``q``) named as in PEFT (``q_proj``); first match wins."""
    named: dict[str, Any] = {}
    for key, value in pattern.items():
        named.setdefault(_NAME_OF_SITE.get(key, key), plain_number(value))
    return named


def plain_number(value: Any) -> int | float:
    """Return a number as JSON writes it: whole numbers without a point, which older readers of PEFT files expect."""
    return int(value) if float(value).is_integer() else float(value)


_FIELD_KINDS: tuple[tuple[str, Any, str], ...] = (
    ("r", int, "an integer"),
    ("lora_alpha", int | float, "a number"),
    ("lora_dropout", int | float, "a number from 0 up to, not including, 1"),
    ("use_rslora", bool, "true or false"),
    ("target_modules", str | list, "a list of module names, a regular expression or 'all-linear'"),
    ("exclude_modules", str | list, "a list of module names or a regular expression"),
    ("layers_to_transform", int | list, "a layer or a list of layers"),
    ("layers_pattern", str | list, "a name or a list of names"),
    ("rank_pattern", dict, "an object of names and ranks"),
    ("alpha_pattern", dict, "an object of names and numbers"),
    (MARKER_KEY, list, "a list of token ids"),
    (BASE_MODEL_KEY, str, "a name"),
)


def _pattern(peft: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Read a rank or alpha pattern, without keys that are sites' own names: in PEFT they match nothing."""
    pattern = peft.get(key) or {}
    for name, value in pattern.items():
        _check_expression(name, key, where)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise AdapterError(f"{where}: {key} gives {shown(value)} for {shown(name)}; give a number")
    return {name: value for name, value in pattern.items() if name not in LINEAR_SITES}


def _check_agreement(fields: Mapping[str, Any], extra: Mapping[str, Any], where: str) -> None:
    """Raise if what the ``preft`` object says about alpha and patterns is not what PEFT's keys say to other tools."""
    if "alpha" in extra and fields["alpha"] != fields["rank"]:
        raise AdapterError(
            f"{where}: lora_alpha is {shown(fields['alpha'])} but the 'preft' object says alpha null, that is r "
            f"{shown(fields['rank'])}; correct one of them"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if key in extra and list(peft_pattern(extra[key]).items()) != list(fields[key].items()):
            raise AdapterError(
                f"{where}: {key} is {shown(fields[key])} but the 'preft' object says {shown(extra[key])}; "
                "correct one of them"
            )


def _check_expression(expression: Any, key: str, where: str) -> None:
    try:
        parse(expression)
    except ConfigError as cause:
        raise AdapterError(f"{where}: {key}: {cause}") from None


def _targets_and_layers(
    peft: Mapping[str, Any], num_layers: int, depth_known: bool, *, keep_order: bool, where: str
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Work out which sites of which layers PEFT would edit, as ``AdapterConfig`` says it: targets times layers."""
    selects = _selector(peft, where)
    names = peft["target_modules"]
    others = [path for path in _OTHER_MODULES if selects(path, None)]
    if others:
        raise AdapterError(f"{where}: target_modules selects {others[0]!r}; embeddings and lm_head cannot be edited")
    edited = {
        layer: tuple(site for site in LINEAR_SITES if selects(f"model.layers.{layer}.{PEFT_MODULES[site]}", layer))
        for layer in range(num_layers)
    }
    edited = {layer: sites for layer, sites in edited.items() if sites}
    if not edited:
        raise AdapterError(
            f"{where}: target_modules {shown(names)} with layers_to_transform "
            f"{shown(peft.get('layers_to_transform'))} selects no linear of {num_layers} layers; "
            f"the linears are {', '.join(_SITE_OF_NAME)}"
        )
    first_layer, targets = next(iter(edited.items()))
    for layer, sites in edited.items():
        if sites != targets:
            raise AdapterError(
                f"{where}: target_modules selects {', '.join(targets)} in layer {first_layer} but {', '.join(sites)} "
                f"in layer {layer}; only the same targets in every edited layer can be loaded: split the adapter"
            )
    if keep_order and isinstance(names, list) and set(names) <= set(_SITE_OF_NAME) and len(names) == len(targets):
        targets = tuple(_SITE_OF_NAME[name] for name in names)
    return targets, _layers(peft, tuple(edited), num_layers, depth_known)


def _layers(
    peft: Mapping[str, Any], edited: tuple[int, ...], num_layers: int, depth_known: bool
) -> tuple[int, ...] | None:
    """Say the edited layers as the file does where it can: its own list, or ``None`` for all."""
    given = peft.get("layers_to_transform")
    if isinstance(given, list) and sorted(given) == list(edited):
        return tuple(given)
    names = peft["target_modules"]
    by_name = names.lower() == _ALL_LINEAR if isinstance(names, str) else set(names) <= set(_SITE_OF_NAME)
    unlimited = by_name and given in (None, []) and not peft.get("exclude_modules")
    return None if len(edited) == num_layers and (depth_known or unlimited) else edited


def _selector(peft: Mapping[str, Any], where: str) -> Callable[[str, int | None], bool]:
    """Return PEFT's test of whether the module at a path (of a layer, or of none) is edited."""
    targets, excluded = peft["target_modules"], peft.get("exclude_modules") or []
    layers, patterns = peft.get("layers_to_transform"), peft.get("layers_pattern") or []
    if isinstance(targets, str) and (layers is not None or patterns):
        raise AdapterError(
            f"{where}: layers_to_transform and layers_pattern need a list of target_modules, not the string "
            f"{shown(targets)}"
        )
    if patterns and layers is None:
        raise AdapterError(f"{where}: layers_pattern {shown(patterns)} is given without layers_to_transform; give both")
    layers = [layers] if isinstance(layers, int) else layers or []
    _check_entries(layers, int, "layers_to_transform", "layer numbers", where)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    _check_entries(patterns, str, "layers_pattern", "names", where)
    for pattern in patterns:
        if not _LAYERS_NAME.fullmatch(pattern):
            raise AdapterError(f"{where}: layers_pattern holds {shown(pattern)}; give the name of a list of layers")
    chosen = frozenset(layers)
    numbered = not patterns or any(Matcher().selects_end(pattern, "model.layers") for pattern in patterns)

    def in_layers(layer: int | None) -> bool:
        return not chosen or (numbered and layer in chosen)

    is_target = _name_test(targets, "target_modules", in_layers, where)
    is_excluded = _name_test(excluded, "exclude_modules", lambda layer: True, where)
    return lambda path, layer: is_target(path, layer) and not is_excluded(path, layer)


def _name_test(
    names: str | list[str], key: str, also: Callable[[int | None], bool], where: str
) -> Callable[[str, int | None], bool]:
    """Return PEFT's test of a path: an expression, or names that are it, or end it where its layer passes ``also``."""
    if isinstance(names, str):
        if key == "target_modules" and names.lower() == _ALL_LINEAR:
            return lambda path, layer: layer is not None
        _check_expression(names, key, where)
        return functools.partial(_selects, Matcher(), names, f"{where}: {key}")
    _check_entries(names, str, key, "module names", where)
    known = frozenset(names)
    return lambda path, layer: path in known or (not known.isdisjoint(_ends(path)) and also(layer))


def _selects(matcher: Matcher, expression: str, what: str, path: str, layer: int | None) -> bool:
    try:
        return matcher.selects(expression, path)
    except ConfigError as cause:
        raise AdapterError(f"{what}: {cause}") from None


def _ends(path: str) -> list[str]:
    """Return what follows each dot of a path."""
    names = path.split(".")
    return [".".join(names[first:]) for first in range(1, len(names))]


def _check_entries(values: list[Any], kind: type, key: str, what: str, where: str) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, kind):
            raise AdapterError(f"{where}: {key} holds {shown(value)}; give a list of {what}")
