"""What training starts from where it is not a new adapter: one of a directory, which keeps its shape."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.kinds import find_kind
from preft_jax.errors import ConfigError
from preft_jax.io.adapter_files import load_adapter
from preft_jax.loading import Model
from preft_jax.shapes import SITES

OPTIONS = {
    "kind": "adapter_kind", "rank": "rank", "alpha": "lora_alpha", "use_rslora": "use_rslora", "targets": "targets",
    "layers": "layers", "share_weights": "share_weights", "orthonormal": "orthonormal", "positions": "positions",
    "assistant_turns": "assistant_turns", "dropout": "lora_dropout",
    "alora_invocation_tokens": "alora_invocation_tokens",
}  # fmt: skip
"""Fields of ``AdapterConfig`` that can be asked for -> the names that ``train.sft``'s options have."""

CHANGEABLE = ("positions", "alora_invocation_tokens", "assistant_turns", "dropout")
"""Those that may be others than the adapter's: they say where it acts, and how it is trained, and not what it is."""


def load_start(path: Path, asked: Mapping[str, Any], model: Model) -> Adapter:
    """Return the adapter of a directory with the config that training has for it, see ``start_config``.

    Raises:
        AdapterError: if the directory holds no adapter of this base model.
        ConfigError: if something else is asked for than what the adapter is.
    """
    found = load_adapter(path, model)
    config = start_config(found.config, asked, where=path, num_layers=model.config.num_hidden_layers)
    return Adapter(config, found.params)


def start_config(found: AdapterConfig, asked: Mapping[str, Any], *, where: Path, num_layers: int) -> AdapterConfig:
    """Return the config of training that starts from an adapter.

    Args:
        found: the adapter's.
        asked: fields that are asked for by name. Others are the adapter's; but one that edits every token is made
            prefill-only (``prompt``) unless ``all`` is asked for.
        where: the adapter's directory, for errors.
        num_layers: of the base model.

    Raises:
        ConfigError: if a field that is not in ``CHANGEABLE`` contradicts the adapter, or the positions are those of
            weights that it does not have.
    """
    for field, value in asked.items():
        new, own = (_written(field, one, found, num_layers) for one in (value, getattr(found, field)))
        if field not in CHANGEABLE and new != own:
            option = OPTIONS[field]
            raise ConfigError(
                f"{option} is {new} and that of the adapter to start from, {where}, is {own}; leave {option} out, or "
                "leave init_from out to train a new adapter"
            )
    positions = asked.get("positions", found.positions if found.prefill_only else "prompt")
    if not found.share_weights and positions != found.positions:
        raise ConfigError(
            f"positions is {positions!r} and the adapter to start from, {where}, has its own weights for the first and "
            f"the last of {found.positions!r}; leave positions out"
        )
    dropout = asked.get("dropout", found.dropout if found.kind == "lora" else 0.0)
    if dropout and found.kind != "lora":
        raise ConfigError(f"lora_dropout is LoRA's; the adapter to start from, {where}, is {found.kind!r}")
    turns = asked.get("assistant_turns", found.assistant_turns)
    marker = asked.get("alora_invocation_tokens", found.alora_invocation_tokens)
    return dataclasses.replace(
        found, positions=positions, alora_invocation_tokens=marker, assistant_turns=turns, dropout=dropout
    )


def _written(field: str, value: Any, found: AdapterConfig, num_layers: int) -> str:
    """Return a value as an option has it, equal ones alike: what is left out is what it stands for."""
    lora = found.kind == "lora"
    if field == "alpha" and (value is not None or lora):
        return str(float(found.rank if value is None else value))
    if field == "targets":
        sites = set(value or find_kind(found.kind).targets)
        return ",".join([site for site in SITES if site in sites] + sorted(sites - set(SITES)))
    if field == "layers":
        layers = set(range(num_layers) if value is None else value)
        return "all" if layers == set(range(num_layers)) else ",".join(map(str, sorted(layers)))
    return "none" if value is None else str(value)
