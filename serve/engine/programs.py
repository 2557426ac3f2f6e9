"""The engine's device programs: pure functions, jitted and compiled by ``serve.engine.runner``.

At most ten, each compiled for one shape: prefill for up to three token counts, decode for one or two row counts, decode
for all-token adapters, drawing of tokens (with and without all that a request may ask for), copying of forked KV pages,
writing of rank pages in two forms, and prefill that scores its tokens. Logits pass from prefill and decode to drawing
in one buffer with as many rows as ever draw together.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels import api
from kernels.types import Array
from preft_jax.adapters.bank import Bank, Pools
from preft_jax.config import ModelConfig
from preft_jax.models import forward
from preft_jax.models.batch import DecodeBatch, PrefillBatch
from preft_jax.models.cache import KVCache
from preft_jax.models.params import Params
from preft_jax.sampling.arrays import SamplingArrays
from preft_jax.sampling.device import History, sample, sample_plain
from preft_jax.sampling.parameters import MAX_LOGPROBS
from preft_jax.sampling.rows import DecodeState, Drawn, advance, remember, tops_if
from preft_jax.shapes import LINEAR_SITES
from serve.store.slabs import slab_width


def compiler_options() -> dict[str, Any] | None:
    """Return what XLA is to be told about these programs.

    On a GPU: cuBLAS does all matrix products. Of a few rows, XLA's own kernels are slower, and add split sums up in
    kernels of their own.
    """
    return {"xla_gpu_enable_triton_gemm": False} if jax.default_backend() == "gpu" else None


class Rows(NamedTuple):
    """Where rows are: what their next token is drawn from.

    int32 ``[B]``: ``token_B`` is each row's newest token, at ``position_B``; ``remaining_B`` counts the tokens still to
    draw (0: the row is done or empty).
    """

    token_B: Array
    position_B: Array
    remaining_B: Array


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


def prefill(
    config: ModelConfig,
    max_query_len: int,
    params: Params,
    bank: Bank | None,
    cache: KVCache,
    logits_RV: jax.Array,
    batch: PrefillBatch,
) -> tuple[KVCache, jax.Array, jax.Array]:
    """See ``forward.prefill``: the cache, the logits in the first rows of ``logits_RV``, and one number to wait for."""
    new_BV, cache = forward.prefill(config, params, bank, cache, batch, max_query_len=max_query_len)
    return cache, _first_rows(logits_RV, new_BV), new_BV[0, 0]


def score(
    config: ModelConfig,
    max_query_len: int,
    params: Params,
    bank: Bank | None,
    cache: KVCache,
    logits_RV: jax.Array,
    batch: PrefillBatch,
    next_T: jax.Array,
) -> Any:
    """``prefill``, then as ``forward.prefill_scored``."""
    new_BV, cache, *scores = forward.prefill_scored(
        config, params, bank, cache, batch, next_T, max_query_len=max_query_len, count=MAX_LOGPROBS
    )
    return cache, _first_rows(logits_RV, new_BV), new_BV[0, 0], scores


def decode(
    config: ModelConfig,
    size: int,
    params: Params,
    cache: KVCache,
    logits_RV: jax.Array,
    rows: Rows,
    plan: RowPlan,
) -> tuple[KVCache, jax.Array]:
    """The logits of one step of the first ``size`` rows, plain base model: there is no adapter argument."""
    new_BV, cache = forward.decode(config, params, cache, _batch(size, rows, plan))
    return cache, _first_rows(logits_RV, new_BV)


def decode_adapted(
    config: ModelConfig,
    size: int,
    params: Params,
    bank: Bank,
    pages: Any,
    cache: KVCache,
    logits_RV: jax.Array,
    rows: Rows,
    plan: RowPlan,
) -> tuple[KVCache, jax.Array]:
    """The same, some rows with an all-token adapter."""
    new_BV, cache = forward.decode_adapted(config, params, bank, pages, cache, _batch(size, rows, plan))
    return cache, _first_rows(logits_RV, new_BV)


def _batch(size: int, rows: Rows, plan: RowPlan) -> DecodeBatch:
    active_B = plan.alive_B & (rows.remaining_B > 0)
    position_B = jnp.where(active_B, rows.position_B, -1)
    return DecodeBatch(*(x[:size] for x in (rows.token_B, position_B, plan.page_table_BP)))


def _first_rows(all_RV: jax.Array, new_BV: jax.Array) -> jax.Array:
    if all_RV.shape == new_BV.shape:
        return new_BV
    return jax.lax.dynamic_update_slice_in_dim(all_RV, new_BV, 0, 0)


def draw(
    logits_RV: jax.Array,
    index_B: jax.Array,
    rows: Rows,
    plan: RowPlan,
    sampling: SamplingArrays,
    history_BS: jax.Array,
) -> tuple[Rows, jax.Array, Drawn]:
    """Draw a token of each row from row ``index_B`` of the logits (samples of one prompt share one).

    Returns:
        The rows, their texts (``History``) and what was drawn, a step of one.
    """
    state = _state(rows, plan)
    logits_BV = logits_RV[index_B]
    position_B = rows.position_B + 1
    new = sample(logits_BV, position_B, sampling, History(history_BS, plan.prompt_len_B, position_B))
    token_B, state = advance(state, new)
    tops = tops_if(plan.want_tops, logits_BV)
    drawn = Drawn(*(x[None] for x in (token_B, new.logprob_B, new.sampling_logprob_B, *tops)))
    return Rows(*state[:3]), remember(history_BS, state, token_B), drawn


def draw_plain(
    logits_RV: jax.Array, index_B: jax.Array, rows: Rows, plan: RowPlan, sampling: SamplingArrays
) -> tuple[Rows, Drawn]:
    """``draw`` for rows that have a temperature and a seed only: nothing makes the host wait."""
    state = _state(rows, plan)
    new = sample_plain(logits_RV, index_B, rows.position_B + 1, state.remaining_B > 0, sampling)
    token_B, state = advance(state, new)
    return Rows(*state[:3]), Drawn(token_B[None], new.logprob_B[None], new.sampling_logprob_B[None])


def _state(rows: Rows, plan: RowPlan) -> DecodeState:
    remaining_B = jnp.where(plan.alive_B, rows.remaining_B, 0)
    return DecodeState(
        *map(jnp.asarray, (rows.token_B, rows.position_B, remaining_B, plan.page_table_BP, plan.stop_BE))
    )


def copy_pages(cache: KVCache, source_M: jax.Array, target_M: jax.Array) -> KVCache:
    """Copy KV pages in every layer; targets past the pool are dropped."""
    return KVCache([pool.at[target_M].set(pool[source_M], mode="drop") for pool in cache.kv])


def write_slabs(bank: Bank, slabs: Mapping[str, Sequence[jax.Array]], page: dict[str, jax.Array]) -> Bank:
    """Write rank pages in all layers: at each site K slabs, each to its page of ``page[site]``, int32 ``[K]``.

    A slab of zeros for page 0 writes nothing: that page is null.
    """
    written = {site: Pools(*api.write_pages(*bank.sites[site], some, page[site])) for site, some in slabs.items()}
    return Bank(bank.sites | written)


def write_whole_slabs(bank: Bank, slabs: Sequence[jax.Array], page: dict[str, jax.Array]) -> Bank:
    """Write rank pages as ``write_slabs`` does, from K slabs that each hold all linears, one after the other."""
    written, at = {}, 0
    for site in LINEAR_SITES:
        pools = bank.sites[site]
        written[site] = Pools(*api.write_pages(*pools, slabs, page[site], at=at))
        _, _, d, r = pools.a_LPDR.shape
        at += slab_width(d, pools.b_LPRF.shape[3], r, pools.a_LPDR.dtype)
    return Bank(bank.sites | written)
