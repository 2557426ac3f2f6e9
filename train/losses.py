"""Next-token cross-entropy without the logits of all tokens: a chunk of tokens at a time, its gradient made with it.

The gradient of a token's loss with respect to the stream is ``(softmax(logits) - onehot(target)) @ head^T``, times the
token's own cotangent; it is computed where the logits are, so that they are neither kept nor computed twice.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from preft_jax.models.forward import lm_head
from preft_jax.models.linear import Transposed
from preft_jax.models.params import Params

_CHUNK_BYTES = 1 << 28
"""Float32 logits that exist at a time, at most."""


def chunk_size(tokens: int, vocab: int) -> int:
    """Return how many of ``tokens`` have their logits made at a time: a divisor of ``tokens``."""
    most = max(1, _CHUNK_BYTES // (4 * vocab))
    return math.gcd(tokens, 1 << (most.bit_length() - 1))


def token_losses(params: Params, h_TD: jax.Array, targets_T: jax.Array, weights_T: jax.Array) -> jax.Array:
    """Return ``weight * -log softmax(head(h))[target]`` of each token.

    Args:
        params: of the base model; not differentiated.
        h_TD: normed stream after the last layer; differentiable.
        targets_T: int32.
        weights_T: float32; chunks of tokens whose weights are all zero cost nothing. Not differentiated.

    Returns:
        Float32 ``[T]``.
    """
    head = {name: params[name] for name in ("embed", "lm_head") if name in params}
    return _weighted(head, h_TD, targets_T, weights_T)


def _chunks(x: jax.Array, size: int) -> jax.Array:
    return x.reshape(-1, size, *x.shape[1:])


def _map(one: Any, head: Params, h_TD: jax.Array, targets_T: jax.Array, weights_T: jax.Array) -> Any:
    """Run ``one`` on each chunk; zeros for those that nothing is learned from."""
    size = chunk_size(len(targets_T), head["embed"].shape[0])

    def chunk(args: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        h_ID, targets_I, weights_I = args
        shapes = jax.eval_shape(one, h_ID, targets_I)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.cond((weights_I != 0).any(), one, lambda *_: nothing, h_ID, targets_I)

    out = jax.lax.map(chunk, (_chunks(h_TD, size), _chunks(targets_T, size), _chunks(weights_T, size)))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)


@jax.custom_vjp
def _weighted(head: Params, h_TD: jax.Array, targets_T: jax.Array, weights_T: jax.Array) -> jax.Array:
    def one(h_ID: jax.Array, targets_I: jax.Array) -> jax.Array:
        logits_IV = lm_head(head, h_ID)
        return jax.nn.logsumexp(logits_IV, axis=1) - jnp.take_along_axis(logits_IV, targets_I[:, None], axis=1)[:, 0]

    return _weigh(weights_T, _map(one, head, h_TD, targets_T, weights_T))


def _forward(head: Params, h_TD: jax.Array, targets_T: jax.Array, weights_T: jax.Array) -> Any:
    def one(h_ID: jax.Array, targets_I: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_IV = lm_head(head, h_ID)
        norm_I = jax.nn.logsumexp(logits_IV, axis=1)
        chosen_I = jnp.take_along_axis(logits_IV, targets_I[:, None], axis=1)[:, 0]
        onehot_IV = targets_I[:, None] == jnp.arange(logits_IV.shape[1], dtype=targets_I.dtype)
        slope_IV = (jnp.exp(logits_IV - norm_I[:, None]) - onehot_IV.astype(jnp.float32)).astype(h_ID.dtype)
        return norm_I - chosen_I, _through_head(head, slope_IV)

    loss_T, slope_TD = _map(one, head, h_TD, targets_T, weights_T)
    return _weigh(weights_T, loss_T), (slope_TD, weights_T)


def _weigh(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Return the product, and zero without weight whatever the value is."""
    return jnp.where(weights != 0, values * weights, 0.0)


def _through_head(head: Params, slope_IV: jax.Array) -> jax.Array:
    """Return ``slope @ head^T`` in the slope's dtype."""
    weight = head.get("lm_head", Transposed(head["embed"]))
    w, axis = (weight.w_FD, 0) if isinstance(weight, Transposed) else (weight, 1)
    return jax.lax.dot_general(slope_IV, w, (((1,), (axis,)), ((), ())), preferred_element_type=slope_IV.dtype)


def _backward(kept: tuple[jax.Array, jax.Array], cotangent_T: jax.Array) -> Any:
    slope_TD, weights_T = kept
    scaled_TD = _weigh((cotangent_T * weights_T)[:, None], slope_TD.astype(jnp.float32))
    return None, scaled_TD.astype(slope_TD.dtype), None, None


_weighted.defvjp(_forward, _backward)
