"""Log-probabilities of tokens without the logits of all of them: a chunk of tokens at a time, the gradient with it.

The gradient of a token's log-probability with respect to the stream is ``(onehot(target) - softmax(logits)) @ head^T``,
times the token's own cotangent; it is computed where the logits are, so that they are neither kept nor computed twice.
What a loss makes of the log-probabilities is its own affair: ``train/losses.py``.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from preft_jax.models.forward import lm_head
from preft_jax.models.linear import linear_transpose, output_head
from preft_jax.models.params import Params

_CHUNK_BYTES = 1 << 28
"""Float32 logits that exist at a time, at most."""


def chunk_size(tokens: int, vocab: int) -> int:
    """Return how many of ``tokens`` have their logits made at a time: a divisor of ``tokens``."""
    most = max(1, _CHUNK_BYTES // (4 * vocab))
    return math.gcd(tokens, 1 << (most.bit_length() - 1))


def token_logprobs(params: Params, h_TD: jax.Array, targets_T: jax.Array, learned_T: jax.Array) -> jax.Array:
    """Return ``log softmax(head(h))[target]`` of each token that is learned, and 0 for the others.

    Args:
        params: of the base model; not differentiated.
        h_TD: normed stream after the last layer; differentiable.
        targets_T: int32.
        learned_T: bool; chunks of tokens without any cost nothing.

    Returns:
        Float32 ``[T]``.
    """
    head = {name: params[name] for name in ("embed", "lm_head") if name in params}
    return _logprobs(head, h_TD, targets_T, learned_T)


def _chunks(x: jax.Array, size: int) -> jax.Array:
    return x.reshape(-1, size, *x.shape[1:])


def _map(one: Any, head: Params, h_TD: jax.Array, targets_T: jax.Array, learned_T: jax.Array) -> Any:
    """Run ``one`` on each chunk; zeros for those that nothing is learned from."""
    size = chunk_size(len(targets_T), head["embed"].shape[0])

    def chunk(args: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        h_ID, targets_I, learned_I = args
        shapes = jax.eval_shape(one, h_ID, targets_I)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.cond(learned_I.any(), one, lambda *_: nothing, h_ID, targets_I)

    out = jax.lax.map(chunk, (_chunks(h_TD, size), _chunks(targets_T, size), _chunks(learned_T, size)))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)


@jax.custom_vjp
def _logprobs(head: Params, h_TD: jax.Array, targets_T: jax.Array, learned_T: jax.Array) -> jax.Array:
    def one(h_ID: jax.Array, targets_I: jax.Array) -> jax.Array:
        logits_IV = lm_head(head, h_ID)
        return jnp.take_along_axis(logits_IV, targets_I[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits_IV, axis=1)

    return jnp.where(learned_T, _map(one, head, h_TD, targets_T, learned_T), 0.0)


def _forward(head: Params, h_TD: jax.Array, targets_T: jax.Array, learned_T: jax.Array) -> Any:
    def one(h_ID: jax.Array, targets_I: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_IV = lm_head(head, h_ID)
        norm_I = jax.nn.logsumexp(logits_IV, axis=1)
        chosen_I = jnp.take_along_axis(logits_IV, targets_I[:, None], axis=1)[:, 0]
        onehot_IV = targets_I[:, None] == jnp.arange(logits_IV.shape[1], dtype=targets_I.dtype)
        slope_IV = (jnp.exp(logits_IV - norm_I[:, None]) - onehot_IV.astype(jnp.float32)).astype(h_ID.dtype)
        return chosen_I - norm_I, _through_head(head, slope_IV)

    logprob_T, slope_TD = _map(one, head, h_TD, targets_T, learned_T)
    return jnp.where(learned_T, logprob_T, 0.0), (slope_TD, learned_T)


def _through_head(head: Params, slope_IV: jax.Array) -> jax.Array:
    """Return ``slope @ head^T`` in the slope's dtype."""
    return linear_transpose(slope_IV, output_head(head))


def _backward(kept: tuple[jax.Array, jax.Array], cotangent_T: jax.Array) -> Any:
    slope_TD, learned_T = kept  # The slope of the negative log-probability.
    scaled_TD = -cotangent_T[:, None] * slope_TD.astype(jnp.float32)
    # Whatever a loss makes of a token that is not learned, nothing of it gets here.
    return None, jnp.where(learned_T[:, None], scaled_TD, 0.0).astype(slope_TD.dtype), None, None


_logprobs.defvjp(_forward, _backward)
