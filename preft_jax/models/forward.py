"""The forward passes: prefill (with edits), decode (without), decode for all-token adapters, and the training forward.

One definition of a layer serves them all; they differ in how attention sees keys (``preft_jax/models/attention.py``)
and in how edits are applied (``preft_jax/adapters/edits.py``). All are pure functions of pytrees; ``config`` and
keyword arguments are static.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from kernels.types import TilePages
from kernels.xla.fused import rms_norm, rotate
from preft_jax.adapters.bank import Bank
from preft_jax.adapters.edits import Edits, FoldedEdits, NoEdits, PackedEdits, RowEdits
from preft_jax.config import ModelConfig
from preft_jax.models import fused
from preft_jax.models.attention import Attention, DenseKernel, MixedAttention, PagedAttention, dense_attention
from preft_jax.models.batch import DecodeBatch, PrefillBatch
from preft_jax.models.cache import NO_SLOT, KVCache
from preft_jax.models.linear import Transposed, linear
from preft_jax.models.params import Params
from preft_jax.sampling.device import top_logprobs

QKV = ("q", "k", "v")

SAVED = "matmul"
"""Name of what is kept with ``remat="cheap"``."""

Remat = Literal["none", "cheap", "full"]
"""What a backward pass computes again: nothing; norms, rotations, attention and activations, but no matrix product with
a weight; or whole layers."""

_POLICIES: Mapping[str, Any] = {
    "cheap": jax.checkpoint_policies.save_only_these_names(SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Return the rotary frequencies, float32 ``[C / 2]`` (Su et al., arXiv 2104.09864).

    Llama 3.1's scaling, if set, divides wavelengths beyond the original context by ``factor`` and blends in between.
    """
    c = config.head_dim
    inv_freq = 1.0 / config.rope_theta ** (np.arange(0, c, 2, dtype=np.float32) / c)
    scaling = config.rope_scaling
    if scaling is not None:
        wavelength = 2 * math.pi / inv_freq
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = (scaling.original_max_position_embeddings / wavelength - low) / (high - low)
        smooth = np.clip(smooth, 0.0, 1.0)
        inv_freq = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    return inv_freq.astype(np.float32)


def rope_table(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, float32 ``[..., 1, C / 2]``, for positions of any shape."""
    angle = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]


def _project_qkv(config: ModelConfig, w: Params, h: jax.Array) -> tuple[jax.Array, ...]:
    if "qkv" not in w:
        return tuple(linear(h, w[s]) + w[f"{s}_bias"] if config.qkv_bias else linear(h, w[s]) for s in QKV)
    fused = linear(h, w["qkv"])
    if config.qkv_bias:
        fused = fused + w["qkv_bias"]
    return tuple(jnp.split(fused, (config.q_size, config.q_size + config.kv_size), axis=-1))


def _project_gate_up(w: Params, h: jax.Array) -> tuple[jax.Array, ...]:
    if "gate_up" not in w:
        return linear(h, w["gate"]), linear(h, w["up"])
    return tuple(jnp.split(linear(h, w["gate_up"]), 2, axis=-1))


def decoder_layer(
    config: ModelConfig,
    layer: int,
    w: Params,
    x: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    attention: Attention,
    edits: Edits,
) -> jax.Array:
    """One layer on a residual stream ``x [..., D]`` with any leading axes.

    Edits act on each linear's output, then on the stream.
    """
    with jax.named_scope("attention"):
        h = rms_norm(x, w["attn_norm"], config.rms_norm_eps)
        q, k, v = edits.apply(layer, QKV, h, _project_qkv(config, w, h))
        q, k, v = (checkpoint_name(y, SAVED) for y in (q, k, v))
        q, k, v = (y.reshape(*y.shape[:-1], -1, config.head_dim) for y in (q, k, v))
        if config.qk_norm:
            q = rms_norm(q, w["q_norm"], config.rms_norm_eps)
            k = rms_norm(k, w["k_norm"], config.rms_norm_eps)
        mixed = attention.attend(layer, rotate(q, rope), rotate(k, rope), v)
        mixed = checkpoint_name(mixed.reshape(*mixed.shape[:-2], -1), SAVED)
        (o,) = edits.apply(layer, ("o",), mixed, (linear(mixed, w["o"]),))
        x = checkpoint_name(x + o, SAVED)
    with jax.named_scope("mlp"):
        h = rms_norm(x, w["mlp_norm"], config.rms_norm_eps)
        gate, up = edits.apply(layer, ("gate", "up"), h, _project_gate_up(w, h))
        gate, up = checkpoint_name(gate, SAVED), checkpoint_name(up, SAVED)
        h = jax.nn.silu(gate) * up
        (down,) = edits.apply(layer, ("down",), h, (linear(h, w["down"]),))
        x = x + down
    (x,) = edits.apply(layer, ("block",), x, (x,))
    return x


def _hidden(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    attention: Attention,
    edits: Edits,
    remat: Remat = "none",
) -> jax.Array:
    """Return the residual stream after the last layer, before the final norm."""
    x = params["embed"][tokens]
    rope = rope_table(config, positions)
    for i, w in enumerate(params["layers"]):

        def layer(x: jax.Array, w: Params = w, i: int = i) -> jax.Array:
            return decoder_layer(config, i, w, x, rope, attention, edits)

        x = layer(x) if remat == "none" else jax.checkpoint(layer, policy=_POLICIES[remat])(x)
    return x


def lm_logits(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """Final norm and output head: float32 logits ``[..., V]`` of ``x [..., D]``."""
    return lm_head(params, rms_norm(x, params["norm"], config.rms_norm_eps))


def lm_head(params: Params, h: jax.Array) -> jax.Array:
    """Float32 logits ``[..., V]`` of the normed stream ``h [..., D]``."""
    head = params["lm_head"] if "lm_head" in params else Transposed(params["embed"])
    return linear(h, head, jnp.float32)


def _fused_hidden(
    config: ModelConfig,
    params: Params,
    bank: Bank | None,
    cache: KVCache,
    tokens_T: jax.Array,
    positions_T: jax.Array,
    places: fused.Packed | fused.Decoding | fused.Mixed,
    *,
    mask_TG: jax.Array,
    tiles: Mapping[str, TilePages],
    rows: RowEdits | None = None,
) -> tuple[jax.Array, KVCache]:
    """Return the normed stream after the last layer, by the fused kernels, and the cache."""
    cos_T1X, sin_T1X = rope_table(config, positions_T)
    batch = fused.Batch(places, mask_TG, cos_T1X[:, 0], sin_T1X[:, 0], tiles)
    h_TD, kv = fused.hidden(config, params, bank, cache.kv, params["embed"][tokens_T], batch, rows=rows)
    return h_TD, KVCache(kv)


def _prefill_hidden(
    config: ModelConfig, params: Params, bank: Bank | None, cache: KVCache, batch: PrefillBatch, max_query_len: int
) -> tuple[jax.Array, KVCache]:
    """Return the normed stream ``[T, D]`` after the last layer, and the cache."""
    if fused.applies(config, params):
        return _fused_hidden(
            config, params, bank, cache, batch.tokens_T, batch.positions_T, _packed(batch, max_query_len),
            mask_TG=batch.edit_mask_TG, tiles=batch.tiles,
        )  # fmt: skip
    attention = _packed_attention(cache, batch, max_query_len)
    edits = NoEdits() if bank is None else PackedEdits(bank, batch.tiles, batch.edit_mask_TG)
    x_TD = _hidden(config, params, batch.tokens_T, batch.positions_T, attention, edits)
    return rms_norm(x_TD, params["norm"], config.rms_norm_eps), attention.cache


def _packed(batch: PrefillBatch, max_query_len: int) -> fused.Packed:
    return fused.Packed(batch.slots_T, batch.page_table_BP, batch.query_start_B1, batch.kv_len_B, max_query_len)


def _packed_attention(cache: KVCache, batch: PrefillBatch, max_query_len: int) -> PagedAttention:
    return PagedAttention(
        cache,
        slots_T=batch.slots_T,
        page_table_BP=batch.page_table_BP,
        query_start_B1=batch.query_start_B1,
        kv_len_B=batch.kv_len_B,
        max_query_len=max_query_len,
    )


def _row_attention(cache: KVCache, rows: DecodeBatch) -> PagedAttention:
    size = rows.tokens_B.shape[0]
    position_B = jnp.maximum(rows.positions_B, 0)
    page_B = jnp.take_along_axis(rows.page_table_BP, (position_B // cache.page_size)[:, None], axis=1)[:, 0]
    slot_B = page_B * cache.page_size + position_B % cache.page_size
    return PagedAttention(
        cache,
        slots_T=jnp.where(rows.positions_B >= 0, slot_B, NO_SLOT),
        page_table_BP=rows.page_table_BP,
        query_start_B1=jnp.arange(size + 1, dtype=jnp.int32),
        kv_len_B=position_B + 1,
        max_query_len=1,
    )


def prefill(
    config: ModelConfig,
    params: Params,
    bank: Bank | None,
    cache: KVCache,
    batch: PrefillBatch,
    *,
    max_query_len: int,
) -> tuple[jax.Array, KVCache]:
    """Compute a packed batch of prompt tokens, edited where the batch's mask says so, and write their KV.

    A token's edit is decided by its mask row and its request's pages alone, so prompts may be cut into spans anywhere,
    and spans may hold generated tokens (recomputed un-edited after preemption).

    Args:
        config: static.
        params: canonical or serving layout.
        bank: rank pages; None computes the plain base model.
        cache: donated by the jitted program.
        batch: see ``PrefillBatch``.
        max_query_len: static bound on the tokens of one request in the batch.

    Returns:
        ``logits_BV`` (float32) of each request's last token in the batch, and the cache.
    """
    h_TD, cache = _prefill_hidden(config, params, bank, cache, batch, max_query_len)
    return lm_head(params, h_TD[batch.last_token_B]), cache


def prefill_scored(
    config: ModelConfig,
    params: Params,
    bank: Bank | None,
    cache: KVCache,
    batch: PrefillBatch,
    next_T: jax.Array,
    *,
    max_query_len: int,
    count: int,
    block: int = 64,
) -> tuple[jax.Array, KVCache, jax.Array, tuple[jax.Array, jax.Array]]:
    """``prefill`` that also scores each token's successor ``next_T``, in blocks of tokens: ``[T, V]`` is never whole.

    Returns:
        As ``prefill``, then the raw log-probability of ``next_T`` (float32 ``[T]``) and the ``count`` most likely
        tokens with theirs, ``[T, count]`` each.
    """
    h_TD, cache = _prefill_hidden(config, params, bank, cache, batch, max_query_len)

    def score(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        h_ID, next_I = block
        logits_IV = lm_head(params, h_ID)
        chosen_I = jnp.take_along_axis(logits_IV, next_I[:, None], axis=1)[:, 0]
        return chosen_I - jax.nn.logsumexp(logits_IV, axis=1), top_logprobs(logits_IV, count)

    size = math.gcd(block, len(next_T))
    blocks = (h_TD.reshape(-1, size, h_TD.shape[1]), next_T.reshape(-1, size))
    logprob_NI, tops_NIE = jax.lax.map(score, blocks)
    tops = jax.tree.map(lambda x: x.reshape(-1, count), tops_NIE)
    return lm_head(params, h_TD[batch.last_token_B]), cache, logprob_NI.reshape(-1), tops


def mixed(
    config: ModelConfig,
    params: Params,
    bank: Bank | None,
    cache: KVCache,
    batch: PrefillBatch,
    rows: DecodeBatch,
    *,
    max_query_len: int,
) -> tuple[jax.Array, jax.Array, KVCache]:
    """``prefill`` of a packed batch and a ``decode`` step of rows in one pass over the weights.

    The last ``B`` tokens of the batch may hold rows: row b stands at token ``T - B + b``. A row is one un-edited token,
    so its mask is false and its tile lists no rank page.

    Args:
        config: static.
        params: canonical or serving layout.
        bank: rank pages; None computes the plain base model.
        cache: donated by the jitted program.
        batch: as in ``prefill``, with padding where rows stand; its sequences are not those of ``rows``.
        rows: as in ``decode``; where one is idle, the batch may have a token of its own.
        max_query_len: as in ``prefill``.

    Returns:
        The logits of each row, of each request's last token in the batch (float32), and the cache.
    """
    at = batch.tokens_T.shape[0] - rows.tokens_B.shape[0]
    is_row_B = rows.positions_B >= 0

    def with_rows(packed_T: jax.Array, row_B: jax.Array) -> jax.Array:
        packed_T = jnp.asarray(packed_T)
        return packed_T.at[at:].set(jnp.where(is_row_B, row_B, packed_T[at:]))

    tokens_T = with_rows(batch.tokens_T, rows.tokens_B)
    positions_T = with_rows(batch.positions_T, rows.positions_B)
    if fused.applies(config, params):
        places = fused.Mixed(_packed(batch, max_query_len), fused.Decoding(rows.page_table_BP, rows.positions_B))
        h_TD, cache = _fused_hidden(
            config, params, bank, cache, tokens_T, positions_T, places, mask_TG=batch.edit_mask_TG, tiles=batch.tiles
        )
    else:
        attention = MixedAttention(
            _packed_attention(cache, batch, max_query_len), _row_attention(cache, rows), is_row_B
        )
        edits = NoEdits() if bank is None else PackedEdits(bank, batch.tiles, batch.edit_mask_TG)
        x_TD = _hidden(config, params, tokens_T, positions_T, attention, edits)
        h_TD, cache = rms_norm(x_TD, params["norm"], config.rms_norm_eps), attention.cache
    logits = lm_head(params, jnp.concatenate([h_TD[at:], h_TD[batch.last_token_B]]))
    return logits[: len(is_row_B)], logits[len(is_row_B) :], cache


def _decode(
    config: ModelConfig, params: Params, cache: KVCache, batch: DecodeBatch, edits: Edits
) -> tuple[jax.Array, KVCache]:
    size = batch.tokens_B.shape[0]
    position_B = jnp.maximum(batch.positions_B, 0)
    if isinstance(edits, NoEdits | RowEdits) and fused.applies(config, params):
        h_BD, cache = _fused_hidden(
            config, params, None, cache, batch.tokens_B, position_B,
            fused.Decoding(batch.page_table_BP, batch.positions_B),
            mask_TG=fused.no_mask(size), tiles={}, rows=edits if isinstance(edits, RowEdits) else None,
        )  # fmt: skip
        return lm_head(params, h_BD), cache
    attention = _row_attention(cache, batch)
    x_BD = _hidden(config, params, batch.tokens_B, position_B, attention, edits)
    return lm_logits(config, params, x_BD), attention.cache


def decode(config: ModelConfig, params: Params, cache: KVCache, batch: DecodeBatch) -> tuple[jax.Array, KVCache]:
    """Decode one token a row with the plain base model: there is no adapter argument, whatever was prefilled.

    Returns:
        ``logits_BV`` (float32) and the cache, which the jitted program donates.
    """
    return _decode(config, params, cache, batch, NoEdits())


def decode_adapted(
    config: ModelConfig, params: Params, bank: Bank, pages: dict[str, jax.Array], cache: KVCache, batch: DecodeBatch
) -> tuple[jax.Array, KVCache]:
    """Decode one token a row, some rows with an all-token adapter; ``pages[site]`` is int32 ``[B, E]``, 0 for none."""
    return _decode(config, params, cache, batch, RowEdits(bank, pages))


def train_hidden(
    config: ModelConfig,
    params: Params,
    tokens_BS: jax.Array,
    edits: Edits,
    *,
    segments_BS: jax.Array | None = None,
    positions_BS: jax.Array | None = None,
    attention: DenseKernel = "xla",
    remat: Remat = "none",
) -> jax.Array:
    """Full-sequence forward without a cache up to the output head, differentiable in ``params`` and ``edits``.

    Args:
        config: static.
        params: canonical or serving layout.
        tokens_BS: int32.
        edits: how adapters act on the batch.
        segments_BS: int32 document ids of packed rows, 0 for padding; None means one document a row, from its start.
        positions_BS: int32; None counts from 0 in each row. Packed documents restart theirs.
        attention: implementation of ``jax.nn.dot_product_attention``: ``xla`` or ``cudnn``.
        remat: what the backward pass computes again instead of finding it in memory, see ``Remat``.

    Returns:
        The normed stream after the last layer, ``[B, S, D]``, which ``lm_head`` multiplies.
    """
    if positions_BS is None:
        positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1], dtype=jnp.int32), tokens_BS.shape)
    attend = dense_attention(segments_BS, attention)
    x_BSD = _hidden(config, params, tokens_BS, positions_BS, attend, edits, remat)
    return rms_norm(x_BSD, params["norm"], config.rms_norm_eps)


def train_forward(
    config: ModelConfig,
    params: Params,
    tokens_BS: jax.Array,
    *,
    folded: Any = None,
    edit_mask_BSG: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
    positions_BS: jax.Array | None = None,
) -> jax.Array:
    """Full-sequence forward without a cache, differentiable in ``params`` and ``folded``.

    Args:
        config: static.
        params: canonical or serving layout.
        tokens_BS: int32.
        folded: ``fold(adapter)``; None for the base model.
        edit_mask_BSG: bool, which tokens are edited; required with ``folded``.
        segments_BS: int32 document ids of packed rows, 0 for padding; None means one document a row.
        positions_BS: int32; None counts from 0 in each row. Packed documents restart theirs.

    Returns:
        float32 ``logits_BSV``.
    """
    if (folded is None) != (edit_mask_BSG is None):
        raise ValueError("folded and edit_mask_BSG go together: give both, or neither for the base model")
    edits = NoEdits() if folded is None or edit_mask_BSG is None else FoldedEdits(folded, edit_mask_BSG)
    h_BSD = train_hidden(config, params, tokens_BS, edits, segments_BS=segments_BS, positions_BS=positions_BS)
    return lm_head(params, h_BSD)
