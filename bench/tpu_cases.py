"""What ``bench.tpu_compile`` compiles: every TPU kernel at the shapes of real models, and whole programs.

On one chip everything is whole. On four (a 2x2 mesh of one axis) a ``Case`` says in ``sharding`` what it does: kernels
run under ``jax.shard_map``, ``prefill`` and ``decode`` too (each chip a whole model and a quarter of the batch), except
those whose weights do not fit one chip: these keep XLA's implementations and leave the partitioning of linears and KV
heads to the compiler.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels import api, dispatch
from kernels.pallas_tpu import attention, decode, lowrank
from kernels.types import PagePool, TilePages
from preft_jax.adapters.bank import init_bank
from preft_jax.config import PRESETS, ModelConfig
from preft_jax.models.batch import DecodeBatch, PrefillBatch
from preft_jax.models.cache import init_cache
from preft_jax.models.forward import decode as decode_step
from preft_jax.models.forward import prefill
from preft_jax.models.layout import fused_layout
from preft_jax.models.modules import abstract_params
from preft_jax.quantize import quantize
from preft_jax.shapes import NUM_GROUPS, RANK_PAGE, SITES

AXIS = "chips"
DTYPE = jnp.bfloat16
TILE = 128
PAGE_SIZE = 16
BANK_PAGES = 17


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One program to compile.

    ``function`` takes ``arguments`` (pytrees of ``jax.ShapeDtypeStruct``) and is traced with ``implementation``
    preferred; ``specs`` are their partitions, ``out_specs`` those of its result if it runs under ``jax.shard_map``,
    else None. ``donate`` numbers arguments given away, ``pools`` the KV and rank pools, which must never be copied.
    ``vmem_bytes`` is what our kernel's blocks take, by its own arithmetic.
    """

    name: str
    model: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    specs: tuple[Any, ...]
    out_specs: Any
    sharding: str
    implementation: str = "pallas_tpu"
    donate: tuple[int, ...] = ()
    pools: Any = ()
    vmem_bytes: int | None = None
    weight_bytes: int = 0


def _array(shape: Sequence[int], dtype: Any = DTYPE) -> Any:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _ints(*shape: int) -> Any:
    return _array(shape, jnp.int32)


def _pool(width_in: int, width_out: int) -> PagePool:
    return PagePool(
        _array((BANK_PAGES, width_in, RANK_PAGE)),
        _array((BANK_PAGES, RANK_PAGE), jnp.float32),
        _array((BANK_PAGES, RANK_PAGE, width_out)),
    )


def _tiles(tokens: int, tile: int, entries: int) -> TilePages:
    return TilePages(*[_ints(tokens // tile, entries)] * 4)


def _replicated(tree: Any) -> Any:
    return jax.tree.map(lambda _: P(), tree)


def shrink_case(model: str, sites: Sequence[str], tokens: int, chips: int, entries: int = 8, tile: int = TILE) -> Case:
    """The shrink of sites that read one input; on several chips each takes a part of the tiles."""
    config = PRESETS[model]
    width = config.site_shape(sites[0])[0]
    pools = [_pool(*config.site_shape(site)) for site in sites]
    tiles = [_tiles(tokens, tile, entries)] * len(sites)
    arguments = (_array((tokens, width)), pools, tiles, _array((tokens, NUM_GROUPS), jnp.bool_))
    blocks = lowrank.shrink_blocks(tile, width, entries, RANK_PAGE, DTYPE, (DTYPE,) * len(sites))
    return Case(
        name=f"shrink {'+'.join(sites)} T={tokens} tile={tile} E={entries}",
        model=model,
        function=api.shrink,
        arguments=arguments,
        specs=(P(AXIS), _replicated(pools), jax.tree.map(lambda _: P(AXIS), tiles), P(AXIS)),
        out_specs=P(AXIS),
        sharding="tokens" if chips > 1 else "",
        pools=pools,
        vmem_bytes=blocks.vmem_bytes,
    )


def expand_case(model: str, site: str, tokens: int, chips: int, entries: int = 8, tile: int = TILE) -> Case:
    """An expand; several chips each hold a part of B and y where F divides to whole lanes, else of the tiles."""
    config = PRESETS[model]
    width_in, width = config.site_shape(site)
    pool, tiles = _pool(width_in, width), _tiles(tokens, tile, entries)
    by_width = width % (chips * 128) == 0
    s_spec, y_spec = (P(), P(None, AXIS)) if by_width else (P(AXIS), P(AXIS))
    local = width // chips if by_width else width
    return Case(
        name=f"expand {site} T={tokens} tile={tile} E={entries}",
        model=model,
        function=api.expand,
        arguments=(_array((tokens, entries, RANK_PAGE), jnp.float32), _array((tokens, width)), pool, tiles),
        specs=(
            s_spec,
            y_spec,
            PagePool(*(P(), P(), P(None, None, AXIS) if by_width else P())),  # type: ignore[arg-type]
            jax.tree.map(lambda _: P() if by_width else P(AXIS), tiles),
        ),
        out_specs=y_spec,
        sharding=("F" if by_width else "tokens") if chips > 1 else "",
        donate=(1,),
        pools=pool,
        vmem_bytes=lowrank.expand_blocks(tile, local, entries, RANK_PAGE, DTYPE, DTYPE).vmem_bytes,
    )


def decode_edit_case(model: str, site: str, batch: int, chips: int, entries: int = 1) -> Case:
    """A decode edit; several chips each take a part of the rows."""
    width_in, width_out = PRESETS[model].site_shape(site)
    pool = _pool(width_in, width_out)
    blocks = decode.decode_blocks(batch // chips, width_in, width_out, entries, RANK_PAGE, DTYPE, DTYPE)
    return Case(
        name=f"decode_edit {site} B={batch} E={entries}",
        model=model,
        function=api.decode_edit,
        arguments=(_array((batch, width_in)), _array((batch, width_out)), [pool], [_ints(batch, entries)]),
        specs=(P(AXIS), P(AXIS), [_replicated(pool)], [P(AXIS)]),
        out_specs=P(AXIS),
        sharding="rows" if chips > 1 else "",
        pools=pool,
        vmem_bytes=blocks.vmem_bytes,
    )


def _attend(channels: int, most: int, q_THC: jax.Array, pool: jax.Array, *ragged: jax.Array) -> jax.Array:
    """Attend over a pool whose last axis fills the lanes: at head size 64 it is stored as ``[P, S, K, 128]``."""
    kv_PSJC = pool.reshape(*pool.shape[:2], -1, channels)
    return api.paged_attention(q_THC, kv_PSJC, *ragged, max_query_len=most)


def attention_case(model: str, tokens: int, batch: int, most: int, keys: int, chips: int, page_size: int) -> Case:
    """Paged attention; several chips split the KV heads, or hold all of them where 4 does not divide them."""
    config = PRESETS[model]
    heads, kv_heads2, channels = config.num_attention_heads, 2 * config.num_key_value_heads, config.head_dim
    split = config.num_key_value_heads % chips == 0
    table_width = keys // page_size
    lanes = max(channels, 2 * channels if channels < 128 else 0)
    pool = _array((batch * table_width // 2, page_size, kv_heads2 * channels // lanes, lanes))
    local = (heads // chips, kv_heads2 // chips) if split else (heads, kv_heads2)
    if attention.stock_takes(local[1], channels):
        blocks = attention.stock_blocks(*local, channels, page_size, tokens, table_width, DTYPE, DTYPE)
    else:
        blocks = attention.own_blocks(*local, channels, page_size, most, table_width, DTYPE, DTYPE)
    q_spec, kv_spec = (P(None, AXIS), P(None, None, AXIS)) if split else (P(), P())
    kind = "decode" if most == 1 else "prefill"
    return Case(
        name=f"attention {kind} T={tokens} B={batch} keys<={keys} page={page_size}",
        model=model,
        function=functools.partial(_attend, channels, most),
        arguments=(_array((tokens, heads, channels)), pool, _ints(batch, table_width), _ints(batch + 1), _ints(batch)),
        specs=(q_spec, kv_spec, P(), P(), P()),
        out_specs=q_spec,
        sharding=("KV heads" if split else "none: replicated") if chips > 1 else "",
        pools=pool,
        vmem_bytes=blocks.vmem_bytes,
    )


def _weights(config: ModelConfig, *, fp8: bool = False) -> Any:
    plain = jax.eval_shape(functools.partial(fused_layout, transpose=False), abstract_params(config, DTYPE))
    return jax.eval_shape(quantize, plain) if fp8 else plain


def _partition(tree: Any, chips: int) -> Any:
    """Split the widest axis that four divides of each weight or pool of two axes and more."""

    def spec(leaf: jax.ShapeDtypeStruct) -> P:
        if len(leaf.shape) < 2:
            return P()
        axis = 2 if len(leaf.shape) == 4 else max(range(len(leaf.shape)), key=lambda i: leaf.shape[i])
        return P(*[None] * axis, AXIS) if leaf.shape[axis] % chips == 0 else P()

    return jax.tree.map(spec, tree)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _program(
    name: str, model: str, function: Callable[..., Any], arguments: tuple[Any, ...], roles: str, chips: int,
    partitioned: bool,
) -> Case:  # fmt: skip
    """A whole program; ``roles`` says of each argument whether it is weights, bank, cache or batch (w, a, c, b)."""
    weights = _bytes(arguments[0])
    if partitioned:
        specs = tuple(
            _partition(tree, chips) if role in "wc" else _replicated(tree)
            for role, tree in zip(roles, arguments, strict=True)
        )
        out_specs, sharding = None, "weights and KV heads, by the compiler"
    else:
        specs = tuple(
            jax.tree.map(lambda _: P(AXIS), tree) if role in "cb" else _replicated(tree)
            for role, tree in zip(roles, arguments, strict=True)
        )
        out_specs, sharding = (P(AXIS), specs[roles.index("c")]), "batch and KV pages" if chips > 1 else ""
    pools = [tree for role, tree in zip(roles, arguments, strict=True) if role in "ac"]
    return Case(
        name=name, model=model, function=function, arguments=arguments, specs=specs, out_specs=out_specs,
        sharding=sharding, implementation="xla" if partitioned else "pallas_tpu", donate=(roles.index("c"),),
        pools=pools, weight_bytes=weights // (chips if partitioned else 1),
    )  # fmt: skip


def prefill_case(model: str, tokens: int, batch: int, chips: int, *, pages: int, partitioned: bool = False) -> Case:
    """``forward.prefill`` of ``tokens`` tokens and ``batch`` requests a chip, a bank of all eight sites."""
    config = PRESETS[model]
    times = 1 if partitioned else chips
    table_width = pages // batch
    batch_arrays = PrefillBatch(
        tokens_T=_ints(times * tokens),
        positions_T=_ints(times * tokens),
        slots_T=_ints(times * tokens),
        edit_mask_TG=_array((times * tokens, NUM_GROUPS), jnp.bool_),
        query_start_B1=_ints(times * (batch + 1)),
        kv_len_B=_ints(times * batch),
        page_table_BP=_ints(times * batch, table_width),
        last_token_B=_ints(times * batch),
        tiles={site: _tiles(times * tokens, TILE, 8) for site in SITES},
    )
    bank = jax.eval_shape(lambda: init_bank(config, BANK_PAGES, DTYPE))
    cache = _cache(config, times * pages)
    function = functools.partial(prefill, config, max_query_len=tokens)
    name = f"prefill T={tokens} B={batch} pages={pages}"
    return _program(name, model, function, (_weights(config), bank, cache, batch_arrays), "wacb", chips, partitioned)


def _cache(config: ModelConfig, pages: int) -> Any:
    """Return the shapes of a KV cache as it is made on a TPU."""
    with dispatch.preferring("pallas_tpu"):
        return jax.eval_shape(lambda: init_cache(config, pages, PAGE_SIZE, DTYPE))


def decode_case(
    model: str, batch: int, chips: int, *, pages: int, partitioned: bool = False, fp8: bool = False
) -> Case:
    """``preft_jax.models.forward.decode`` of ``batch`` rows a chip, with linears in FP8 or without."""
    config = PRESETS[model]
    times = 1 if partitioned else chips
    arrays = DecodeBatch(_ints(times * batch), _ints(times * batch), _ints(times * batch, pages // batch))
    cache = _cache(config, times * pages)
    function = functools.partial(decode_step, config)
    name = f"decode{' fp8' if fp8 else ''} B={batch} pages={pages}"
    return _program(name, model, function, (_weights(config, fp8=fp8), cache, arrays), "wcb", chips, partitioned)


def kernel_cases(chips: int) -> list[Case]:
    """Return every kernel at the shapes of four models."""
    cases = []
    for model in ("llama3-8b", "smollm2-135m", "qwen2.5-0.5b"):
        cases += [
            shrink_case(model, ("q", "k", "v"), 2048, chips),
            shrink_case(model, ("down",), 2048, chips),
            expand_case(model, "gate", 2048, chips),
            expand_case(model, "k", 2048, chips),
            decode_edit_case(model, "q", 256, chips),
            decode_edit_case(model, "down", 256, chips, entries=4),
        ]
        for page_size in (16, 64):
            cases += [
                attention_case(model, 2048, 16, 2048, 4096, chips, page_size),
                attention_case(model, 256, 256, 1, 2048, chips, page_size),
            ]
    return [
        *cases,
        shrink_case("llama3-8b", ("gate", "up"), 16384, chips, entries=64, tile=256),
        shrink_case("llama3-8b", ("q", "k", "v"), 2048, chips, entries=2, tile=16),
        shrink_case("llama3-70b", ("down",), 2048, chips),
        expand_case("llama3-70b", "gate", 2048, chips, entries=64, tile=256),
        decode_edit_case("llama3-70b", "down", 256, chips, entries=4),
    ]


def program_cases(chips: int) -> list[Case]:
    """Return ``prefill`` and ``decode`` of two models."""
    large = chips > 1
    return [
        prefill_case("smollm2-135m", 2048, 16, chips, pages=4096),
        decode_case("smollm2-135m", 256, chips, pages=16384),
        prefill_case("llama3-8b", 2048, 16, chips, pages=1024, partitioned=large),
        decode_case("llama3-8b", 64, chips, pages=2048, partitioned=large),
        *([] if large else [decode_case("llama3-8b", 64, chips, pages=2048, fp8=True)]),
    ]


def small_cases(chips: int) -> list[Case]:
    """Return what CI compiles: each kernel once, and a program."""
    return [
        shrink_case("smollm2-135m", ("q", "k", "v"), 512, chips),
        expand_case("smollm2-135m", "gate", 512, chips),
        decode_edit_case("smollm2-135m", "q", 64, chips),
        attention_case("smollm2-135m", 512, 8, 512, 1024, chips, 16),
        attention_case("llama3-8b", 64, 64, 1, 1024, chips, 16),
        decode_case("smollm2-135m", 64, chips, pages=1024),
    ]


SELECTIONS = {
    "kernels": kernel_cases,
    "programs": program_cases,
    "all": lambda chips: [*kernel_cases(chips), *program_cases(chips)],
    "small": small_cases,
}
