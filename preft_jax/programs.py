"""The jitted programs of one model shape: prefill, decode, decode for all-token adapters, and sampling of first tokens.

Each is compiled once for each bucket of lengths. Caches are donated and updated in place; a bank is only read.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.types import Array
from preft_jax.adapters.bank import Bank
from preft_jax.config import ModelConfig
from preft_jax.models import forward
from preft_jax.models.batch import DecodeBatch
from preft_jax.models.cache import KVCache
from preft_jax.models.params import Params
from preft_jax.sampling.arrays import SamplingArrays
from preft_jax.sampling.device import INVALID, History, Sample, sample, top_logprobs
from preft_jax.sampling.parameters import MAX_LOGPROBS


class DecodeState(NamedTuple):
    """Rows of a running decode. int32.

    ``token_B`` is each row's newest token, not yet in the cache, and ``position_B`` its position; ``remaining_B``
    counts the tokens still to draw (0: the row is done or empty); ``page_table_BP`` its KV pages; ``stop_BE`` its end
    tokens, padded with -1.
    """

    token_B: Array
    position_B: Array
    remaining_B: Array
    page_table_BP: Array
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


class Programs(NamedTuple):
    """Jitted functions of one model shape.

    ``prefill(params, bank, cache, batch, max_query_len=...)``
    ``decode(params, cache, state, sampling, history, num_steps=...)``
    ``decode_adapted(params, bank, pages, cache, state, sampling, history, num_steps=...)``
    ``sample(logits, positions, sampling, history)``
    """

    prefill: Any
    decode: Any
    decode_adapted: Any
    sample: Any


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


def decode_loop(
    step: Callable[[KVCache, DecodeBatch], tuple[jax.Array, KVCache]],
    cache: KVCache,
    state: DecodeState,
    sampling: SamplingArrays,
    history: History | None,
    num_steps: Any,
    *,
    max_steps: int,
) -> tuple[KVCache, DecodeState, Drawn]:
    """Run decode steps and draw a token after each, until ``num_steps`` are done or no row has tokens left to draw.

    Args:
        step: logits and cache of one decode step.
        cache, state: donated.
        sampling: parameters of each row.
        history: tokens of each row, for penalties; its lengths are taken from the state. None: no penalties.
        num_steps: at most ``max_steps``; may be traced.
        max_steps: static rows of the result.
    """
    size = state.token_B.shape[0]
    drawn = Drawn(
        jnp.full((max_steps, size), -1, jnp.int32),
        jnp.zeros((max_steps, size), jnp.float32),
        jnp.zeros((max_steps, size), jnp.float32),
    )

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        n, _, state, _, _ = carry
        return (n < num_steps) & jnp.any(state.remaining_B > 0)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        n, cache, state, history, drawn = carry
        position_B = jnp.where(state.remaining_B > 0, state.position_B, -1)
        logits_BV, cache = step(cache, DecodeBatch(state.token_B, position_B, state.page_table_BP))
        so_far = None if history is None else history._replace(length_B=state.position_B + 1)
        new = sample(logits_BV, state.position_B + 1, sampling, so_far)
        token_B, state = advance(state, new)
        if history is not None:
            history = history._replace(token_BS=remember(history.token_BS, state, token_B))
        drawn = drawn._replace(
            token_NB=drawn.token_NB.at[n].set(token_B),
            logprob_NB=drawn.logprob_NB.at[n].set(new.logprob_B),
            sampling_logprob_NB=drawn.sampling_logprob_NB.at[n].set(new.sampling_logprob_B),
        )
        return n + 1, cache, state, history, drawn

    start = (jnp.int32(0), cache, state, jax.tree.map(jnp.asarray, history), drawn)
    _, cache, state, _, drawn = jax.lax.while_loop(unfinished, body, start)
    return cache, state, drawn


@functools.cache
def programs(config: ModelConfig) -> Programs:
    """Return the programs of a model shape, jitted once for each shape and shared by everything that uses it."""

    def prefill(params: Params, bank: Bank | None, cache: KVCache, batch: Any, max_query_len: int) -> Any:
        return forward.prefill(config, params, bank, cache, batch, max_query_len=max_query_len)

    def decode(
        params: Params,
        cache: KVCache,
        state: DecodeState,
        sampling: SamplingArrays,
        history: History | None = None,
        num_steps: int = 1,
    ) -> Any:
        step = functools.partial(forward.decode, config, params)
        return decode_loop(step, cache, state, sampling, history, num_steps, max_steps=num_steps)

    def decode_adapted(
        params: Params,
        bank: Bank,
        pages: Any,
        cache: KVCache,
        state: DecodeState,
        sampling: SamplingArrays,
        history: History | None = None,
        num_steps: int = 1,
    ) -> Any:
        step = functools.partial(forward.decode_adapted, config, params, bank, pages)
        return decode_loop(step, cache, state, sampling, history, num_steps, max_steps=num_steps)

    return Programs(
        jax.jit(prefill, static_argnames="max_query_len", donate_argnames="cache"),
        jax.jit(decode, static_argnames="num_steps", donate_argnames=("cache", "state")),
        jax.jit(decode_adapted, static_argnames="num_steps", donate_argnames=("cache", "state")),
        jax.jit(sample),
    )
