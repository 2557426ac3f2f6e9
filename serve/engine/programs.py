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
from preft_jax.sampling.device import sample, sample_plain
from preft_jax.sampling.logits import History
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


class Slots(NamedTuple):
    """Where the sequences that run stand, on the device: one place for each, int32 ``[S]``.

    ``token_S`` is the newest token, at ``position_S``; ``remaining_S`` counts the tokens still to draw (0: it is done).
    Drawing writes them and decoding reads them, so that a call can start before the host knows what the one before it
    draws.
    """

    token_S: Array
    position_S: Array
    remaining_S: Array


class Rows(NamedTuple):
    """Rows of a decode step.

    int32 ``slot_B`` and ``page_table_BP``; bool ``alive_B``, false where a row is empty or was ended by the host.
    """

    slot_B: Array
    alive_B: Array
    page_table_BP: Array


class Picks(NamedTuple):
    """Rows that draw, and from which row of the logits.

    int32 ``[B]``: ``index_B`` into the logits (samples of one prompt share a row), and ``slot_B``, which is written.
    Rows of ``alive_B`` alone draw. Those of ``fresh_B`` begin: their newest token is at ``position_B`` and
    ``remaining_B`` are to be drawn; others go on from their slot. ``stop_BE`` and ``prompt_len_B`` as in
    ``DecodeState`` and ``History``; bool ``want_tops``: whether the most likely tokens are wanted.
    """

    index_B: Array
    slot_B: Array
    alive_B: Array
    fresh_B: Array
    position_B: Array
    remaining_B: Array
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


def mixed(
    config: ModelConfig,
    size: int,
    max_query_len: int,
    params: Params,
    bank: Bank | None,
    cache: KVCache,
    logits_RV: jax.Array,
    slots: Slots,
    rows: Rows,
    batch: PrefillBatch,
) -> tuple[KVCache, jax.Array]:
    """``prefill`` and one step of ``decode`` together; logits of the ``size`` rows stand first, then the chunks'."""
    rows_BV, chunks_BV, cache = forward.mixed(
        config, params, bank, cache, batch, _batch(size, slots, rows), max_query_len=max_query_len
    )
    return cache, _first_rows(logits_RV, jnp.concatenate([rows_BV, chunks_BV]))


def decode(
    config: ModelConfig,
    size: int,
    params: Params,
    cache: KVCache,
    logits_RV: jax.Array,
    slots: Slots,
    rows: Rows,
) -> tuple[KVCache, jax.Array]:
    """The logits of one step of the first ``size`` rows, plain base model: there is no adapter argument."""
    new_BV, cache = forward.decode(config, params, cache, _batch(size, slots, rows))
    return cache, _first_rows(logits_RV, new_BV)


def decode_adapted(
    config: ModelConfig,
    size: int,
    params: Params,
    bank: Bank,
    pages: Any,
    cache: KVCache,
    logits_RV: jax.Array,
    slots: Slots,
    rows: Rows,
) -> tuple[KVCache, jax.Array]:
    """The same, some rows with an all-token adapter."""
    new_BV, cache = forward.decode_adapted(config, params, bank, pages, cache, _batch(size, slots, rows))
    return cache, _first_rows(logits_RV, new_BV)


def _batch(size: int, slots: Slots, rows: Rows) -> DecodeBatch:
    slot_B, alive_B = jnp.asarray(rows.slot_B)[:size], jnp.asarray(rows.alive_B)[:size]
    token_B, position_B, remaining_B = (jnp.asarray(array).at[slot_B].get(mode="clip") for array in slots)
    position_B = jnp.where(alive_B & (remaining_B > 0), position_B, -1)
    return DecodeBatch(token_B, position_B, jnp.asarray(rows.page_table_BP)[:size])


def _first_rows(all_RV: jax.Array, new_BV: jax.Array) -> jax.Array:
    if all_RV.shape == new_BV.shape:
        return new_BV
    return jax.lax.dynamic_update_slice_in_dim(all_RV, new_BV, 0, 0)


def draw(
    logits_RV: jax.Array,
    slots: Slots,
    text_SL: jax.Array,
    picks: Picks,
    sampling: SamplingArrays,
    text_BL: jax.Array,
) -> tuple[Slots, jax.Array, Drawn]:
    """Draw a token of each row, whatever its request asks for.

    Args:
        logits_RV: of the call before.
        slots: where sequences stand.
        text_SL: int32, the texts of sequences in their slots (``History``), for penalties.
        picks: who draws.
        sampling: how.
        text_BL: int32, texts of the rows that begin, zeros for others.

    Returns:
        The slots, their texts and what was drawn, a step of one.
    """
    state = _state(slots, picks)
    slot_B = jnp.asarray(picks.slot_B)
    text_BL = jnp.where(jnp.asarray(picks.fresh_B)[:, None], text_BL, text_SL.at[slot_B].get(mode="clip"))
    logits_BV = logits_RV[picks.index_B]
    position_B = state.position_B + 1
    new = sample(logits_BV, position_B, sampling, History(text_BL, picks.prompt_len_B, position_B))
    token_B, state = advance(state, new)
    tops = tops_if(picks.want_tops, logits_BV)
    drawn = Drawn(*(x[None] for x in (token_B, new.logprob_B, new.sampling_logprob_B, *tops)))
    text_SL = text_SL.at[slot_B].set(remember(text_BL, state, token_B), mode="drop")
    return _keep(slots, picks, state), text_SL, drawn


def draw_plain(logits_RV: jax.Array, slots: Slots, picks: Picks, sampling: SamplingArrays) -> tuple[Slots, Drawn]:
    """``draw`` for rows that have a temperature and a seed only: nothing makes the host wait."""
    state = _state(slots, picks)
    new = sample_plain(logits_RV, picks.index_B, state.position_B + 1, state.remaining_B > 0, sampling)
    token_B, state = advance(state, new)
    drawn = Drawn(token_B[None], new.logprob_B[None], new.sampling_logprob_B[None])
    return _keep(slots, picks, state), drawn


def _state(slots: Slots, picks: Picks) -> DecodeState:
    slot_B, fresh_B = jnp.asarray(picks.slot_B), jnp.asarray(picks.fresh_B)
    token_B, position_B, remaining_B = (jnp.asarray(array).at[slot_B].get(mode="clip") for array in slots)
    position_B = jnp.where(fresh_B, picks.position_B, position_B)
    remaining_B = jnp.where(fresh_B, picks.remaining_B, remaining_B)
    return DecodeState(token_B, position_B, jnp.where(picks.alive_B, remaining_B, 0), jnp.asarray(picks.stop_BE))


def _keep(slots: Slots, picks: Picks, state: DecodeState) -> Slots:
    """Write rows that drew to their slots; the slots of others stay, since they may be others' by now."""
    slot_B = jnp.where(picks.alive_B, picks.slot_B, len(slots.token_S))
    new = (state.token_B, state.position_B, state.remaining_B)
    return Slots(*(jnp.asarray(old).at[slot_B].set(x, mode="drop") for old, x in zip(slots, new, strict=True)))


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
