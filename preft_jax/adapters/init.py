"""New adapters: those that change nothing yet, and random ones."""

import jax
import numpy as np

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig, adapter_shapes
from preft_jax.config import ModelConfig


def init_adapter(config: AdapterConfig, model: ModelConfig, key: jax.Array) -> Adapter:
    """Return a new adapter that changes nothing yet.

    LoRA as in PEFT: ``lora_a`` uniform within ±1/sqrt(D), ``lora_b`` zero. LoReFT: ``r`` with random orthonormal rows,
    ``w = r`` and
    ``b = 0``. DiReFT: the same ``r``, ``w`` and ``b`` zero. Drawn on the host, so no shape is ever compiled for it.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())

    def leaves(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        if config.kind == "lora":
            bound = shapes["lora_a"][1] ** -0.5
            lora_a = rng.uniform(-bound, bound, shapes["lora_a"]).astype(np.float32)
            return {"lora_a": lora_a, "lora_b": np.zeros(shapes["lora_b"], np.float32)}
        groups = np.split(rng.standard_normal(shapes["r"]), config.groups)
        r_RD = np.concatenate([np.linalg.qr(group.T)[0].T for group in groups]).astype(np.float32)
        w_RD = r_RD.copy() if config.kind == "loreft" else np.zeros(shapes["w"], np.float32)
        return {"w": w_RD, "b": np.zeros(shapes["b"], np.float32), "r": r_RD}

    shapes = adapter_shapes(config, model)
    return Adapter(config, {"layers": [{site: leaves(s) for site, s in sites.items()} for sites in shapes["layers"]]})


def random_adapter(config: AdapterConfig, model: ModelConfig, key: jax.Array, *, strength: float = 0.05) -> Adapter:
    """Return an adapter that does change the model, for tests and benchmarks.

    Every leaf of ``init_adapter`` gets Gaussian noise of standard deviation ``strength / sqrt(its last axis)`` added,
    which keeps activations finite.
    """
    adapter = init_adapter(config, model, key)
    rng = np.random.default_rng([1, *np.asarray(jax.random.key_data(key)).ravel()])

    def noisy(leaf: np.ndarray) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape, np.float32)
        return leaf + np.float32(strength * leaf.shape[-1] ** -0.5) * noise

    return Adapter(config, jax.tree.map(noisy, adapter.params))
