"""Merging an all-token LoRA into the weights of its base model."""

from typing import Any

import jax
import jax.numpy as jnp

from preft_jax.adapters.adapter import Adapter, fold
from preft_jax.adapters.config import AdapterConfig
from preft_jax.errors import AdapterError
from preft_jax.quantize import is_quantized


def check_mergeable(config: AdapterConfig) -> None:
    """Raise ``AdapterError`` if an adapter cannot become part of a base model's weights, with the reason."""
    if config.kind != "lora" and "block" not in config.targets:
        raise AdapterError(f"a {config.kind} adapter cannot be merged: only LoRA's edits are; serve it as an adapter")
    if config.kind != "lora":
        raise AdapterError(
            f"a {config.kind} adapter cannot be merged: it edits the residual stream, which no linear's weight holds; "
            "serve it as an adapter"
        )
    if config.prefill_only:
        raise AdapterError(
            f"an adapter with positions {config.positions!r} cannot be merged: merged weights act on every token, "
            "generated ones too, and it is for prompt tokens only; serve it as an adapter"
        )
    if config.alora_invocation_tokens is not None:
        raise AdapterError(
            "an adapter with alora_invocation_tokens cannot be merged: merged weights act on every token, and it is "
            "for tokens from its marker on; serve it as an adapter"
        )
    if config.assistant_turns == "skip":
        raise AdapterError(
            "an adapter with assistant_turns 'skip' cannot be merged: merged weights act on earlier answers too; serve "
            "it as an adapter"
        )


def merge_lora(params: Any, adapter: Adapter, *, dtype: Any = None) -> Any:
    """Return base parameters with an all-token LoRA merged in: ``W + A @ B`` of each folded edit (arXiv 2106.09685).

    Args:
        params: parameter tree of the base model; linears ``[D, F]``. It is not changed.
        adapter: the adapter.
        dtype: of the result's leaves; ``None`` keeps each leaf's own.

    Returns:
        A new tree. Sums are taken in float32 and cast once.

    Raises:
        AdapterError: for a ReFT or prefill-only adapter, one whose layers are not the model's, or a model in FP8.
    """
    check_mergeable(adapter.config)
    if is_quantized(params):
        raise AdapterError(
            "an adapter cannot be merged into weights in FP8, which are too coarse for it; merge it into the "
            "unquantised model, or serve it as an adapter"
        )
    edits = fold(adapter)["layers"]
    if len(edits) != len(params["layers"]):
        raise AdapterError(
            f"the adapter is for {len(edits)} layers and the model has {len(params['layers'])}; load it for this model"
        )

    def merged(layer: dict[str, jax.Array], sites: dict[str, Any]) -> dict[str, jax.Array]:
        new = dict(layer)
        for site, edit in sites.items():
            delta_DF = jnp.matmul(edit.a_DR, edit.b_RF, precision=jax.lax.Precision.HIGHEST)
            weight_DF = jnp.asarray(layer[site])
            new[site] = (weight_DF.astype(jnp.float32) + delta_DF).astype(dtype or weight_DF.dtype)
        return new

    result = dict(params) | {"layers": [merged(x, e) for x, e in zip(params["layers"], edits, strict=True)]}
    return result if dtype is None else jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), result)
