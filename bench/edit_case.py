"""A kernel case of low-rank edits: its shapes, random inputs of those shapes, the call, and the least work that it is.

``bench/kernel_cases.py`` lists the cases; tests and benchmarks share both. Axis letters: ``preft_jax/shapes.py``.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels import api, dispatch
from kernels.types import PagePool, Shrunk, Site, TilePages
from preft_jax.config import PRESETS, ModelConfig
from preft_jax.models.cache import NO_SLOT
from preft_jax.shapes import NUM_GROUPS, RANK_PAGE

OPS = ("shrink", "expand", "lowrank_edit", "norm_shrink", "rope_kv", "silu_mul_shrink", "backward", "decode_edit")
"""Operations of an ``EditCase``; ``backward`` is both halves of the backward pass, with ``s`` kept from the forward."""

NORM_EPS = 1e-2
"""Of ``norm_shrink`` and of heads: larger than a model's, so that leaving it out would show."""

MODELS: Mapping[str, ModelConfig] = {
    **PRESETS,
    "narrow": ModelConfig(
        vocab_size=16, hidden_size=80, intermediate_size=112, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=1, head_dim=64,
    ),
}  # fmt: skip
"""Shapes by name: the presets, and one whose widths are multiples of 16 and of nothing larger."""

_ON_HOST = 1 << 22
"""Arrays of up to so many elements are drawn on the host (nothing to compile), larger ones on the device."""


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw_on_device(key: jax.Array, shape: tuple[int, ...], dtype: str, factor: jax.Array) -> jax.Array:
    return (jax.random.normal(key, shape, dtype).astype(jnp.float32) * factor).astype(dtype)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, factor: Any = 1.0) -> jax.Array:
    """Return ``factor`` (broadcast) times standard normal numbers."""
    if math.prod(shape) > _ON_HOST:
        key = jax.random.key(int(rng.integers(2**31)))
        return _draw_on_device(key, shape, dtype, jnp.asarray(factor, jnp.float32))
    drawn = rng.standard_normal(shape, np.float32) * np.asarray(factor, np.float32)
    return jnp.asarray(drawn.astype(jnp.dtype(dtype)))


class EditInputs(NamedTuple):
    """Arguments of an operation of low-rank edits; None where it has no such argument.

    ``x_TD`` is what comes first (``qkv`` of ``rope_kv``, ``gate_up`` of ``silu_mul_shrink``); ``y_TF`` what is added
    to, and of ``backward`` the cotangent of the edited y; ``sites`` shrink, ``edits`` are shrunk already; ``pages`` is
    of ``decode_edit``, for each of the ``sites``; the rest as in ``kernels.api``.
    """

    x_TD: jax.Array | None = None
    y_TF: jax.Array | None = None
    mask_TG: jax.Array | None = None
    sites: tuple[Site, ...] = ()
    edits: tuple[Shrunk | None, ...] = ()
    block: Site | None = None
    weight_D: jax.Array | None = None
    cos_TX: jax.Array | None = None
    sin_TX: jax.Array | None = None
    kv_PSJC: jax.Array | None = None
    slots_T: jax.Array | None = None
    q_norm_C: jax.Array | None = None
    k_norm_C: jax.Array | None = None
    pages: tuple[jax.Array, ...] = ()

    def all_sites(self) -> tuple[Site, ...]:
        """Return every site among the arguments."""
        edits = tuple(edit.site for edit in self.edits if edit is not None)
        return (*self.sites, *edits, *(() if self.block is None else (self.block,)))


def run_edit(op: str, inputs: EditInputs, implementation: str | None) -> Any:
    """Call an operation; returns what ``kernels.api`` does, and for ``backward`` ``(dx, dA, dc, dB)``."""
    x: Any = inputs.x_TD
    y: Any = inputs.y_TF
    mask: Any = inputs.mask_TG
    rest: Any = inputs
    pools = [site.pool for site in inputs.sites]
    tiles = [site.tiles for site in inputs.sites]
    how: Any = {"implementation": implementation}
    match op:
        case "shrink":
            return api.shrink(x, pools, tiles, mask, **how)
        case "expand":
            return api.expand(rest.edits[0].s_TER, y, *rest.edits[0].site, **how)
        case "lowrank_edit":
            return api.lowrank_edit(x, y, pools[0], tiles[0], mask, **how)
        case "norm_shrink":
            return api.norm_shrink(x, rest.edits, rest.block, rest.weight_D, NORM_EPS, rest.sites, mask, **how)
        case "rope_kv":
            how |= {"q_norm_C": rest.q_norm_C, "k_norm_C": rest.k_norm_C, "eps": NORM_EPS}
            return api.rope_kv(x, rest.edits, rest.cos_TX, rest.sin_TX, rest.kv_PSJC, rest.slots_T, **how)
        case "silu_mul_shrink":
            return api.silu_mul_shrink(x, rest.edits, rest.sites, mask, **how)
        case "backward":
            (edit,) = rest.edits
            ds_TER, db_PRF = dispatch.run("expand_backward", implementation, edit, y)
            dx_TD, ((da_PDR, dc_PR),) = dispatch.run(
                "shrink_backward", implementation, x, (edit.site,), mask, (ds_TER,)
            )
            return dx_TD, da_PDR, dc_PR, db_PRF
        case _:
            return api.decode_edit(x, y, pools, rest.pages, columns=columns_of(pools), **how)


def columns_of(pools: Sequence[PagePool]) -> list[int]:
    """Return where the outputs of linears begin that lie side by side."""
    return list(itertools.accumulate((pool.b_PRF.shape[2] for pool in pools[:-1]), initial=0))


class Layout(NamedTuple):
    """Which tokens belong to whom, before page numbers are drawn.

    ``table`` int32 ``[4, N, E]``: page (logical, from 1), start, end and group of every tile's entries; ``rows`` int32
    ``[B, E]``: the same pages request by request; ``rank_P`` of each logical page; ``mask_TG``; ``tokens`` without
    padding.
    """

    table: np.ndarray
    rows: np.ndarray
    rank_P: np.ndarray
    mask_TG: np.ndarray
    tokens: int

    def owned(self) -> np.ndarray:
        """Return bool ``[T, E]``: does entry e of the token's tile edit the token?"""
        page, start, end, group = self.table
        num_tiles, width = page.shape
        mask_NIG = self.mask_TG.reshape(num_tiles, -1, self.mask_TG.shape[1])
        offset = np.arange(mask_NIG.shape[1])[None, :, None]
        switched = np.take_along_axis(mask_NIG, group[:, None, :].astype(np.int64), axis=2)
        own = (page > 0)[:, None] & (start[:, None] <= offset) & (offset < end[:, None]) & switched
        return own.reshape(-1, width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditCase:
    """A batch of requests, each with its adapter or none, and one operation on it.

    Attributes:
        name: unique; ``op/model/sites/batch``.
        op: one of ``OPS``.
        tags: of ``test`` (small enough for a float64 reference on a CPU), ``odd`` (a kernel may refuse its shapes, but
            not compute them wrong), ``bench`` (real sizes) and ``small`` (the benchmark on a CPU).
        model: key of ``MODELS``; gives the widths.
        sites: that shrink in this operation; the one site of ``expand``, ``lowrank_edit`` and ``backward``; those of
            ``decode_edit``, whose outputs lie side by side, ``qkv`` and ``gate_up`` being a fused linear with one edit.
        edits: sites whose shrunk edits the operation adds; for ``rope_kv`` any of q, k, v and for ``silu_mul_shrink``
            any of gate, up.
        block: is the residual stream edited (``norm_shrink``)?
        lengths: tokens of each request.
        adapters: how many there are; requests take them in turn. None: one a request.
        ranks: of the adapters, in turn; pages are filled to 16 with zeros.
        base_fraction: share of requests without adapter, spread evenly.
        groups: position groups of an adapter, each with pages of its own.
        mask: ``all``, ``none``, ``random``, or ``f7+l7`` (the first 7 tokens in column 0, the last 7 in column 1).
        tile: tokens that share a page list.
        dtype: of x, y and A, B; c and s are float32.
        padding: tokens after the last request, besides those that fill its tile.
        spare_pages: rank pages in each pool that nobody names.
        min_entries: least width of the page lists.
        page_size: of the KV pool (``rope_kv``).
        head_norm: are the heads of q and k normed (``rope_kv``)?
    """

    name: str
    op: str
    tags: tuple[str, ...]
    model: str = "narrow"
    sites: tuple[str, ...] = ()
    edits: tuple[str, ...] = ()
    block: bool = False
    lengths: tuple[int, ...] = (24, 17)
    adapters: int | None = None
    ranks: tuple[int, ...] = (16,)
    base_fraction: float = 0.0
    groups: int = 1
    mask: str = "all"
    tile: int = 16
    dtype: str = "float32"
    padding: int = 0
    spare_pages: int = 3
    min_entries: int = 1
    page_size: int = 16
    head_norm: bool = False

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"case {self.name!r} has op {self.op!r}; allowed: {', '.join(OPS)}")
        if self.mask not in ("all", "none", "random", "f7+l7"):
            raise ValueError(f"case {self.name!r} has mask {self.mask!r}")

    @property
    def config(self) -> ModelConfig:
        """The model whose widths these are."""
        return MODELS[self.model]

    @property
    def num_tokens(self) -> int:
        """``T``: whole tiles."""
        if self.op == "decode_edit":
            return len(self.lengths)
        return -(-(sum(self.lengths) + self.padding) // self.tile) * self.tile

    def widths(self, site: str) -> tuple[int, int]:
        """Return ``(D, F)`` of a site, fused linears included."""
        config = self.config
        fused = {"qkv": config.q_size + 2 * config.kv_size, "gate_up": 2 * config.intermediate_size}
        return (config.hidden_size, fused[site]) if site in fused else config.site_shape(site)

    def layout(self, rng: np.random.Generator) -> Layout:
        """Return the packing. Only ``mask="random"`` draws from ``rng``."""
        num = len(self.lengths)
        adapters = num if self.adapters is None else self.adapters
        base = np.diff(np.floor(np.arange(num + 1) * self.base_fraction + 1e-9)) > 0
        pages_of: list[list[tuple[int, int]]] = []
        rank_of: list[int] = [0]
        for i in range(adapters):
            own = []
            for group in range(self.groups):
                left = self.ranks[i % len(self.ranks)]
                while left > 0:
                    own.append((len(rank_of), group))
                    rank_of.append(min(left, RANK_PAGE))
                    left -= RANK_PAGE
            pages_of.append(own)
        places = [[] if base[i] else pages_of[i % adapters] for i in range(num)]
        mask = self._mask(rng)
        rows = np.zeros((num, _bucket(max(self.min_entries, *map(len, places)))), np.int32)
        for i, place in enumerate(places):
            rows[i, : len(place)] = [page for page, _ in place]
        entries: list[list[tuple[int, int, int, int]]] = [[] for _ in range(max(1, self.num_tokens // self.tile))]
        at = 0
        for length, place in zip(self.lengths, places, strict=True):
            end = at + length
            for n in range(at // self.tile, -(-end // self.tile)) if self.op != "decode_edit" else ():
                start, stop = max(at - n * self.tile, 0), min(end - n * self.tile, self.tile)
                if self.mask != "f7+l7" or mask[n * self.tile + start : n * self.tile + stop].any():
                    entries[n] += [(page, start, stop, group) for page, group in place]
            at = end
        table = np.zeros((4, len(entries), _bucket(max(self.min_entries, *map(len, entries)))), np.int32)
        for n, entry in enumerate(entries):
            if entry:
                table[:, n, : len(entry)] = np.asarray(entry, np.int32).T
        return Layout(table, rows, np.asarray(rank_of, np.int32), mask, at)

    def _mask(self, rng: np.random.Generator) -> np.ndarray:
        mask = np.zeros((self.num_tokens, NUM_GROUPS), bool)
        at = 0
        for length in self.lengths:
            first = min(7, length // 2)
            if self.mask == "all":
                mask[at : at + length] = True
            elif self.mask == "random":
                mask[at : at + length] = rng.random((length, NUM_GROUPS)) < 0.6
            elif self.mask == "f7+l7":
                mask[at : at + first, 0] = True
                mask[at + length - first : at + length, 1] = True
            at += length
        return mask

    def _site(self, rng: np.random.Generator, layout: Layout, site: str) -> tuple[Site, np.ndarray]:
        """Return a site with random pages, and the page number of each logical page; other numbers for each site."""
        d, f = self.widths(site)
        live = len(layout.rank_P)
        num_pages = live + self.spare_pages
        number_of = np.concatenate([[0], 1 + rng.permutation(num_pages - 1)[: live - 1]]).astype(np.int32)
        rank = np.full(num_pages, RANK_PAGE)
        rank[number_of] = layout.rank_P
        filled_PR = np.arange(RANK_PAGE) < rank[:, None]
        pool = PagePool(
            normal(rng, (num_pages, d, RANK_PAGE), self.dtype, filled_PR[:, None, :] / d**0.5),
            normal(rng, (num_pages, RANK_PAGE), "float32", filled_PR),
            normal(rng, (num_pages, RANK_PAGE, f), self.dtype, filled_PR[:, :, None] / RANK_PAGE**0.5),
        )
        page, start, end, group = layout.table
        return Site(pool, TilePages(*map(jnp.asarray, (number_of[page], start, end, group)))), number_of

    def _shrunk(self, rng: np.random.Generator, layout: Layout, site: str) -> Shrunk:
        owned_TE1 = layout.owned()[..., None]
        s_TER = normal(rng, (*owned_TE1.shape[:2], RANK_PAGE), "float32", owned_TE1)
        return Shrunk(s_TER, self._site(rng, layout, site)[0])

    def inputs(self, rng: np.random.Generator) -> EditInputs:
        """Return random arguments: x, y and what an edit adds are all of order 1."""
        layout = self.layout(rng)
        tokens, config = self.num_tokens, self.config
        draw = functools.partial(normal, rng)
        mask_TG = jnp.asarray(layout.mask_TG)
        order = {"rope_kv": ("q", "k", "v"), "silu_mul_shrink": ("gate", "up")}.get(self.op, self.edits)
        edits = tuple(self._shrunk(rng, layout, site) if site in self.edits else None for site in order)
        sites = self.sites if self.op in ("shrink", "lowrank_edit", "norm_shrink", "silu_mul_shrink") else ()
        placed = tuple(self._site(rng, layout, site)[0] for site in sites)
        common = EditInputs(mask_TG=mask_TG, sites=placed, edits=edits)
        match self.op:
            case "shrink":
                return common._replace(x_TD=draw((tokens, self.widths(self.sites[0])[0]), self.dtype))
            case "expand" | "backward":
                (site,) = self.sites
                d, f = self.widths(site)
                edit = self._shrunk(rng, layout, site)
                x_TD = draw((tokens, d), self.dtype) if self.op == "backward" else None
                return common._replace(x_TD=x_TD, y_TF=draw((tokens, f), self.dtype), edits=(edit,))
            case "lowrank_edit":
                d, f = self.widths(self.sites[0])
                x_TD = draw((tokens, d), self.dtype)
                y_TF = x_TD if self.sites == ("block",) else draw((tokens, f), self.dtype)
                return common._replace(x_TD=x_TD, y_TF=y_TF)
            case "norm_shrink":
                return common._replace(
                    x_TD=draw((tokens, config.hidden_size), self.dtype),
                    block=self._site(rng, layout, "block")[0] if self.block else None,
                    weight_D=draw((config.hidden_size,), self.dtype),
                )
            case "silu_mul_shrink":
                return common._replace(x_TD=draw((tokens, 2 * config.intermediate_size), self.dtype))
            case "rope_kv":
                return self._rope_inputs(rng, layout, common)
            case _:
                own = [self._site(rng, layout, site) for site in self.sites]
                return EditInputs(
                    x_TD=draw((tokens, self.widths(self.sites[0])[0]), self.dtype),
                    y_TF=draw((tokens, sum(self.widths(site)[1] for site in self.sites)), self.dtype),
                    sites=tuple(Site(site.pool, None) for site, _ in own),  # type: ignore[arg-type]
                    pages=tuple(jnp.asarray(number_of[layout.rows]) for _, number_of in own),
                )

    def _rope_inputs(self, rng: np.random.Generator, layout: Layout, common: EditInputs) -> EditInputs:
        tokens, config = self.num_tokens, self.config
        pages = -(-tokens // self.page_size) + 2
        slots = np.full(tokens, NO_SLOT, np.int32)
        slots[: layout.tokens] = rng.permutation(pages * self.page_size)[: layout.tokens]
        angle = rng.uniform(0, 2 * np.pi, (tokens, config.head_dim // 2))
        kv_shape = (pages, self.page_size, 2 * config.num_key_value_heads, config.head_dim)
        norms = [normal(rng, (config.head_dim,), self.dtype) if self.head_norm else None for _ in "qk"]
        return common._replace(
            q_norm_C=norms[0],
            k_norm_C=norms[1],
            x_TD=normal(rng, (tokens, self.widths("qkv")[1]), self.dtype),
            cos_TX=jnp.asarray(np.cos(angle), jnp.float32),
            sin_TX=jnp.asarray(np.sin(angle), jnp.float32),
            kv_PSJC=normal(rng, kv_shape, self.dtype),
            slots_T=jnp.asarray(slots),
        )

    def run(self, inputs: EditInputs, implementation: str | None = None) -> Any:
        """Call the operation; see ``run_edit``."""
        return run_edit(self.op, inputs, implementation)

    def _pairs(self) -> tuple[int, int, int]:
        """Return the numbers of (token, page) pairs, of tokens with any, and of distinct pages."""
        layout = self.layout(np.random.default_rng(0))
        if self.op == "decode_edit":
            return int((layout.rows > 0).sum()), int((layout.rows > 0).any(1).sum()), _distinct(layout.rows)
        owned = layout.owned()
        return int(owned.sum()), int(owned.any(axis=1).sum()), _distinct(layout.table[0])

    def flops(self) -> int:
        """Return the multiplications and additions of the edits themselves: each page on the tokens that own it.

        Norm, rotation and SiLU are left out: they run on other units and are less than a matrix product's rounding.
        """
        pairs, _, _ = self._pairs()
        shrinks = self.sites if self.op in ("shrink", "norm_shrink", "silu_mul_shrink", "lowrank_edit") else ()
        expands = self.edits
        if self.op in ("expand", "lowrank_edit"):
            expands = self.sites
        if self.op in ("backward", "decode_edit"):
            times = 2 if self.op == "backward" else 1
            return 2 * RANK_PAGE * pairs * times * sum(sum(self.widths(site)) for site in self.sites)
        wide = sum(self.widths(s)[0] for s in shrinks) + sum(self.widths(s)[1] for s in expands)
        wide += sum(self.widths("block")) if self.block else 0
        return 2 * RANK_PAGE * pairs * wide

    def bytes(self) -> int:
        """Return the least traffic: each needed input read once, each output written once, pages once however often
        used; x of tokens that nothing edits is not needed by ``shrink``.
        """
        _, tokens, pages = self._pairs()
        size = jnp.dtype(self.dtype).itemsize
        total, config = self.num_tokens, self.config
        entries = self.layout(np.random.default_rng(0)).table.shape[2]
        s_bytes = total * entries * RANK_PAGE * 4
        a_bytes = {s: pages * RANK_PAGE * (self.widths(s)[0] * size + 4) for s in (*self.sites, "block")}
        b_bytes = {s: pages * RANK_PAGE * self.widths(s)[1] * size for s in (*self.sites, *self.edits, "block")}
        read_shrunk = len(self.edits) * s_bytes + sum(b_bytes[s] for s in self.edits)
        write_shrunk = len(self.sites) * s_bytes + sum(a_bytes[s] for s in self.sites)
        d = self.widths(self.sites[0])[0] if self.sites else config.hidden_size
        f = self.widths(self.sites[0])[1] if self.sites else 0
        match self.op:
            case "shrink":
                return tokens * d * size + write_shrunk
            case "expand":
                return s_bytes + b_bytes[self.sites[0]] + 2 * total * f * size
            case "lowrank_edit":
                x_bytes = 0 if self.sites == ("block",) else tokens * d * size
                return x_bytes + a_bytes[self.sites[0]] + b_bytes[self.sites[0]] + 2 * total * f * size
            case "norm_shrink":
                block = a_bytes["block"] + b_bytes["block"] if self.block else 0
                written = 2 if self.edits or self.block else 1
                return (1 + written) * total * config.hidden_size * size + read_shrunk + write_shrunk + block
            case "rope_kv":
                return 2 * total * self.widths("qkv")[1] * size + read_shrunk + total * (config.head_dim * 4 + 4)
            case "silu_mul_shrink":
                return 3 * total * config.intermediate_size * size + read_shrunk + write_shrunk
            case "backward":
                site = self.sites[0]
                pool = int(self.layout(np.random.default_rng(0)).rank_P.size) + self.spare_pages
                written = total * d * size + pool * RANK_PAGE * ((d + f) * size + 4)
                return tokens * (d + f) * size + s_bytes + a_bytes[site] + b_bytes[site] + written
            case _:
                moved = 2 * total * size * sum(self.widths(site)[1] for site in self.sites)
                return tokens * d * size + moved + sum(a_bytes[site] + b_bytes[site] for site in self.sites)


def _bucket(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _distinct(pages: np.ndarray) -> int:
    return len(np.setdiff1d(pages, [0]))
