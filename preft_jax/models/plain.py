"""Operations of a layer in plain JAX: every edit is added to the output of its linear.

They run on every backend over weights in any layout. With dense attention (``models/attention.py``) they are
differentiable in weights and edits.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

from kernels.xla.fused import rms_norm, rotate
from preft_jax.adapters.edits import Edits
from preft_jax.config import ModelConfig
from preft_jax.models.attention import Attention
from preft_jax.models.layer import SAVED
from preft_jax.models.linear import project_each
from preft_jax.models.params import Params
from preft_jax.models.shard import embedded, summed


class PlainLayers:
    """A batch with any leading axes; streams, inputs and outputs of linears are arrays.

    Args:
        config: static.
        rope: cos and sin, float32 ``[..., 1, C / 2]``.
        attention: how queries see keys.
        edits: how adapters act on the batch.
    """

    def __init__(self, config: ModelConfig, rope: tuple[jax.Array, jax.Array], attention: Attention, edits: Edits):
        self._config = config
        self._rope = rope
        self._attention = attention
        self._edits = edits

    def begin(self, embed_VD: jax.Array, tokens: jax.Array) -> jax.Array:
        """See ``Layers.begin``."""
        return embedded(self._config, embed_VD, tokens)

    def norm(
        self, layer: int, w: Params, name: str, stream: jax.Array, sites: tuple[str, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """See ``Layers.norm``."""
        return stream, rms_norm(stream, w[name], self._config.rms_norm_eps)

    def project(self, layer: int, w: Params, h: jax.Array, sites: tuple[str, ...]) -> tuple[jax.Array, ...]:
        """See ``Layers.project``."""
        widths = tuple(self._config.site_shape(site)[1] for site in sites)
        return self._edits.apply(layer, sites, h, project_each(w, h, sites, widths))

    def attend(self, layer: int, w: Params, qkv: tuple[jax.Array, ...]) -> jax.Array:
        """See ``Layers.attend``."""
        q, k, v = (checkpoint_name(y, SAVED) for y in qkv)
        q, k, v = (y.reshape(*y.shape[:-1], -1, self._config.head_dim) for y in (q, k, v))
        if self._config.qk_norm:
            q = rms_norm(q, w["q_norm"], self._config.rms_norm_eps)
            k = rms_norm(k, w["k_norm"], self._config.rms_norm_eps)
        mixed = self._attention.attend(
            layer, rotate(q, self._rope), rotate(k, self._rope), v, self._config.sliding_window,
            self._edits.prefix(layer, k.dtype),
        )  # fmt: skip
        return checkpoint_name(mixed.reshape(*mixed.shape[:-2], -1), SAVED)

    def gate(self, layer: int, w: Params, gate_up: tuple[jax.Array, ...]) -> jax.Array:
        """See ``Layers.gate``."""
        gate, up = (checkpoint_name(y, SAVED) for y in gate_up)
        return jax.nn.silu(gate) * up

    def add(self, layer: int, w: Params, stream: jax.Array, h: jax.Array, site: str) -> jax.Array:
        """See ``Layers.add``."""
        (y,) = self.project(layer, w, h, (site,))
        stream = stream + summed(self._config, y)
        # The stream behind an MLP is the next layer's input, which is kept in any case.
        return checkpoint_name(stream, SAVED) if site == "o" else stream

    def end(self, layer: int, stream: jax.Array) -> jax.Array:
        """See ``Layers.end``."""
        (stream,) = self._edits.apply(layer, ("block",), stream, (stream,))
        return stream

    def final_norm(self, weight_D: jax.Array, stream: jax.Array) -> jax.Array:
        """See ``Layers.final_norm``."""
        return rms_norm(stream, weight_D, self._config.rms_norm_eps)
