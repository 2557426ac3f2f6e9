"""Device batches, and the host code that packs requests into them (plain NumPy).

Packed means: the tokens of all requests one after the other in one array, padded only at its end. Every length that
reaches a
jitted program is rounded up by ``bucket`` or ``round_up``, so the number of compiled programs stays small.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kernels.types import Array, TilePages
from preft_jax.adapters.allocator import AdapterPages, SitePages
from preft_jax.errors import RequestError
from preft_jax.models.cache import NO_SLOT
from preft_jax.shapes import NUM_GROUPS, SITES


def bucket(n: int, smallest: int = 1) -> int:
    """Return the smallest ``smallest * 2**i`` that is at least ``n``: the one function that decides padded lengths."""
    size = smallest
    while size < n:
        size *= 2
    return size


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``n``."""
    return -(-n // multiple) * multiple


class PrefillBatch(NamedTuple):
    """Tokens to prefill, packed. All arrays int32 unless said otherwise.

    ``tokens_T``, ``positions_T``, ``slots_T`` (where each token's KV is written), ``edit_mask_TG`` (bool),
    ``query_start_B1`` (where each request's tokens start), ``kv_len_B`` (its keys after this batch),
    ``page_table_BP``, ``last_token_B`` (row whose logits are returned) and, for each site, the rank pages of each tile.
    """

    tokens_T: Array
    positions_T: Array
    slots_T: Array
    edit_mask_TG: Array
    query_start_B1: Array
    kv_len_B: Array
    page_table_BP: Array
    last_token_B: Array
    tiles: Mapping[str, TilePages]


class DecodeBatch(NamedTuple):
    """One token a row to decode. int32.

    ``tokens_B`` at ``positions_B``, where their KV is written, over the pages of ``page_table_BP``; a row with
    position -1 is idle.
    """

    tokens_B: Array
    positions_B: Array
    page_table_BP: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """A run of consecutive tokens of one request that one prefill call computes.

    Attributes:
        tokens: int32 ``[n]``, the span's token ids.
        start: position of the first one in its request.
        edit_mask: bool ``[n, NUM_GROUPS]``, the rows of the request's mask.
        kv_pages: the request's KV pages, in order; they hold all tokens up to the span's end.
        adapter_pages: where the request's adapter lies in the bank; empty for the base model.
    """

    tokens: np.ndarray
    start: int
    edit_mask: np.ndarray
    kv_pages: Sequence[int]
    adapter_pages: AdapterPages = dataclasses.field(default_factory=dict)


def slots_of(positions: np.ndarray, kv_pages: Sequence[int], page_size: int) -> np.ndarray:
    """Return the KV slot of each position of a request."""
    return np.asarray(kv_pages, np.int32)[positions // page_size] * page_size + positions % page_size


def pack_prefill(
    spans: Sequence[Span],
    *,
    num_tokens: int,
    num_requests: int,
    page_table_width: int,
    page_size: int,
    tile: int,
    min_entries: int = 1,
    sites: Sequence[str] = SITES,
    starts: Sequence[int] | None = None,
) -> PrefillBatch:
    """Pack spans into one batch of padded size ``num_tokens`` x ``num_requests``.

    The lists of rank pages are as wide as the fullest tile needs, at least ``min_entries``, rounded up by ``bucket``.
    ``starts`` says where each span begins, by default right after the one before it. A gap before a span takes a row of
    its own (``rows_of`` counts them): its tokens are computed un-edited, and nothing is kept of them.

    Raises:
        RequestError: if the spans do not fit.
    """
    sizes = [len(span.tokens) for span in spans]
    starts = [sum(sizes[:i]) for i in range(len(sizes))] if starts is None else starts
    total = starts[-1] + sizes[-1] if sizes else 0
    rows = rows_of(starts, sizes)
    if total > num_tokens or (rows and rows[-1] >= num_requests) or num_tokens % tile:
        raise RequestError(
            f"{len(spans)} spans of {total} tokens do not fit a batch of {num_requests} requests and {num_tokens} "
            f"tokens in tiles of {tile}"
        )
    tokens = np.zeros(num_tokens, np.int32)
    positions = np.zeros(num_tokens, np.int32)
    slots = np.full(num_tokens, NO_SLOT, np.int32)
    mask = np.zeros((num_tokens, NUM_GROUPS), bool)
    query_start = np.full(num_requests + 1, total, np.int32)
    kv_len = np.zeros(num_requests, np.int32)
    page_table = np.zeros((num_requests, page_table_width), np.int32)
    last_token = np.zeros(num_requests, np.int32)
    done = 0
    for row, at, span in zip(rows, starts, spans, strict=True):
        n = len(span.tokens)
        here = slice(at, at + n)
        if at > done:
            query_start[row - 1], kv_len[row - 1] = done, at - done
        done = at + n
        tokens[here] = span.tokens
        positions[here] = np.arange(span.start, span.start + n)
        slots[here] = slots_of(positions[here], span.kv_pages, page_size)
        mask[here] = span.edit_mask
        query_start[row], kv_len[row], last_token[row] = at, span.start + n, at + n - 1
        held = min(len(span.kv_pages), page_table_width)
        page_table[row, :held] = span.kv_pages[:held]
    tiles = _tile_pages(sites, spans, starts, num_tokens // tile, tile)
    width = bucket(max([min_entries, *(tile_pages.page_NE.shape[1] for tile_pages in tiles.values())]))
    lists = {id(some): some for some in tiles.values()}  # Sites with the same pages share them.
    padded = {key: TilePages(*(_pad_entries(array, width) for array in some)) for key, some in lists.items()}
    tiles = {site: padded[id(some)] for site, some in tiles.items()}
    return PrefillBatch(tokens, positions, slots, mask, query_start, kv_len, page_table, last_token, tiles)


def rows_of(starts: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Return the row of each span in a batch whose gaps between spans have rows of their own."""
    rows, row, end = [], 0, 0
    for start, size in zip(starts, sizes, strict=True):
        row += start > end
        rows.append(row)
        row, end = row + 1, start + size
    return rows


def _tile_pages(
    sites: Sequence[str], spans: Sequence[Span], starts: Sequence[int], num_tiles: int, tile: int
) -> dict[str, TilePages]:
    """List, site by site and tile by tile, the rank pages that act in it, with the part of the tile that owns each."""
    parts: list[tuple[int, int, int, int]] = []
    for index, (at, span) in enumerate(zip(starts, spans, strict=True)):
        end = at + len(span.tokens)
        for n in range(at // tile, -(-end // tile)) if span.adapter_pages else ():
            own = (max(at - n * tile, 0), min(end - n * tile, tile))
            if span.edit_mask[n * tile + own[0] - at : n * tile + own[1] - at].any():
                parts.append((index, n, *own))
    made: dict[tuple[SitePages | None, ...], TilePages] = {}
    tiles = {}
    for site in sites:
        # Adapters mostly have the same pages at many sites.
        places = tuple(span.adapter_pages.get(site) for span in spans)
        if places not in made:
            made[places] = _list_pages(places, parts, num_tiles)
        tiles[site] = made[places]
    return tiles


def _list_pages(
    places: Sequence[SitePages | None], parts: Sequence[tuple[int, int, int, int]], num_tiles: int
) -> TilePages:
    entries: list[list[tuple[int, int, int, int]]] = [[] for _ in range(num_tiles)]
    for index, n, start, end in parts:
        place = places[index]
        if place is not None:
            entries[n] += [(page, start, end, group) for page, group in zip(*place, strict=True)]
    width = max(1, max(map(len, entries), default=1))
    table = np.zeros((4, num_tiles, width), np.int32)
    for n, row in enumerate(entries):
        if row:
            table[:, n, : len(row)] = np.asarray(row, np.int32).T
    return TilePages(*table)


def _pad_entries(array: np.ndarray, width: int) -> np.ndarray:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])))


def pack_rows(
    places: Sequence[AdapterPages], *, min_entries: int = 1, sites: Sequence[str] = SITES
) -> dict[str, np.ndarray]:
    """Return each site's page list of each row, int32 ``[B, E]`` padded with the null page, for a decode edit."""
    longest = max((len(place.pages) for where in places for place in where.values()), default=1)
    width = bucket(max(min_entries, longest))
    rows = {}
    for site in sites:
        rows[site] = np.zeros((len(places), width), np.int32)
        for i, where in enumerate(places):
            if site in where:
                rows[site][i, : len(where[site].pages)] = where[site].pages
    return rows
