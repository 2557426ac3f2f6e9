"""The layers of a packed batch over fused kernels: every edit happens inside an operation that the layer runs anyway.

The same mathematics as ``forward.decoder_layer``, cut at the matmuls: what lies between two of them is one kernel. Used
where the backend has these kernels and the weights are in the serving layout.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels import api, dispatch
from kernels.types import Shrunk, Site, TilePages
from preft_jax.adapters.bank import Bank
from preft_jax.adapters.edits import RowEdits
from preft_jax.config import ModelConfig
from preft_jax.models.linear import linear
from preft_jax.models.params import Params


class Packed(NamedTuple):
    """Where the tokens of packed requests stand: int32 arrays as in ``PrefillBatch``.

    ``max_query_len`` is a static bound on the tokens of one request in the batch.
    """

    slots_T: jax.Array
    page_table_BP: jax.Array
    query_start_B1: jax.Array
    kv_len_B: jax.Array
    max_query_len: int


class Decoding(NamedTuple):
    """Where one token of each row stands: int32 ``page_table_BP`` and ``position_B``, as in ``DecodeBatch``."""

    page_table_BP: jax.Array
    position_B: jax.Array


class Mixed(NamedTuple):
    """Packed tokens, the last of which are those of decoding rows.

    ``rows`` has an entry for each of the last tokens that may be a row; those below position 0 are none. ``packed``
    knows nothing of rows: their slots lie beyond the pool, and no request has them.
    """

    packed: Packed
    rows: Decoding


class Batch(NamedTuple):
    """What the layers need of a batch.

    ``places`` says where its tokens stand; bool ``mask_TG``; float32 ``cos_TX`` and ``sin_TX``; ``tiles`` by site,
    empty without a bank.
    """

    places: Packed | Decoding | Mixed
    mask_TG: jax.Array
    cos_TX: jax.Array
    sin_TX: jax.Array
    tiles: Mapping[str, TilePages]


def applies(config: ModelConfig, params: Params) -> bool:
    """Return whether the fused kernels serve this model here: not in other layouts than the fused one."""
    return isinstance(params["layers"][0].get("qkv"), jax.Array) and dispatch.chosen("norm_shrink") != "xla"


def hidden(
    config: ModelConfig,
    params: Params,
    bank: Bank | None,
    kv: Sequence[jax.Array],
    x_TD: jax.Array,
    batch: Batch,
    *,
    rows: RowEdits | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, list[jax.Array]]:
    """Run all layers and the final norm.

    Args:
        config: static.
        params: in the serving layout, not transposed.
        bank: rank pages; None computes the plain base model.
        kv: the KV pool of each layer, ``kv_PSJC``.
        x_TD: embedded tokens.
        batch: see ``Batch``.
        rows: all-token adapters of a decode step; then there is no bank.
        implementation: of all kernels; None takes the best of each.

    Returns:
        The normed stream of every token, ``[T, D]``, and the KV pools.
    """
    kv = list(kv)
    eps = config.rms_norm_eps
    added: jax.Array | None = None
    pending: tuple[Shrunk, ...] = ()
    block: Site | None = None

    for layer, w in enumerate(params["layers"]):

        def sites(*names: str, layer: int = layer) -> list[Site | None]:
            if bank is None:
                return [None] * len(names)
            return [bank.site(layer, name, batch.tiles[name]) if name in bank.sites else None for name in names]

        def edited(names: tuple[str, ...], x: jax.Array, y: jax.Array, layer: int = layer) -> jax.Array:
            if rows is None:
                return y
            return rows.apply_beside([config.site_shape(name)[1] for name in names], layer, names, x, y)

        with jax.named_scope("attention"):
            held = sites("q", "k", "v")
            x_TD, h, shrunk = api.norm_shrink(
                x_TD,
                pending,
                block,
                w["attn_norm"],
                eps,
                _present(held),
                batch.mask_TG,
                add_TD=added,
                implementation=implementation,
            )
            qkv = linear(h, w["qkv"])
            if config.qkv_bias:
                qkv = qkv + w["qkv_bias"]
            qkv = edited(("q", "k", "v"), h, qkv)
            mixed, kv[layer] = _attend(
                qkv, _edits(held, shrunk), kv[layer], batch, head_norms(config, w), implementation
            )
            mixed = mixed.reshape(mixed.shape[0], -1)
            held = _present(sites("o"))
            shrunk = api.shrink(
                mixed, [s.pool for s in held], [s.tiles for s in held], batch.mask_TG, implementation=implementation
            )
            added = edited(("o",), mixed, linear(mixed, w["o"]))
            pending = tuple(Shrunk(*pair) for pair in zip(shrunk, held, strict=True))
        with jax.named_scope("mlp"):
            held = sites("gate", "up")
            x_TD, h, shrunk = api.norm_shrink(
                x_TD,
                pending,
                None,
                w["mlp_norm"],
                eps,
                _present(held),
                batch.mask_TG,
                add_TD=added,
                implementation=implementation,
            )
            down = _present(sites("down"))
            gate_up = edited(("gate", "up"), h, linear(h, w["gate_up"]))
            h, shrunk = api.silu_mul_shrink(
                gate_up, _edits(held, shrunk), down, batch.mask_TG, implementation=implementation
            )
            added = edited(("down",), h, linear(h, w["down"]))
            pending = tuple(Shrunk(*pair) for pair in zip(shrunk, down, strict=True))
            (block,) = sites("block")
            if rows is not None and "block" in rows.bank.sites:
                x_TD, added = x_TD + added, None
                (x_TD,) = rows.apply(layer, ("block",), x_TD, (x_TD,))
    _, h, _ = api.norm_shrink(
        x_TD, pending, block, params["norm"], eps, (), batch.mask_TG, add_TD=added, implementation=implementation
    )
    return h, kv


def head_norms(config: ModelConfig, w: Params) -> dict[str, Any]:
    """Return the arguments of kernels that norm the heads of q and k, of a layer with weights ``w``."""
    return {"q_norm_C": w["q_norm"], "k_norm_C": w["k_norm"], "eps": config.rms_norm_eps} if config.qk_norm else {}


def _attend(
    qkv_TF: jax.Array,
    edits: list[Shrunk | None],
    kv_PSJC: jax.Array,
    batch: Batch,
    norms: dict[str, Any],
    implementation: str | None,
) -> tuple[jax.Array, jax.Array]:
    """Rotate, keep keys and values, attend; returns ``[T, H, C]`` and the KV pool."""
    places, rope = batch.places, (batch.cos_TX, batch.sin_TX)
    if isinstance(places, Decoding):
        return api.decode_attention(qkv_TF, *rope, kv_PSJC, *places, **norms, implementation=implementation)
    if isinstance(places, Mixed):
        packed = batch._replace(places=places.packed)
        packed_THC, kv_PSJC = _attend(qkv_TF, edits, kv_PSJC, packed, norms, implementation)
        at = qkv_TF.shape[0] - places.rows.position_B.shape[0]
        rest = batch._replace(places=places.rows, cos_TX=batch.cos_TX[at:], sin_TX=batch.sin_TX[at:])
        rows_BHC, kv_PSJC = _attend(qkv_TF[at:], [], kv_PSJC, rest, norms, implementation)
        is_row_B11 = (places.rows.position_B >= 0)[:, None, None]
        return packed_THC.at[at:].set(jnp.where(is_row_B11, rows_BHC, packed_THC[at:])), kv_PSJC
    q_THC, kv_PSJC = api.rope_kv(qkv_TF, edits, *rope, kv_PSJC, places.slots_T, **norms, implementation=implementation)
    mixed_THC = api.paged_attention(
        q_THC, kv_PSJC, places.page_table_BP, places.query_start_B1, places.kv_len_B,
        max_query_len=places.max_query_len, implementation=implementation,
    )  # fmt: skip
    return mixed_THC, kv_PSJC


def _present(sites: Sequence[Site | None]) -> tuple[Site, ...]:
    return tuple(site for site in sites if site is not None)


def _edits(sites: Sequence[Site | None], shrunk: Sequence[jax.Array]) -> list[Shrunk | None]:
    """Return one pending edit for each site, None where the bank does not hold it."""
    remaining = iter(shrunk)
    return [None if site is None else Shrunk(next(remaining), site) for site in sites]


def no_mask(num_tokens: int) -> jax.Array:
    """Return the mask of a batch without edits."""
    return jnp.zeros((num_tokens, 1), jnp.bool_)
