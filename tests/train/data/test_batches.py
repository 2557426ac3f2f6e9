"""Epochs and batches: every example once, in an order that follows from seed and epoch, and nothing leaks in a row."""

import itertools

import numpy as np
import pytest
import train_cases as cases
from hypothesis import example, given
from hypothesis import strategies as st

from preft_jax import AdapterConfig, ConfigError
from preft_jax.text.chat import EncodedPrompt
from train.data.batches import SHORTEST, BatchOptions, Rows, collate, plan_epoch
from train.data.rows import Example

pytestmark = pytest.mark.host

LONGEST = 40

lengths = st.lists(st.integers(1, LONGEST), min_size=1, max_size=150)
options = st.builds(
    BatchOptions, batch_size=st.integers(1, 9), max_length=st.integers(LONGEST, 90), packing=st.booleans(),
    shuffle=st.booleans(), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip


@st.composite
def documents(draw):
    """Draw an example of any masks; its tokens tell documents apart."""
    size, first = draw(st.integers(1, 30)), draw(st.integers(1, 10_000))
    flags = st.lists(st.booleans(), min_size=size, max_size=size)
    edits = np.stack([draw(flags), draw(flags)], axis=-1)
    tokens = np.arange(first, first + size, dtype=np.int32)
    return Example(tokens, edits, np.array(draw(flags)), EncodedPrompt([1], ()), [], 1)


def flat(plan):
    return [i for batch in plan for row in batch for i in row]


@given(lengths, options, st.integers(0, 1000))
def test_every_example_is_in_exactly_one_row_of_an_epoch(lengths, options, epoch):
    plan = plan_epoch(lengths, options, epoch)
    assert sorted(flat(plan)) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= options.batch_size for batch in plan)
    assert all(row for batch in plan for row in batch)
    assert sum(len(batch) < options.batch_size for batch in plan) <= 1


@given(lengths, options, st.integers(0, 1000))
def test_no_row_is_overfilled_and_without_packing_none_is_shared(lengths, options, epoch):
    for batch in plan_epoch(lengths, options, epoch):
        for row in batch:
            assert sum(lengths[i] for i in row) <= options.max_length
            assert options.packing or len(row) == 1


@given(lengths, options, st.integers(0, 1000))
def test_the_order_follows_from_seed_and_epoch(lengths, options, epoch):
    plan = plan_epoch(lengths, options, epoch)
    plan_epoch(lengths, options, epoch + 1)
    assert plan_epoch(tuple(lengths), options, epoch) == plan


@pytest.mark.parametrize("packing", [False, True])
def test_other_epochs_and_seeds_have_other_orders(packing, rng):
    lengths = rng.integers(1, 20, 60).tolist()
    plans = [
        plan_epoch(lengths, BatchOptions(packing=packing, max_length=64, seed=seed), epoch)
        for seed in (0, 1) for epoch in range(4)
    ]  # fmt: skip
    for i, plan in enumerate(plans):
        assert all(flat(plan) != flat(other) for other in plans[:i])


@given(lengths, options, st.integers(0, 1000))
def test_without_shuffling_the_order_is_the_files_in_each_epoch(lengths, options, epoch):
    unshuffled = BatchOptions(
        batch_size=options.batch_size, max_length=options.max_length, packing=options.packing, shuffle=False
    )
    plan = plan_epoch(lengths, unshuffled, epoch)
    assert plan == plan_epoch(lengths, unshuffled, 0)
    if not unshuffled.packing:
        assert flat(plan) == list(range(len(lengths)))
    rows = [row for batch in plan for row in batch]
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert all(row == sorted(row) for row in rows)


@example([20, 20], 40, 0)
@given(st.lists(st.integers(1, LONGEST), min_size=1, max_size=60), st.integers(LONGEST, 90), st.integers(0, 99))
def test_packing_leaves_no_row_that_fits_into_an_earlier_one(lengths, max_length, epoch):
    plan = plan_epoch(lengths, BatchOptions(packing=True, max_length=max_length), epoch)
    used = [sum(lengths[i] for i in row) for batch in plan for row in batch]
    firsts = [lengths[row[0]] for batch in plan for row in batch]
    assert all(before + first > max_length for at, first in enumerate(firsts) for before in used[:at])


@given(st.lists(st.integers(1, LONGEST), min_size=1, max_size=150), st.integers(5, 9), st.integers(0, 99))
def test_rows_of_like_length_share_a_batch(lengths, batch_size, epoch):
    plan = plan_epoch(lengths, BatchOptions(batch_size=batch_size), epoch)
    spans = sorted((min(held), max(held)) for held in ([lengths[i] for (i,) in batch] for batch in plan))
    assert all(most <= least for (_, most), (least, _) in itertools.pairwise(spans))


def test_batches_are_not_met_by_length():
    lengths = list(range(1, 101))
    plan = plan_epoch(lengths, BatchOptions(batch_size=4), 0)
    longest = [max(lengths[i] for (i,) in batch) for batch in plan]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def expected(parts, shape):
    """Return a batch's arrays by name, made token by token."""
    made = {
        "tokens_BS": np.zeros(shape, int), "targets_BS": np.zeros(shape, int), "weights_BS": np.zeros(shape),
        "edit_mask_BSG": np.zeros((*shape, 2), bool), "positions_BS": np.zeros(shape, int),
        "segments_BS": np.zeros(shape, int), "slot_B": np.zeros(shape[0], int), "draw_BU": np.zeros((shape[0], 3), int),
    }  # fmt: skip
    numbered = [(part, number) for part in parts for number in range(len(part.rows))]
    for b, (part, number) in enumerate(numbered):
        made["slot_B"][b] = part.slot
        made["draw_BU"][b] = [part.seed, part.count, number]
        row = part.rows[number]
        places = [(segment, document, t) for segment, document in enumerate(row) for t in range(len(document))]
        for at, (segment, document, t) in enumerate(places):
            made["tokens_BS"][b, at] = document.token_ids[t]
            made["edit_mask_BSG"][b, at] = document.edit_mask[t]
            made["positions_BS"][b, at] = t
            made["segments_BS"][b, at] = segment + 1
            if t + 1 < len(document):
                made["targets_BS"][b, at] = document.token_ids[t + 1]
                made["weights_BS"][b, at] = document.loss_mask[t + 1]
    return made


@given(st.data())
def test_rows_hold_their_documents_one_after_the_other_and_padding_is_neither_learned_nor_edited(data):
    packed = data.draw(st.booleans())
    row = st.lists(documents(), min_size=1, max_size=3 if packed else 1)
    counts = st.integers(0, 2**32 - 1)
    part = st.builds(
        Rows, rows=st.lists(row, min_size=1, max_size=3), slot=st.integers(0, 7), seed=counts, count=counts
    )
    parts = data.draw(st.lists(part, min_size=1, max_size=3))
    num_rows = sum(len(part.rows) for part in parts) + data.draw(st.integers(0, 3))
    batch = collate(parts, num_rows=num_rows, max_length=90, packed=packed)
    for name, array in expected(parts, batch.tokens_BS.shape).items():
        if name == "segments_BS" and not packed:
            assert batch.segments_BS is None
        else:
            np.testing.assert_array_equal(getattr(batch, name), array, err_msg=name)


@given(st.data())
def test_no_target_crosses_documents_and_the_last_token_of_each_learns_nothing(data):
    rows = data.draw(st.lists(st.lists(documents(), min_size=1, max_size=4), min_size=1, max_size=3))
    batch = collate([Rows(rows, 0, 0, 0)], num_rows=len(rows), max_length=120, packed=True)
    segments = np.pad(batch.segments_BS, ((0, 0), (0, 1)))
    for b, t in np.argwhere(batch.weights_BS > 0):
        assert segments[b, t] == segments[b, t + 1] != 0
        assert batch.targets_BS[b, t] == batch.tokens_BS[b, t + 1]
    starts = (batch.positions_BS == 0) & (batch.segments_BS > 0)
    assert starts.sum(axis=1).tolist() == [len(row) for row in rows]
    assert batch.weights_BS.sum() == sum(document.loss_mask[1:].sum() for row in rows for document in row)


def one_row(length, max_length):
    document = cases.example(AdapterConfig(), np.random.default_rng(length), prompt=length - 1, answer=1)
    return collate([Rows([[document]], 0, 0, 0)], num_rows=1, max_length=max_length, packed=False)


def test_lengths_are_bucketed_so_that_few_programs_are_compiled():
    assert {one_row(length, 1000).tokens_BS.shape[1] for length in range(2, 1001)} == {32, 64, 128, 256, 512, 1024}


@pytest.mark.parametrize(("length", "max_length", "size"), [
    (2, 1024, SHORTEST), (32, 1024, 32), (33, 1024, 64), (600, 1024, 1024), (600, 640, 640), (600, 610, 640),
    (70, 96, 96), (65, 65, 96), (5, 5, 32),
])  # fmt: skip
def test_rows_are_not_padded_beyond_the_most_that_an_example_has(length, max_length, size):
    assert one_row(length, max_length).tokens_BS.shape == (1, size)


def test_arrays_have_the_types_that_the_step_takes():
    batch = one_row(9, 64)
    kinds = {name: array.dtype for name, array in batch._asdict().items() if array is not None}
    assert kinds == {
        "tokens_BS": np.int32, "targets_BS": np.int32, "weights_BS": np.float32, "edit_mask_BSG": np.bool_,
        "positions_BS": np.int32, "slot_B": np.int32, "draw_BU": np.uint32,
    }  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [("batch_size", 0), ("batch_size", -1), ("seed", -1), ("seed", 2**32)])
def test_numbers_that_cannot_work_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        BatchOptions(**{field: value})
