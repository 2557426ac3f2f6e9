"""The forward passes: prefill (with edits), decode (without), decode for all-token adapters, and the training forward.

One definition of a layer serves them all (``models/layer.py``). They differ in its operations, in how attention sees
keys (``models/attention.py``) and in how edits are applied (``adapters/edits.py``). All are pure functions of pytrees;
``config`` and keyword arguments are static.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from preft_jax.adapters.bank import Bank
from preft_jax.adapters.edits import Edits, FoldedEdits, NoEdits, PackedEdits, RowEdits
from preft_jax.config import ModelConfig
from preft_jax.errors import ShapeError
from preft_jax.models import fused
from preft_jax.models.attention import DenseKernel, PagedAttention, dense_attention
from preft_jax.models.batch import DecodeBatch, PrefillBatch
from preft_jax.models.cache import KVCache
from preft_jax.models.layer import Remat, hidden
from preft_jax.models.linear import linear, output_head
from preft_jax.models.params import Params
from preft_jax.models.places import Mixed, Places, packed_places, row_places
from preft_jax.models.plain import PlainLayers
from preft_jax.models.shard import check_not_joined, own_bank, whole_logits
from preft_jax.sampling.device import top_logprobs
from preft_jax.shapes import check_axes


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Return the rotary frequencies, float32 ``[C / 2]`` (Su et al., arXiv 2104.09864).

    The config's scaling, if set, is applied (see ``preft_jax/rope.py``).
    """
    c = config.head_dim
    inv_freq = 1.0 / config.rope_theta ** (np.arange(0, c, 2, dtype=np.float32) / c)
    if config.rope_scaling is not None:
        inv_freq = config.rope_scaling.scaled(inv_freq)
    return inv_freq.astype(np.float32)


def rope_table(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, float32 ``[..., 1, C / 2]``, for positions of any shape."""
    angle = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]


def lm_head(params: Params, h: jax.Array) -> jax.Array:
    """Float32 logits ``[..., V]`` of the normed stream ``h [..., D]``."""
    return linear(h, output_head(params), jnp.float32)


def _cached_hidden(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    tokens_T: jax.Array,
    positions_T: jax.Array,
    places: Places,
    edits: NoEdits | PackedEdits | RowEdits,
) -> tuple[jax.Array, KVCache]:
    """Return the normed stream ``[T, D]`` after the last layer, and the cache."""
    rope = rope_table(config, positions_T)
    if fused.why_not(params) is None:
        layers = fused.FusedLayers(config, rope, cache, places, edits)
        return hidden(layers, params, tokens_T), layers.cache
    attention = PagedAttention(cache, places)
    return hidden(PlainLayers(config, rope, attention, edits), params, tokens_T), attention.cache


def _logits(config: ModelConfig, params: Params, h: jax.Array) -> jax.Array:
    """Return ``lm_head`` of the whole vocabulary, on a device that has a part of the model too."""
    return whole_logits(config, lm_head(params, h))


def _packed_edits(config: ModelConfig, bank: Bank | None, batch: PrefillBatch) -> NoEdits | PackedEdits:
    return NoEdits() if bank is None else PackedEdits(own_bank(config, bank), batch.tiles, batch.edit_mask_TG)


def _prefill_hidden(
    config: ModelConfig, params: Params, bank: Bank | None, cache: KVCache, batch: PrefillBatch, max_query_len: int
) -> tuple[jax.Array, KVCache]:
    return _cached_hidden(
        config, params, cache, batch.tokens_T, batch.positions_T, packed_places(batch, max_query_len),
        _packed_edits(config, bank, batch),
    )  # fmt: skip


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
        config: static. Inside ``jax.shard_map``, what a device has of the model (``models/shard.py``): weights, bank
            and cache are its own then, logits whole; so in all programs here with a cache.
        params: canonical or serving layout.
        bank: rank pages; None computes the plain base model.
        cache: donated by the jitted program.
        batch: see ``PrefillBatch``.
        max_query_len: static bound on the tokens of one request in the batch.

    Returns:
        ``logits_BV`` (float32) of each request's last token in the batch, and the cache.
    """
    h_TD, cache = _prefill_hidden(config, params, bank, cache, batch, max_query_len)
    return _logits(config, params, h_TD[batch.last_token_B]), cache


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
        logits_IV = _logits(config, params, h_ID)
        chosen_I = jnp.take_along_axis(logits_IV, next_I[:, None], axis=1)[:, 0]
        return chosen_I - jax.nn.logsumexp(logits_IV, axis=1), top_logprobs(logits_IV, count)

    size = math.gcd(block, len(next_T))
    blocks = (h_TD.reshape(-1, size, h_TD.shape[1]), next_T.reshape(-1, size))
    logprob_NI, tops_NIE = jax.lax.map(score, blocks)
    tops = jax.tree.map(lambda x: x.reshape(-1, count), tops_NIE)
    return _logits(config, params, h_TD[batch.last_token_B]), cache, logprob_NI.reshape(-1), tops


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
    places = Mixed(packed_places(batch, max_query_len), row_places(rows))
    tokens_T = places.put_rows(jnp.asarray(batch.tokens_T), rows.tokens_B)
    positions_T = places.put_rows(jnp.asarray(batch.positions_T), rows.positions_B)
    h_TD, cache = _cached_hidden(
        config, params, cache, tokens_T, positions_T, places, _packed_edits(config, bank, batch)
    )
    size = rows.tokens_B.shape[0]
    logits = _logits(config, params, jnp.concatenate([h_TD[-size:], h_TD[batch.last_token_B]]))
    return logits[:size], logits[size:], cache


def _decode(
    config: ModelConfig, params: Params, cache: KVCache, batch: DecodeBatch, edits: NoEdits | RowEdits
) -> tuple[jax.Array, KVCache]:
    position_B = jnp.maximum(batch.positions_B, 0)
    h_BD, cache = _cached_hidden(config, params, cache, batch.tokens_B, position_B, row_places(batch), edits)
    return _logits(config, params, h_BD), cache


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
    return _decode(config, params, cache, batch, RowEdits(own_bank(config, bank), pages))


def _check_rows(config: ModelConfig, params: Params, tokens_BS: Any, segments_BS: Any, positions_BS: Any) -> None:
    if not isinstance(config, ModelConfig):
        raise ShapeError(f"config is of type {type(config).__name__}; give the model's ModelConfig, model.config")
    if not isinstance(params, Mapping):
        raise ShapeError(f"params is of type {type(params).__name__}; give the model's parameter tree, model.params")
    check_not_joined(params)
    check_axes("tokens_BS", tokens_BS, "int", B=None, S=None)
    batch, size = tokens_BS.shape
    for name, array in (("segments_BS", segments_BS), ("positions_BS", positions_BS)):
        if array is not None:
            check_axes(name, array, "int", B=batch, S=size)
    if tokens_BS.size and not isinstance(tokens_BS, Tracer):
        low, high = int(tokens_BS.min()), int(tokens_BS.max())
        if low < 0 or high >= config.vocab_size:
            raise ShapeError(
                f"tokens_BS holds the token id {low if low < 0 else high}; the model's vocabulary is 0 to "
                f"{config.vocab_size - 1}"
            )


def edits_of(config: ModelConfig, folded: Any, edit_mask_BSG: Any) -> NoEdits | FoldedEdits:
    """Return how one folded adapter acts on a batch; None and no mask: not at all.

    Raises:
        ShapeError: if ``folded`` is for another number of layers, or one comes without the other.
    """
    if (folded is None) != (edit_mask_BSG is None):
        raise ShapeError("folded and edit_mask_BSG go together: give both, or neither for the base model")
    if folded is None:
        return NoEdits()
    layers = folded.get("layers") if isinstance(folded, Mapping) else None
    if not isinstance(layers, Sequence):
        raise ShapeError(f"folded is of type {type(folded).__name__}; give what fold(adapter) or fold_params returns")
    if len(layers) != config.num_hidden_layers:
        raise ShapeError(f"folded is for {len(layers)} layers and the model has {config.num_hidden_layers}")
    return FoldedEdits(folded, edit_mask_BSG)


def hidden_states(
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
        positions_BS: int32; None counts from 0 in each row, or behind a learned prefix. Packed documents
            restart theirs.
        attention: implementation of ``jax.nn.dot_product_attention``: ``xla`` or ``cudnn``.
        remat: what the backward pass computes again instead of finding it in memory, see ``Remat``.

    Returns:
        The normed stream after the last layer, ``[B, S, D]``, which ``lm_head`` multiplies.

    Raises:
        ShapeError: if an array has other axes than its name says, or another dtype; a token id lies outside the
            vocabulary (of tokens that are not traced); or ``edits`` do not fit.
    """
    _check_rows(config, params, tokens_BS, segments_BS, positions_BS)
    if positions_BS is None:
        front = edits.prefix(0, params["embed"].dtype)
        first = 0 if front is None else front.k_BMF.shape[1]
        place_S = jnp.arange(first, first + tokens_BS.shape[1], dtype=jnp.int32)
        positions_BS = jnp.broadcast_to(place_S, tokens_BS.shape)
    layers = PlainLayers(config, rope_table(config, positions_BS), dense_attention(segments_BS, attention), edits)
    return hidden(layers, params, tokens_BS, remat=remat)


def forward(
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
        positions_BS: int32; None counts from 0 in each row, or behind a learned prefix. Packed documents
            restart theirs.

    Returns:
        float32 ``logits_BSV``.

    Raises:
        ShapeError: as ``hidden_states``; or ``folded`` is for another number of layers, or comes without a mask.
    """
    edits = edits_of(config, folded, edit_mask_BSG)
    h_BSD = hidden_states(config, params, tokens_BS, edits, segments_BS=segments_BS, positions_BS=positions_BS)
    return lm_head(params, h_BSD)
