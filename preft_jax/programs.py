"""The jitted programs of one model shape: prefill, decode, decode for all-token adapters, and sampling of first tokens.

Each is compiled once for each bucket of lengths. Caches are donated and updated in place; a bank is only read.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.types import Array
from preft_jax import forward
from preft_jax.bank import Bank
from preft_jax.batch import DecodeBatch
from preft_jax.cache import KVCache
from preft_jax.config import ModelConfig
from preft_jax.model import Params
from preft_jax.sampling import SamplingArrays, sample


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
    """Tokens of several decode steps ``[steps, B]`` with their log-probabilities; -1 where a row drew nothing."""

    token_NB: jax.Array
    logprob_NB: jax.Array
    sampling_logprob_NB: jax.Array


class Programs(NamedTuple):
    """Jitted functions of one model shape.

    ``prefill(params, bank, cache, batch, max_query_len=...)``
    ``decode(params, cache, state, sampling, num_steps=...)``
    ``decode_adapted(params, bank, pages, cache, state, sampling, num_steps=...)``
    ``sample(logits, positions, sampling)``
    """

    prefill: Any
    decode: Any
    decode_adapted: Any
    sample: Any


def _decode_loop(step: Any, cache: KVCache, state: DecodeState, sampling: SamplingArrays, num_steps: int) -> Any:
    """Run decode steps and draw a token after each, until ``num_steps`` are done or no row has tokens left to draw."""
    size = state.token_B.shape[0]
    drawn = Drawn(
        jnp.full((num_steps, size), -1, jnp.int32),
        jnp.zeros((num_steps, size), jnp.float32),
        jnp.zeros((num_steps, size), jnp.float32),
    )

    def unfinished(carry: tuple[jax.Array, KVCache, DecodeState, Drawn]) -> jax.Array:
        n, _, state, _ = carry
        return (n < num_steps) & jnp.any(state.remaining_B > 0)

    def body(carry: tuple[jax.Array, KVCache, DecodeState, Drawn]) -> tuple[jax.Array, KVCache, DecodeState, Drawn]:
        n, cache, state, drawn = carry
        active_B = state.remaining_B > 0
        batch = DecodeBatch(state.token_B, jnp.where(active_B, state.position_B, -1), state.page_table_BP)
        logits_BV, cache = step(cache, batch)
        new = sample(logits_BV, state.position_B + 1, sampling)
        token_B = jnp.where(active_B, new.token_B, -1)
        drawn = Drawn(
            drawn.token_NB.at[n].set(token_B),
            drawn.logprob_NB.at[n].set(new.logprob_B),
            drawn.sampling_logprob_NB.at[n].set(new.sampling_logprob_B),
        )
        stopped_B = jnp.any(token_B[:, None] == state.stop_BE, axis=1)
        state = state._replace(
            token_B=jnp.where(active_B, token_B, state.token_B),
            position_B=state.position_B + active_B.astype(jnp.int32),
            remaining_B=jnp.where(active_B & ~stopped_B, state.remaining_B - 1, 0),
        )
        return n + 1, cache, state, drawn

    _, cache, state, drawn = jax.lax.while_loop(unfinished, body, (jnp.int32(0), cache, state, drawn))
    return cache, state, drawn


@functools.cache
def programs(config: ModelConfig) -> Programs:
    """Return the programs of a model shape, jitted once for each shape and shared by everything that uses it."""

    def prefill(params: Params, bank: Bank | None, cache: KVCache, batch: Any, max_query_len: int) -> Any:
        return forward.prefill(config, params, bank, cache, batch, max_query_len=max_query_len)

    def decode(params: Params, cache: KVCache, state: DecodeState, sampling: SamplingArrays, num_steps: int) -> Any:
        step = functools.partial(forward.decode, config, params)
        return _decode_loop(step, cache, state, sampling, num_steps)

    def decode_adapted(
        params: Params,
        bank: Bank,
        pages: Any,
        cache: KVCache,
        state: DecodeState,
        sampling: SamplingArrays,
        num_steps: int,
    ) -> Any:
        step = functools.partial(forward.decode_adapted, config, params, bank, pages)
        return _decode_loop(step, cache, state, sampling, num_steps)

    return Programs(
        jax.jit(prefill, static_argnames="max_query_len", donate_argnames="cache"),
        jax.jit(decode, static_argnames="num_steps", donate_argnames=("cache", "state")),
        jax.jit(decode_adapted, static_argnames="num_steps", donate_argnames=("cache", "state")),
        jax.jit(sample),
    )
