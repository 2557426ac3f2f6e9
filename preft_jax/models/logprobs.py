"""Log-probabilities of tokens without the logits of all of them: a chunk of tokens at a time, the gradient with it.

The gradient of a token's log-probability with respect to the stream is ``(onehot(target) - softmax(logits)) @ head^T``,
times the token's own cotangent; it is computed where the logits are, so that they are neither kept nor computed twice.
What a loss makes of the log-probabilities is its own affair: ``train/losses.py``.
"""

import math
from typing import Any, NamedTuple

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


def token_logprobs(
    params: Params,
    h_TD: jax.Array,
    targets_T: jax.Array,
    learned_T: jax.Array,
    temperature_T: jax.Array | None = None,
) -> jax.Array:
    """Return ``log softmax(head(h) / temperature)[target]`` of each token that is learned, and 0 for the others.

    Args:
        params: of the base model; not differentiated.
        h_TD: normed stream after the last layer; differentiable.
        targets_T: int32.
        learned_T: bool; chunks of tokens without any cost nothing.
        temperature_T: float32, above 0; None: 1 for all.

    Returns:
        Float32 ``[T]``.
    """
    head = {name: params[name] for name in ("embed", "lm_head") if name in params}
    return _logprobs(head, _Tokens(h_TD, targets_T, learned_T, temperature_T))


def _chunks(x: jax.Array, size: int) -> jax.Array:
    return x.reshape(-1, size, *x.shape[1:])


class _Tokens(NamedTuple):
    """Whose log-probabilities are wanted, as of ``token_logprobs``."""

    h_TD: Any
    targets_T: Any
    learned_T: Any
    temperature_T: Any


def _map(one: Any, tokens: _Tokens, vocab: int) -> Any:
    """Run ``one`` on each chunk; zeros for those that nothing is learned from."""
    size = chunk_size(len(tokens.targets_T), vocab)

    def chunk(some: _Tokens) -> Any:
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, some))
        return jax.lax.cond(some.learned_T.any(), one, lambda _: nothing, some)

    out = jax.lax.map(chunk, jax.tree.map(lambda x: _chunks(x, size), tokens))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)


def _logits(head: Params, some: _Tokens) -> jax.Array:
    """Return a chunk's logits over their temperatures, float32 ``[I, V]``."""
    logits_IV = lm_head(head, some.h_TD)
    return logits_IV if some.temperature_T is None else logits_IV / some.temperature_T[:, None]


@jax.custom_vjp
def _logprobs(head: Params, tokens: _Tokens) -> jax.Array:
    def one(some: _Tokens) -> jax.Array:
        logits_IV = _logits(head, some)
        chosen_I = jnp.take_along_axis(logits_IV, some.targets_T[:, None], axis=1)[:, 0]
        return chosen_I - jax.nn.logsumexp(logits_IV, axis=1)

    return jnp.where(tokens.learned_T, _map(one, tokens, head["embed"].shape[0]), 0.0)


def _forward(head: Params, tokens: _Tokens) -> Any:
    def one(some: _Tokens) -> tuple[jax.Array, jax.Array]:
        logits_IV, targets_I = _logits(head, some), some.targets_T
        norm_I = jax.nn.logsumexp(logits_IV, axis=1)
        chosen_I = jnp.take_along_axis(logits_IV, targets_I[:, None], axis=1)[:, 0]
        onehot_IV = targets_I[:, None] == jnp.arange(logits_IV.shape[1], dtype=targets_I.dtype)
        slope_IV = jnp.exp(logits_IV - norm_I[:, None]) - onehot_IV.astype(jnp.float32)
        if some.temperature_T is not None:
            slope_IV = slope_IV / some.temperature_T[:, None]
        return chosen_I - norm_I, _through_head(head, slope_IV.astype(some.h_TD.dtype))

    logprob_T, slope_TD = _map(one, tokens, head["embed"].shape[0])
    return jnp.where(tokens.learned_T, logprob_T, 0.0), (slope_TD, tokens)


def _through_head(head: Params, slope_IV: jax.Array) -> jax.Array:
    """Return ``slope @ head^T`` in the slope's dtype."""
    return linear_transpose(slope_IV, output_head(head))


def _backward(kept: tuple[jax.Array, _Tokens], cotangent_T: jax.Array) -> Any:
    slope_TD, tokens = kept  # The slope of the negative log-probability.
    scaled_TD = -cotangent_T[:, None] * slope_TD.astype(jnp.float32)
    # Whatever a loss makes of a token that is not learned, nothing of it gets here.
    d_h_TD = jnp.where(tokens.learned_T[:, None], scaled_TD, 0.0).astype(slope_TD.dtype)
    return None, _Tokens(d_h_TD, None, None, None)


_logprobs.defvjp(_forward, _backward)
