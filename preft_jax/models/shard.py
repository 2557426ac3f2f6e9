"""One device's part of a model that is cut over devices (tensor parallelism), and what devices tell each other.

Megatron's cut (Shoeybi et al., arXiv 1909.08053): q, k, v, gate and up are cut along their outputs, o and down along
their inputs, so a layer needs two sums over devices. A device runs the layer that everybody runs, over the config of
its own heads and channels. Everything here does nothing for a model that one device has whole.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding

from preft_jax.adapters.bank import Bank
from preft_jax.config import ModelConfig
from preft_jax.device.mesh import TENSOR
from preft_jax.errors import ConfigError
from preft_jax.models.linear import JOINED
from preft_jax.models.params import AXES, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardConfig(ModelConfig):
    """What one of ``num_shards`` devices has of a model: fewer heads and channels; width and vocabulary are whole.

    A function of it runs inside ``jax.shard_map`` over the axis ``TENSOR``.
    """

    num_shards: int


def shard_config(config: ModelConfig, num_shards: int) -> ModelConfig:
    """Return what each of so many devices has of a model; for one, the config itself.

    Raises:
        ConfigError: its KV heads or channels cannot be cut into so many equal parts.
    """
    if num_shards == 1:
        return config
    cut = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = {name: getattr(config, name) for name in cut}
    wrong = [f"{name} {size}" for name, size in sizes.items() if size % num_shards]
    if wrong:
        least = min(sizes.values())
        fitting = [n for n in range(1, least + 1) if not any(size % n for size in sizes.values())]
        raise ConfigError(
            f"this model cannot be cut over {num_shards} devices: {', '.join(wrong)} is no multiple of it; give tp="
            f"{' or '.join(map(str, fitting))}"
        )
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return ShardConfig(**fields | {name: size // num_shards for name, size in sizes.items()}, num_shards=num_shards)


def check_not_joined(params: Params) -> None:
    """Raise ``ConfigError`` if weights lie side by side by device, ``[q_i|k_i|v_i]``, and not as one device has them.

    Of arrays that are not traced: an engine's programs see what one device has.
    """
    for name in JOINED.values():
        for leaf in jax.tree.leaves(params["layers"][0].get(name)) if params["layers"] else ():
            sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
            if isinstance(sharding, NamedSharding) and TENSOR in jax.tree.leaves(tuple(sharding.spec)):
                raise ConfigError(
                    f"{name} lies in the serving layout over {sharding.mesh.shape[TENSOR]} devices, which an engine "
                    "alone computes with; give the params of load_model, canonical ones"
                )


def summed[T](config: ModelConfig, partial: T) -> T:
    """Return the sum over devices of arrays that each has a part of: outputs of o and down, and of their shrinks."""
    return jax.lax.psum(partial, TENSOR) if isinstance(config, ShardConfig) else partial


def embedded(config: ModelConfig, embed_VD: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return the embeddings of tokens, ``[..., D]``; each device looks up those that it has."""
    rows = embed_VD.shape[0]
    if not isinstance(config, ShardConfig) or rows == config.vocab_size:
        return embed_VD[tokens]
    own = tokens - rows * jax.lax.axis_index(TENSOR)
    held = (own >= 0) & (own < rows)
    x = jnp.where(held[..., None], embed_VD[jnp.where(held, own, 0)], jnp.zeros((), embed_VD.dtype))
    return jax.lax.psum(x, TENSOR)


def whole_logits(config: ModelConfig, logits: jax.Array) -> jax.Array:
    """Return the logits of the whole vocabulary, of which each device has a part or all."""
    if not isinstance(config, ShardConfig) or logits.shape[-1] == config.vocab_size:
        return logits
    return jax.lax.all_gather(logits, TENSOR, axis=logits.ndim - 1, tiled=True)


def own_bank(config: ModelConfig, bank: Bank) -> Bank:
    """Return a device's part of a bank, such that the sum over devices of what it shrinks is the whole's.

    Where a site's input is cut (``o``, ``down``), each device adds what its part of A gives, but one alone adds c.
    """
    if not isinstance(config, ShardConfig):
        return bank
    first = jax.lax.axis_index(TENSOR) == 0
    cut = {
        site: pools._replace(c_LPR=jnp.where(first, pools.c_LPR, jnp.zeros((), pools.c_LPR.dtype)))
        for site, pools in bank.sites.items()
        if is_input_cut(site)
    }
    return Bank(bank.sites | cut)


def is_input_cut(site: str) -> bool:
    """Return whether a site's input is cut over devices, and its output a sum over them."""
    return site in AXES and AXES[site][0] != "hidden"
