"""The engine's device programs: pure functions, jitted and compiled by ``serve.engine.runner``.

Each is compiled for one shape: prefill for a few token counts, decode for a few row counts, with and without all-token
adapters, both in one for a few more (mixed), drawing of tokens (with and without all that a request may ask for),
copying of forked KV pages, writing of rank pages and of learned prefixes, and prefill that scores its tokens. Those
that hand KV over are in ``serve.engine.kv_pages``. Logits pass from prefill and decode to drawing in one buffer with as
many rows as ever draw together.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels import api
from kernels.types import Array
from kernels.xla.pages import slab_width
from preft_jax.adapters.bank import Bank, Pools
from preft_jax.config import ModelConfig
from preft_jax.device.packed import Packed
from preft_jax.models import forward
from preft_jax.models.batch import DecodeBatch, PrefillBatch
from preft_jax.models.cache import KVCache, write_kv
from preft_jax.models.params import Params
from preft_jax.sampling.arrays import PlainSampling, SamplingArrays
from preft_jax.sampling.device import sample, sample_plain
from preft_jax.sampling.logits import History
from preft_jax.sampling.parameters import MAX_LOGPROBS
from preft_jax.sampling.rows import DecodeState, Drawn, advance, remember, tops_if
from preft_jax.shapes import BANK_SITES, LINEAR_SITES, PREFIX


def compiler_options() -> dict[str, Any] | None:
    """Return what XLA is to be told about these programs.

    On a GPU: cuBLAS does all matrix products. Of a few rows, XLA's own kernels are slower, and add split sums up in
    kernels of their own.
    """
    return {"xla_gpu_enable_triton_gemm": False} if jax.default_backend() == "gpu" else None


class Slots(NamedTuple):
    """Where the sequences that run stand, on the device: a row for each in one array, int32 ``[S, 3]``.

    A row is the newest token, its position, and the tokens still to draw (0: it is done). Drawing writes them and
    decoding reads them, so that a call can start before the host knows what the one before it draws. One array takes
    one gather and one scatter.
    """

    row_S3: Array

    @staticmethod
    def of(token_S: Array, position_S: Array, remaining_S: Array) -> "Slots":
        """Return slots that hold this."""
        return Slots(jnp.stack([token_S, position_S, remaining_S], axis=1))

    @staticmethod
    def empty(count: int) -> "Slots":
        """Return slots without sequences."""
        return Slots(jnp.zeros((count, 3), jnp.int32))

    def holds(self, slot_B: Array) -> jax.Array:
        """Return bool ``[B]``: whether there is such a slot."""
        return jnp.asarray(slot_B) < len(self.row_S3)

    def at(self, slot_B: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return token, position and remaining of slots, each ``[B]``; of the last one for those there are not."""
        row_B3 = jnp.asarray(self.row_S3).at[slot_B].get(mode="clip")
        return row_B3[:, 0], row_B3[:, 1], row_B3[:, 2]

    def put(self, slot_B: Array, token_B: jax.Array, position_B: jax.Array, remaining_B: jax.Array) -> "Slots":
        """Write rows to slots, no slot twice; rows whose slot there is not are dropped, however many."""
        count = len(self.row_S3)
        # Each of these gets a number of its own, so that no two rows are written to one place.
        beyond_B = count + jnp.arange(len(slot_B), dtype=jnp.int32)
        slot_B = jnp.where(self.holds(slot_B), slot_B, beyond_B)
        new_B3 = jnp.stack([token_B, position_B, remaining_B], axis=1)
        return Slots(jnp.asarray(self.row_S3).at[slot_B].set(new_B3, mode="drop", unique_indices=True))


class Rows(NamedTuple):
    """Rows of a decode step.

    int32 ``slot_B``, beyond the slots where a row is empty or was ended by the host, and ``page_table_BP``.
    """

    slot_B: Array
    page_table_BP: Array


class Picks(NamedTuple):
    """Rows that draw, and from which row of the logits.

    int32 ``index_B`` into the logits (samples of one prompt share a row), the columns of ``row_B5``, and ``stop_BE`` as
    in ``DecodeState``. What a kernel reads as it is stands apart; the columns go to the device as one array.
    """

    index_B: Array
    row_B5: Array
    stop_BE: Array

    @property
    def slot(self) -> Array:
        """Return which slot is written, int32 ``[B]``; beyond the slots: the row does not draw."""
        return self.row_B5[:, 0]

    @property
    def position(self) -> Array:
        """Return where the newest token of a row stands that begins; -1: the row goes on from its slot."""
        return self.row_B5[:, 1]

    @property
    def remaining(self) -> Array:
        """Return how many tokens a row that begins is to draw."""
        return self.row_B5[:, 2]

    @property
    def prompt_len(self) -> Array:
        """Return the lengths of prompts, as in ``History``."""
        return self.row_B5[:, 3]

    @property
    def want_tops(self) -> Array:
        """Return whether the most likely tokens are wanted: 0 or 1."""
        return self.row_B5[:, 4]


def prefill(
    config: ModelConfig,
    max_query_len: int,
    params: Params,
    bank: Bank | None,
    cache: KVCache,
    logits_RV: jax.Array,
    packed: Packed,
) -> tuple[KVCache, jax.Array, jax.Array]:
    """See ``forward.prefill``: the cache, the logits in the first rows of ``logits_RV``, and one number to wait for.

    ``packed`` holds a ``PrefillBatch``.
    """
    batch: PrefillBatch = packed.unpack()
    new_BV, cache = forward.prefill(config, params, bank, cache, batch, max_query_len=max_query_len)
    return cache, _first_rows(logits_RV, new_BV), new_BV[0, 0]


def score(
    config: ModelConfig,
    max_query_len: int,
    params: Params,
    bank: Bank | None,
    cache: KVCache,
    logits_RV: jax.Array,
    packed: Packed,
) -> Any:
    """``prefill``, then as ``forward.prefill_scored``; ``packed`` holds a ``PrefillBatch`` and ``next_T``."""
    batch, next_T = packed.unpack()
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
    packed: Packed,
) -> tuple[KVCache, jax.Array]:
    """``prefill`` and one step of ``decode`` together; logits of the ``size`` rows stand first, then the chunks'.

    ``packed`` holds ``Rows`` and a ``PrefillBatch``.
    """
    rows, batch = packed.unpack()
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
    slot_B = jnp.asarray(rows.slot_B)[:size]
    token_B, position_B, remaining_B = slots.at(slot_B)
    position_B = jnp.where(slots.holds(slot_B) & (remaining_B > 0), position_B, -1)
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
    slot_B = jnp.asarray(picks.slot)
    text_BL = jnp.where(jnp.asarray(picks.position >= 0)[:, None], text_BL, text_SL.at[slot_B].get(mode="clip"))
    logits_BV = logits_RV[picks.index_B]
    position_B = state.position_B + 1
    new = sample(logits_BV, position_B, sampling, History(text_BL, picks.prompt_len, position_B))
    token_B, state = advance(state, new)
    tops = tops_if(jnp.any(picks.want_tops != 0), logits_BV)
    drawn = Drawn(*(x[None] for x in (token_B, new.logprob_B, new.sampling_logprob_B, *tops)))
    text_SL = text_SL.at[slot_B].set(remember(text_BL, state, token_B), mode="drop")
    return _keep(slots, slot_B, state), text_SL, drawn


def draw_plain(logits_RV: jax.Array, slots: Slots, picks: Picks, sampling: PlainSampling) -> tuple[Slots, Drawn]:
    """``draw`` for rows that have a temperature and a seed only: nothing makes the host wait."""
    state = _state(slots, picks)
    new = sample_plain(logits_RV, picks.index_B, state.position_B + 1, state.remaining_B > 0, sampling)
    token_B, state = advance(state, new)
    drawn = Drawn(token_B[None], new.logprob_B[None], new.sampling_logprob_B[None])
    return _keep(slots, jnp.asarray(picks.slot), state), drawn


def _state(slots: Slots, picks: Picks) -> DecodeState:
    slot_B, fresh_B = jnp.asarray(picks.slot), jnp.asarray(picks.position >= 0)
    token_B, position_B, remaining_B = slots.at(slot_B)
    position_B = jnp.where(fresh_B, picks.position, position_B)
    remaining_B = jnp.where(fresh_B, picks.remaining, remaining_B)
    return DecodeState(token_B, position_B, jnp.where(slots.holds(slot_B), remaining_B, 0), jnp.asarray(picks.stop_BE))


def _keep(slots: Slots, slot_B: jax.Array, state: DecodeState) -> Slots:
    """Write rows that drew to their slots; the slots of others stay, since they may be others' by now."""
    return slots.put(slot_B, state.token_B, state.position_B, state.remaining_B)


def copy_pages(cache: KVCache, source_M: jax.Array, target_M: jax.Array) -> KVCache:
    """Copy KV pages in every layer; targets past the pool are dropped."""
    return KVCache([pool.at[target_M].set(pool[source_M], mode="drop") for pool in cache.kv])


def write_prefix(
    config: ModelConfig, dtype: Any, bank: Bank, cache: KVCache, page_E: jax.Array, slot_EI: jax.Array
) -> KVCache:
    """Write learned keys and values to the KV cache, in every layer.

    ``page_E``: rank pages at ``prefix``; ``slot_EI``: the slot of each of their positions, past the pools where it is
    not written. ``dtype``: of keys and values that a layer computes.
    """
    pools, heads = bank.sites[PREFIX], (-1, config.num_key_value_heads, config.head_dim)
    written = []
    for layer, pool in enumerate(cache.kv):
        k_TKC = pools.a_LPDR[layer, page_E].swapaxes(1, 2).reshape(heads).astype(dtype)
        v_TKC = pools.b_LPRF[layer, page_E].reshape(heads).astype(dtype)
        written.append(write_kv(pool, slot_EI.reshape(-1), k_TKC, v_TKC))
    return KVCache(written)


def _row_of(bank: Bank) -> dict[str, int]:
    """Return which row of page ids is a site's; a jitted program's dicts are sorted by name."""
    return {site: row for row, site in enumerate(site for site in BANK_SITES if site in bank.sites)}


def write_slabs(bank: Bank, slabs: Mapping[str, Sequence[jax.Array]], page_SK: jax.Array) -> Bank:
    """Write rank pages in all layers: at each site K slabs, each to its page of ``page_SK``, int32.

    ``page_SK`` has a row for each site of the bank, in the order of ``BANK_SITES``. A slab of zeros for page 0 writes
    nothing: that page is null.
    """
    written = {
        site: Pools(*api.write_pages(*bank.sites[site], slabs[site], page_SK, row=row))
        for site, row in _row_of(bank).items()
        if site in slabs
    }
    return Bank(bank.sites | written)


def write_whole_slabs(bank: Bank, slabs: Sequence[jax.Array], page_SK: jax.Array) -> Bank:
    """Write rank pages as ``write_slabs`` does, from K slabs that each hold all linears, one after the other."""
    written, at = {}, 0
    rows = _row_of(bank)
    for site in LINEAR_SITES:
        pools = bank.sites[site]
        written[site] = Pools(*api.write_pages(*pools, slabs, page_SK, row=rows[site], at=at))
        _, _, d, r = pools.a_LPDR.shape
        at += slab_width(d, pools.b_LPRF.shape[3], r, slabs[0].dtype)
    return Bank(bank.sites | written)
