"""New adapters: those that change nothing yet, and random ones."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig, adapter_shapes
from preft_jax.adapters.kinds import find_kind
from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError, check_type, shown


def init_adapter(config: AdapterConfig, model: ModelConfig, key: jax.Array) -> Adapter:
    """Return a new adapter that changes nothing yet.

    LoRA as in PEFT: ``lora_a`` uniform within ±1/sqrt(D), ``lora_b`` zero. LoReFT: ``r`` with random orthonormal rows,
    ``w = r`` and ``b = 0``. DiReFT: the same ``r``, ``w`` and ``b`` zero. Drawn on the host, so no shape is ever
    compiled for it; under ``jax.jit`` with a traced key too, and the same numbers.

    Args:
        config: of the adapter.
        model: of the base model.
        key: from ``jax.random.key``.

    Raises:
        ConfigError: if the adapter does not fit the model, or an argument is of another type.
    """
    return _drawn(config, model, key, None)


def random_adapter(config: AdapterConfig, model: ModelConfig, key: jax.Array, *, strength: float = 0.05) -> Adapter:
    """Return an adapter that does change the model, for tests and benchmarks.

    Every leaf of ``init_adapter`` gets Gaussian noise of standard deviation ``strength / sqrt(its last axis)`` added,
    which keeps activations finite.

    Raises:
        ConfigError: as ``init_adapter``.
    """
    return _drawn(config, model, key, strength)


def _drawn(config: AdapterConfig, model: ModelConfig, key: jax.Array, strength: float | None) -> Adapter:
    check_type("config", config, AdapterConfig, "an AdapterConfig", ConfigError)
    check_type("model", model, ModelConfig, "the ModelConfig, which a Model has as config", ConfigError)
    try:
        data = jax.random.key_data(key)
    except (TypeError, ValueError):
        raise ConfigError(f"key is {shown(key)}; give what jax.random.key returns") from None
    shapes = adapter_shapes(config, model)

    def draw(data: Any) -> Any:
        return _draw(config, shapes, np.asarray(data).ravel(), strength)

    if not isinstance(data, Tracer):
        return Adapter(config, draw(data))
    leaves = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    return Adapter(config, jax.pure_callback(draw, leaves, data, vmap_method="sequential"))


def _draw(config: AdapterConfig, shapes: Any, seed: np.ndarray, strength: float | None) -> Any:
    """Return parameters on the host; ``strength`` of the noise, if there is to be any."""
    kind, rng = find_kind(config.kind), np.random.default_rng(seed)
    noise = np.random.default_rng([1, *seed])

    def leaves(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        made = {name: np.asarray(leaf, np.float32) for name, leaf in kind.init(config, shapes, rng).items()}
        if {name: leaf.shape for name, leaf in made.items()} != shapes:
            given = {name: leaf.shape for name, leaf in made.items()}
            raise ConfigError(f"init of the kind {kind.name!r} gives {given}, and its shapes say {shapes}")
        return made

    params = {"layers": [{site: leaves(s) for site, s in sites.items()} for sites in shapes["layers"]]}
    if strength is None:
        return params

    def noisy(leaf: np.ndarray) -> np.ndarray:
        return leaf + np.float32(strength * leaf.shape[-1] ** -0.5) * noise.standard_normal(leaf.shape, np.float32)

    return jax.tree.map(noisy, params)
