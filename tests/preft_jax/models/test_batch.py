"""Packing requests into device batches: every token, slot, mask row and page in its place; padding owned by none."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from preft_jax import RequestError
from preft_jax.adapters.allocator import SitePages
from preft_jax.models.batch import Span, bucket, pack_prefill, pack_rows, slots_of
from preft_jax.models.cache import NO_SLOT
from preft_jax.shapes import SITES

pytestmark = pytest.mark.host

PAGE_SIZE, TILE = 4, 8


def span(tokens, start=0, mask=None, kv_pages=None, pages=None):
    tokens = np.asarray(tokens, np.int32)
    if mask is None:
        mask = np.tile([True, False], (len(tokens), 1))
    if kv_pages is None:
        kv_pages = list(range(-(-(start + len(tokens)) // PAGE_SIZE)))
    return Span(tokens=tokens, start=start, edit_mask=mask, kv_pages=kv_pages, adapter_pages=pages or {})


def pack(spans, num_tokens=32, num_requests=4, width=6):
    return pack_prefill(
        spans, num_tokens=num_tokens, num_requests=num_requests, page_table_width=width, page_size=PAGE_SIZE, tile=TILE
    )


@st.composite
def batches(draw):
    """Draw up to four spans anywhere in their requests, with distinct KV pages, masks and adapters of any width."""
    spans, next_page = [], 0
    for _ in range(draw(st.integers(1, 4))):
        count, start = draw(st.integers(1, 14)), draw(st.integers(0, 9))
        held = -(-(start + count) // PAGE_SIZE)
        kv_pages = list(range(next_page, next_page + held))[::-1]
        next_page += held
        mask = np.array(draw(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=count, max_size=count)))
        sites = draw(st.lists(st.sampled_from(SITES), unique=True, max_size=2))
        pages = {
            site: SitePages(
                tuple(draw(st.lists(st.integers(1, 99), min_size=1, max_size=3))), ()
            )
            for site in sites
        }  # fmt: skip
        pages = {
            site: SitePages(place.pages, tuple(draw(st.integers(0, 1)) for _ in place.pages))
            for site, place in pages.items()
        }
        tokens = draw(st.lists(st.integers(0, 255), min_size=count, max_size=count))
        spans.append(span(tokens, start, mask, kv_pages, pages))
    assume(sum(len(s.tokens) for s in spans) <= 32)
    return spans


@given(batches())
def test_every_token_is_in_its_place(spans):
    batch = pack(spans)
    at = 0
    for row, s in enumerate(spans):
        count = len(s.tokens)
        assert batch.query_start_B1[row] == at
        assert batch.last_token_B[row] == at + count - 1
        assert batch.kv_len_B[row] == s.start + count
        held = [int(page) for page in batch.page_table_BP[row][: len(s.kv_pages)]]
        assert held == list(s.kv_pages)
        for i in range(count):
            position = s.start + i
            assert batch.tokens_T[at + i] == s.tokens[i]
            assert batch.positions_T[at + i] == position
            assert batch.slots_T[at + i] == s.kv_pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
            assert batch.edit_mask_TG[at + i].tolist() == s.edit_mask[i].tolist()
        at += count
    assert (batch.query_start_B1[len(spans) :] == at).all()
    assert (batch.kv_len_B[len(spans) :] == 0).all()
    assert (batch.slots_T[at:] == NO_SLOT).all()
    assert not batch.edit_mask_TG[at:].any()
    assert batch.tokens_T.shape == (32,)


@given(batches())
def test_each_token_sees_the_pages_of_its_own_request_and_no_others(spans):
    """Where its mask switches them: tile by tile, it is each request's own list. Padding sees none."""
    batch = pack(spans)
    assert set(batch.tiles) == set(SITES)
    assert len({tiles.page_NE.shape for tiles in batch.tiles.values()}) == 1
    for site, tiles in batch.tiles.items():
        for array in tiles:
            assert array.dtype == np.int32
            assert array.shape[0] == 32 // TILE
        expected = []
        for s in spans:
            place = s.adapter_pages.get(site, SitePages((), ()))
            for row in s.edit_mask:
                pairs = zip(place.pages, place.groups, strict=True)
                expected.append(sorted((page, group) for page, group in pairs if row[group]))
        expected += [[]] * (32 - len(expected))
        for t in range(32):
            n, offset = divmod(t, TILE)
            acting = [
                (int(page), int(group))
                for page, start, end, group in zip(*(array[n] for array in tiles), strict=True)
                if start <= offset < end and page != 0 and batch.edit_mask_TG[t, group]
            ]
            assert sorted(acting) == expected[t]


@given(batches())
def test_unused_entries_are_the_null_page_over_no_tokens(spans):
    for tiles in pack(spans).tiles.values():
        unused = tiles.page_NE == 0
        assert (tiles.start_NE[unused] == tiles.end_NE[unused]).all()
        assert (tiles.start_NE[~unused] < tiles.end_NE[~unused]).all()


def test_base_requests_and_padding_rows_have_no_pages_beside_an_adapter():
    """One adapter among base requests, two of four rows used, half of the tokens padding."""
    own = {"q": SitePages((7,), (0,))}
    batch = pack([span(range(5)), span(range(4), pages=own, kv_pages=[3]), span(range(3), kv_pages=[5])])
    entries = {
        (n, int(page), int(start), int(end))
        for n, row in enumerate(np.stack(batch.tiles["q"], axis=-1))
        for page, start, end, _ in row
        if page
    }
    assert entries == {(0, 7, 5, 8), (1, 7, 0, 1)}
    assert not any(batch.tiles[site].page_NE.any() for site in SITES if site != "q")


def test_a_span_whose_mask_is_all_zero_lists_no_pages():
    """Generated tokens that are computed again: their request has an adapter, and it must not act on them."""
    own = {"q": SitePages((7, 8), (0, 1))}
    batch = pack([span(range(6), start=3, mask=np.zeros((6, 2), bool), pages=own)])
    assert not batch.tiles["q"].page_NE.any()


def test_page_lists_have_bucketed_widths():
    for count, width in ((1, 1), (2, 2), (3, 4), (5, 8)):
        own = {"down": SitePages(tuple(range(1, count + 1)), (0,) * count)}
        assert pack([span(range(4), pages=own)]).tiles["q"].page_NE.shape == (4, width)


@pytest.mark.parametrize(
    ("spans", "sizes"),
    [
        ([span(range(20)), span(range(13))], {}),
        ([span(range(2))] * 5, {}),
        ([span(range(2))], {"num_tokens": 12}),
    ],
)
def test_what_does_not_fit_is_refused_with_the_sizes(spans, sizes):
    total = sum(len(s.tokens) for s in spans)
    with pytest.raises(RequestError, match=rf"{len(spans)} spans of {total} tokens.*4 requests.*tiles of 8"):
        pack(spans, **sizes)


def test_a_full_batch_fits():
    batch = pack([span(range(16)), span(range(16), kv_pages=[4, 5, 6, 7])])
    assert (batch.slots_T == np.arange(32)).all()


@given(st.integers(1, 5000), st.sampled_from([1, 4, 24]))
def test_bucket_is_the_smallest_doubling_that_holds(n, smallest):
    size = bucket(n, smallest)
    assert size >= n
    assert size == smallest or size < 2 * n
    assert (size // smallest).bit_count() == 1
    assert size % smallest == 0


def test_bucket_makes_few_sizes():
    assert {bucket(n, 16) for n in range(1, 513)} == {16, 32, 64, 128, 256, 512}


def test_slots():
    assert slots_of(np.array([0, 3, 4, 9]), [6, 2, 8], 4).tolist() == [24, 27, 8, 33]


def test_rows_of_pages_are_padded_with_the_null_page():
    places = [{"q": SitePages((3, 5, 9), (0, 0, 0)), "block": SitePages((2,), (0,))}, {}, {"q": SitePages((4,), (0,))}]
    rows = pack_rows(places)
    assert set(rows) == set(SITES)
    assert rows["q"].tolist() == [[3, 5, 9, 0], [0, 0, 0, 0], [4, 0, 0, 0]]
    assert rows["block"].tolist() == [[2, 0, 0, 0], [0] * 4, [0] * 4]
    assert not rows["v"].any()
    assert all(array.dtype == np.int32 for array in rows.values())


def test_rows_without_any_adapter_are_null():
    assert all(array.tolist() == [[0], [0]] for array in pack_rows([{}, {}]).values())


def test_lists_are_at_least_as_wide_as_asked():
    batch = pack_prefill(
        [span(range(4))], num_tokens=16, num_requests=1, page_table_width=2, page_size=PAGE_SIZE, tile=TILE,
        min_entries=8,
    )  # fmt: skip
    assert all(tiles.page_NE.shape == (2, 8) and not tiles.page_NE.any() for tiles in batch.tiles.values())
