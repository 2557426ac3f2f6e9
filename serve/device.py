"""The engine's device programs: pure functions, jitted and compiled by ``serve.runner``.

At most ten, each compiled for one shape: prefill for one or two token counts, decode for one or two row counts, decode
for all-token adapters, drawing of first tokens, copying of forked KV pages, writing of rank pages (linears and
``block`` apart), and prefill that scores its tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.types import PagePool
from preft_jax import forward
from preft_jax.bank import Bank
from preft_jax.batch import PrefillBatch
from preft_jax.cache import KVCache
from preft_jax.config import ModelConfig
from preft_jax.model import Params
from preft_jax.programs import DecodeState, Drawn, decode_loop, tops_if
from preft_jax.sampling import MAX_LOGPROBS, History, SamplingArrays, sample


class Slab(NamedTuple):
    """One rank page of an adapter in all layers at one site: ``a_LDR``, ``c_LR`` (float32), ``b_LRF``."""

    a_LDR: Any
    c_LR: Any
    b_LRF: Any


def prefill(
    config: ModelConfig, max_query_len: int, params: Params, bank: Bank | None, cache: KVCache, batch: PrefillBatch
) -> tuple[jax.Array, KVCache]:
    """See ``forward.prefill``."""
    return forward.prefill(config, params, bank, cache, batch, max_query_len=max_query_len)


def score(
    config: ModelConfig,
    max_query_len: int,
    params: Params,
    bank: Bank | None,
    cache: KVCache,
    batch: PrefillBatch,
    next_T: jax.Array,
) -> Any:
    """See ``forward.prefill_scored``."""
    return forward.prefill_scored(
        config, params, bank, cache, batch, next_T, max_query_len=max_query_len, count=MAX_LOGPROBS
    )


def draw(
    logits_BV: jax.Array, row_B: jax.Array, sampling: SamplingArrays, history: History, want_tops: jax.Array
) -> Drawn:
    """Draw a token from row ``row_B[i]`` of the logits, for each i: samples of one prompt share a row."""
    logits_BV = logits_BV[row_B]
    new = sample(logits_BV, history.length_B, sampling, history)
    tops = tops_if(want_tops, logits_BV)
    return Drawn(*(x[None] for x in (new.token_B, new.logprob_B, new.sampling_logprob_B, *tops)))


def decode(
    config: ModelConfig,
    max_steps: int,
    params: Params,
    cache: KVCache,
    state: DecodeState,
    sampling: SamplingArrays,
    history: History,
    num_steps: jax.Array,
    want_tops: jax.Array,
) -> tuple[KVCache, Drawn]:
    """Up to ``num_steps`` steps of the plain base model: there is no adapter argument."""
    step = functools.partial(forward.decode, config, params)
    cache, _, drawn = decode_loop(
        step, cache, state, sampling, history, num_steps, max_steps=max_steps, want_tops=want_tops
    )
    return cache, drawn


def decode_adapted(
    config: ModelConfig,
    max_steps: int,
    params: Params,
    bank: Bank,
    pages: Any,
    cache: KVCache,
    state: DecodeState,
    sampling: SamplingArrays,
    history: History,
    num_steps: jax.Array,
    want_tops: jax.Array,
) -> tuple[KVCache, Drawn]:
    """The same, some rows with an all-token adapter."""
    step = functools.partial(forward.decode_adapted, config, params, bank, pages)
    cache, _, drawn = decode_loop(
        step, cache, state, sampling, history, num_steps, max_steps=max_steps, want_tops=want_tops
    )
    return cache, drawn


def copy_pages(cache: KVCache, source_M: jax.Array, target_M: jax.Array) -> KVCache:
    """Copy KV pages in every layer; targets past the pool are dropped."""
    return KVCache([pool.at[target_M].set(pool[source_M], mode="drop") for pool in cache.kv])


def write_slabs(bank: Bank, slabs: dict[str, Slab], page: dict[str, jax.Array]) -> Bank:
    """Write one rank page of an adapter at several sites, in all layers; where it has none, zeros to the null page."""
    layers = []
    for i, pools in enumerate(bank.layers):
        new = dict(pools)
        for site, slab in slabs.items():
            pool, at = pools[site], page[site]
            new[site] = PagePool(
                pool.a_PDR.at[at].set(slab.a_LDR[i].astype(pool.a_PDR.dtype)),
                pool.c_PR.at[at].set(slab.c_LR[i].astype(jnp.float32)),
                pool.b_PRF.at[at].set(slab.b_LRF[i].astype(pool.b_PRF.dtype)),
            )
        layers.append(new)
    return Bank(layers)
