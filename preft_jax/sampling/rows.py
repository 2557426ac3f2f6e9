"""Rows that draw tokens step after step: their state, what a step draws, and how the state goes on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.types import Array
from preft_jax.sampling.device import INVALID, Sample, top_logprobs
from preft_jax.sampling.parameters import MAX_LOGPROBS


class DecodeState(NamedTuple):
    """Rows of a running decode. int32.

    ``token_B`` is each row's newest token, not yet in the cache, and ``position_B`` its position; ``remaining_B``
    counts the tokens still to draw (0: the row is done or empty); ``stop_BE`` its end tokens, padded with -1.
    """

    token_B: Array
    position_B: Array
    remaining_B: Array
    stop_BE: Array


class Drawn(NamedTuple):
    """Tokens of several decode steps ``[steps, B]`` with their log-probabilities; -1 where a row drew nothing.

    A row whose logits are not numbers draws ``sampling.INVALID`` and ends. ``top_token_NBE`` and ``top_logprob_NBE``
    are the most likely tokens, zeros unless asked for, None where a program never gives them.
    """

    token_NB: jax.Array
    logprob_NB: jax.Array
    sampling_logprob_NB: jax.Array
    top_token_NBE: jax.Array | None = None
    top_logprob_NBE: jax.Array | None = None


def tops_if(wanted: jax.Array, logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the ``MAX_LOGPROBS`` most likely tokens of each row and their log-probabilities; zeros if not wanted."""
    count = min(MAX_LOGPROBS, logits_BV.shape[1])
    shape = (logits_BV.shape[0], count)
    none = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    return jax.lax.cond(wanted, lambda: top_logprobs(logits_BV, count), lambda: none)


def advance(state: DecodeState, new: Sample) -> tuple[jax.Array, DecodeState]:
    """Give rows the tokens drawn for them; returns these, -1 for rows that had none left to draw, and the state."""
    active_B = state.remaining_B > 0
    token_B = jnp.where(active_B, new.token_B, -1)
    stopped_B = jnp.any(token_B[:, None] == state.stop_BE, axis=1) | (token_B == INVALID)
    return token_B, state._replace(
        token_B=jnp.where(active_B, token_B, state.token_B),
        position_B=state.position_B + active_B.astype(jnp.int32),
        remaining_B=jnp.where(active_B & ~stopped_B, state.remaining_B - 1, 0),
    )


def remember(token_BS: Array, state: DecodeState, token_B: jax.Array) -> jax.Array:
    """Return rows' texts (``History``) with the tokens that ``advance`` gave them."""
    rows = jnp.arange(len(token_B), dtype=jnp.int32)
    at_B = jnp.where(token_B == -1, token_BS.shape[1], state.position_B)
    return jnp.asarray(token_BS).at[rows, at_B].set(token_B, mode="drop")
