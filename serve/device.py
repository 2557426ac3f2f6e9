"""The engine's device programs: pure functions, jitted and compiled by ``serve.runner``.

At most ten, each compiled for one shape: prefill for up to three token counts, decode for one or two row counts, decode
for all-token adapters, drawing of first tokens, copying of forked KV pages, writing of rank pages in two forms, and
prefill that scores its tokens.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.types import Array
from preft_jax import forward
from preft_jax.bank import Bank, PackedSite, Pools
from preft_jax.batch import PrefillBatch
from preft_jax.cache import KVCache
from preft_jax.config import ModelConfig
from preft_jax.model import Params
from preft_jax.programs import DecodeState, Drawn, decode_step, tops_if
from preft_jax.sampling import MAX_LOGPROBS, History, SamplingArrays, sample
from preft_jax.shapes import LINEAR_SITES


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


class Rows(NamedTuple):
    """Where decode steps left their rows: what the next step of the same rows begins with.

    int32 ``token_B``, ``position_B`` and ``remaining_B`` as in ``DecodeState``; ``history_BS`` as in ``History``.
    """

    token_B: Array
    position_B: Array
    remaining_B: Array
    history_BS: Array


class RowPlan(NamedTuple):
    """What the host says of rows for all steps of a call.

    ``alive_B`` bool: false where the host has ended a row, whatever the device thinks. int32 ``page_table_BP``,
    ``stop_BE`` and ``prompt_len_B``, and bool ``want_tops``: as in ``DecodeState``, ``History`` and ``tops_if``.
    """

    alive_B: Array
    page_table_BP: Array
    stop_BE: Array
    prompt_len_B: Array
    want_tops: Array


def decode(
    config: ModelConfig, params: Params, cache: KVCache, rows: Rows, plan: RowPlan, sampling: SamplingArrays
) -> tuple[KVCache, Rows, Drawn]:
    """One step of the plain base model: there is no adapter argument."""
    return _decode(functools.partial(forward.decode, config, params), cache, rows, plan, sampling)


def decode_adapted(
    config: ModelConfig,
    params: Params,
    bank: Bank,
    pages: Any,
    cache: KVCache,
    rows: Rows,
    plan: RowPlan,
    sampling: SamplingArrays,
) -> tuple[KVCache, Rows, Drawn]:
    """The same, some rows with an all-token adapter."""
    step = functools.partial(forward.decode_adapted, config, params, bank, pages)
    return _decode(step, cache, rows, plan, sampling)


def _decode(
    step: Any, cache: KVCache, rows: Rows, plan: RowPlan, sampling: SamplingArrays
) -> tuple[KVCache, Rows, Drawn]:
    state = DecodeState(
        rows.token_B, rows.position_B, jnp.where(plan.alive_B, rows.remaining_B, 0), plan.page_table_BP, plan.stop_BE
    )
    history = History(rows.history_BS, plan.prompt_len_B, rows.position_B)
    cache, state, history, drawn = decode_step(step, cache, state, sampling, history, want_tops=plan.want_tops)
    assert history is not None
    after = Rows(state.token_B, state.position_B, state.remaining_B, history.token_BS)
    return cache, after, jax.tree.map(lambda x: x[None], drawn)


def copy_pages(cache: KVCache, source_M: jax.Array, target_M: jax.Array) -> KVCache:
    """Copy KV pages in every layer; targets past the pool are dropped."""
    return KVCache([pool.at[target_M].set(pool[source_M], mode="drop") for pool in cache.kv])


def slab(edit: PackedSite, n: int, dtype: Any) -> np.ndarray:
    """Return rank page ``n`` of an adapter at one site as one array ``[L, W]``: A, B, and the bits of the float32 c."""
    layers, dtype = len(edit.a), np.dtype(dtype)
    a, b = (array[:, n].reshape(layers, -1).astype(dtype) for array in (edit.a, edit.b))
    return np.concatenate([a, b, np.ascontiguousarray(edit.c[:, n], np.float32).view(dtype)], axis=1)


def slab_width(d: int, f: int, rank: int, dtype: Any) -> int:
    """Return the width of a site's slabs."""
    return rank * (d + f) + rank * 4 // np.dtype(dtype).itemsize


def write_slabs(bank: Bank, slabs: Mapping[str, Sequence[jax.Array]], page: dict[str, jax.Array]) -> Bank:
    """Write rank pages in all layers: at each site K slabs, each to its page of ``page[site]``, int32 ``[K]``.

    A slab of zeros for page 0 writes nothing: that page is null.
    """

    def write(pools: Pools, slabs: Sequence[jax.Array], page_K: jax.Array) -> Pools:
        layers, _, d, r = pools.a_LPDR.shape
        f = pools.b_LPRF.shape[3]
        for k, slab_LW in enumerate(slabs):
            a, b, c = jnp.split(slab_LW, (r * d, r * (d + f)), axis=1)
            c = jax.lax.bitcast_convert_type(c.reshape(layers, r, -1), jnp.float32)
            new = a.reshape(layers, 1, d, r), c.reshape(layers, 1, r), b.reshape(layers, 1, r, f)
            # One slice after the other: a scatter of them all takes three times as long on a GPU.
            pools = Pools(
                *(jax.lax.dynamic_update_slice_in_dim(p, x, page_K[k], 1) for p, x in zip(pools, new, strict=True))
            )
        return pools

    written = {site: write(bank.sites[site], some, page[site]) for site, some in slabs.items()}
    return Bank(bank.sites | written)


def write_whole_slabs(bank: Bank, slabs: Sequence[jax.Array], page: dict[str, jax.Array]) -> Bank:
    """Write rank pages as ``write_slabs`` does, from K slabs that each hold all linears, one after the other."""
    widths = []
    for site in LINEAR_SITES:
        pools = bank.sites[site]
        _, _, d, r = pools.a_LPDR.shape
        widths.append(slab_width(d, pools.b_LPRF.shape[3], r, pools.a_LPDR.dtype))
    parts = [jnp.split(slab_LW, list(itertools.accumulate(widths))[:-1], axis=1) for slab_LW in slabs]
    return write_slabs(bank, {site: [part[i] for part in parts] for i, site in enumerate(LINEAR_SITES)}, page)
