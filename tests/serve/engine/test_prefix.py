import dataclasses
import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preft_jax.text.chat import EncodedPrompt
from serve.engine.admission import Admission
from serve.engine.config import EngineConfig
from serve.engine.pages import PageManager
from serve.engine.prefix import PageKeys, adapter_salt, cache_salt
from serve.engine.request import Request

pytestmark = pytest.mark.host

PARTS = {"base": "llama", "kv_dtype": "bfloat16"}
SALT = cache_salt(**PARTS)
ADAPTER = {"digest": "0a1b", "fold_version": 1, "adapter_dtype": "float32"}
EDITS = adapter_salt(**ADAPTER)
OTHER = adapter_salt(**ADAPTER | {"digest": "2c3d"})


def draw(rng, num_tokens, groups=2):
    return rng.integers(2**31, size=num_tokens).tolist(), rng.random((num_tokens, groups)) < 0.5


def test_a_key_is_the_documented_hash():
    tokens = [1, 2, 2**31 - 1, 4, 5]
    mask_TG = np.array([[1, 0], [0, 1], [1, 1], [0, 0], [1, 0]], bool)
    parent = hashlib.sha256(SALT).digest()
    first = hashlib.sha256(parent + struct.pack("<qiiq", 2, 1, 2, 2) + bytes([0b10010000]) + EDITS).digest()
    second = hashlib.sha256(first + struct.pack("<qiiq", 2, 2**31 - 1, 4, 2) + bytes([0b11000000])).digest()
    assert PageKeys(SALT, 2, EDITS).keys(tokens, mask_TG, 5) == [first, second]


def test_only_full_pages_have_a_key(rng):
    tokens, mask_TG = draw(rng, 12)
    for num_tokens in range(13):
        assert len(PageKeys(SALT, 4, EDITS).keys(tokens, mask_TG, num_tokens)) == num_tokens // 4


def test_what_lies_beyond_the_full_pages_does_not_matter(rng):
    tokens, mask_TG = draw(rng, 7)
    keys = PageKeys(SALT, 4, EDITS).keys(tokens, mask_TG, 7)
    assert PageKeys(SALT, 4, EDITS).keys([*tokens[:4], 0, 0, 0, 9], np.r_[mask_TG[:4], ~mask_TG[4:]], 6) == keys


def test_any_integer_sequence_of_tokens_has_the_same_keys(rng):
    tokens, mask_TG = draw(rng, 8)
    expected = PageKeys(SALT, 4, EDITS).keys(tokens, mask_TG, 8)
    for other in (tuple(tokens), np.array(tokens, np.int32), np.array(tokens, np.int64)):
        assert PageKeys(SALT, 4, EDITS).keys(other, mask_TG, 8) == expected
    assert PageKeys(SALT, 4, EDITS).keys(tokens, np.asfortranarray(mask_TG), 8) == expected


adapters = st.sampled_from([EDITS, OTHER])
rows = st.tuples(st.integers(0, 1), st.tuples(st.booleans(), st.booleans()))


@st.composite
def two_histories(draw):
    """Draw two sequences of (token, mask row) that agree up to a few changed rows, so that both outcomes are common."""
    one = draw(st.lists(rows, min_size=1, max_size=16))
    other = list(one)
    for place in draw(st.lists(st.integers(0, len(one) - 1), max_size=2)):
        other[place] = draw(rows)
    return one, other


def keys_of(adapter, history, page_size, salt=SALT):
    mask_TG = np.array([mask for _, mask in history], bool)
    return PageKeys(salt, page_size, adapter).keys([token for token, _ in history], mask_TG, len(history))


def edited(history):
    return any(any(mask) for _, mask in history)


@given(two_histories(), adapters, adapters, st.integers(1, 5))
def test_keys_are_equal_iff_everything_so_far_is(histories, adapter_1, adapter_2, size):
    one, other = histories
    keys_1, keys_2 = keys_of(adapter_1, one, size), keys_of(adapter_2, other, size)
    for page, (key_1, key_2) in enumerate(zip(keys_1, keys_2, strict=True)):
        so_far = one[: (page + 1) * size]
        same = so_far == other[: (page + 1) * size] and (adapter_1 == adapter_2 or not edited(so_far))
        assert (key_1 == key_2) == same


@given(st.lists(rows, min_size=1, max_size=16), st.integers(1, 5))
def test_pages_before_the_first_edited_token_have_the_base_models_keys(history, size):
    base = keys_of(None, [(token, (False, False)) for token, _ in history], size)
    for page, (key, plain) in enumerate(zip(keys_of(EDITS, history, size), base, strict=True)):
        assert (key == plain) == (not edited(history[: (page + 1) * size]))


def test_an_edited_page_without_an_adapter_has_no_key(rng):
    tokens, mask_TG = rng.integers(9, size=8).tolist(), np.zeros((8, 2), bool)
    mask_TG[5, 1] = True
    page_keys = PageKeys(SALT, 4)
    assert len(page_keys.keys(tokens, mask_TG, 7)) == 1
    with pytest.raises(ValueError, match="from 4 on is edited, and there is no adapter"):
        page_keys.keys(tokens, mask_TG, 8)


@given(st.lists(rows, min_size=1, max_size=16), st.integers(1, 5))
def test_no_two_pages_of_any_depth_or_size_share_a_key(history, size):
    keys = keys_of(EDITS, history, size) + keys_of(EDITS, history, size + 1)
    assert len(set(keys)) == len(keys)


def test_one_mask_bit_early_changes_all_later_keys(rng):
    tokens, mask_TG = draw(rng, 64)
    changed_TG = mask_TG.copy()
    changed_TG[17, 1] ^= True
    keys, changed = (PageKeys(SALT, 8, EDITS).keys(tokens, mask, 64) for mask in (mask_TG, changed_TG))
    assert [a == b for a, b in zip(keys, changed, strict=True)] == [True] * 2 + [False] * 6


def test_one_token_early_changes_all_later_keys(rng):
    tokens, mask_TG = draw(rng, 64)
    keys = PageKeys(SALT, 8, EDITS).keys(tokens, mask_TG, 64)
    tokens[17] ^= 1
    changed = PageKeys(SALT, 8, EDITS).keys(tokens, mask_TG, 64)
    assert [a == b for a, b in zip(keys, changed, strict=True)] == [True] * 2 + [False] * 6


@pytest.mark.parametrize("name", PARTS)
def test_each_part_of_the_salt_changes_all_keys(rng, name):
    tokens, mask_TG = draw(rng, 16)
    other = cache_salt(**PARTS | {name: "other"})
    keys = PageKeys(SALT, 4, EDITS).keys(tokens, mask_TG, 16)
    assert not set(keys) & set(PageKeys(other, 4, EDITS).keys(tokens, mask_TG, 16))


@pytest.mark.parametrize("name", ADAPTER)
def test_each_part_of_the_adapters_salt_changes_the_keys_from_the_first_edited_page_on(rng, name):
    tokens, mask_TG = draw(rng, 16)
    mask_TG[:8], mask_TG[9] = False, True
    other = adapter_salt(**ADAPTER | {name: 2 if name == "fold_version" else "other"})
    keys = PageKeys(SALT, 4, EDITS).keys(tokens, mask_TG, 16)
    changed = PageKeys(SALT, 4, other).keys(tokens, mask_TG, 16)
    assert [a == b for a, b in zip(keys, changed, strict=True)] == [True, True, False, False]


def test_the_number_of_groups_is_part_of_a_key(rng):
    tokens, _ = draw(rng, 4)
    keys = {PageKeys(SALT, 4, EDITS).keys(tokens, np.ones((4, groups), bool), 4)[0] for groups in (1, 2, 3)}
    # Two tokens' bits fill less than a byte, so without the number these would be the same.
    keys |= {PageKeys(SALT, 2, EDITS).keys(tokens, np.zeros((4, groups), bool), 2)[0] for groups in (1, 2, 3)}
    assert len(keys) == 6


@given(st.data())
def test_growing_gives_the_keys_of_starting_anew(data):
    size = data.draw(st.integers(1, 5))
    history = data.draw(st.lists(rows, min_size=1, max_size=24))
    tokens, mask_TG = [token for token, _ in history], np.array([mask for _, mask in history], bool)
    page_keys = PageKeys(SALT, size, EDITS)
    # Lengths may go back: a preempted request asks for its first pages again.
    for length in data.draw(st.lists(st.integers(0, len(history)), min_size=1, max_size=6)):
        grown = page_keys.keys(tokens[:length], mask_TG[:length], length)
        assert grown == PageKeys(SALT, size, EDITS).keys(tokens, mask_TG, length)


def test_a_page_is_hashed_once(rng):
    tokens, mask_TG = draw(rng, 12)
    page_keys = PageKeys(SALT, 4, EDITS)
    first = page_keys.keys(tokens, mask_TG, 8)
    expected = PageKeys(SALT, 4, EDITS).keys(tokens, mask_TG, 12)
    unreadable = [None] * 8 + tokens[8:]
    assert page_keys.keys(unreadable, mask_TG, 11) == first
    assert page_keys.keys(unreadable, mask_TG, 12) == expected


def test_the_caller_may_change_the_list_it_got(rng):
    tokens, mask_TG = draw(rng, 8)
    page_keys = PageKeys(SALT, 4, EDITS)
    page_keys.keys(tokens, mask_TG, 8).clear()
    assert page_keys.keys(tokens, mask_TG, 8) == PageKeys(SALT, 4, EDITS).keys(tokens, mask_TG, 8)


def test_what_cannot_be_hashed_is_refused(rng):
    tokens, mask_TG = draw(rng, 8)
    page_keys = PageKeys(SALT, 4, EDITS)
    for num_tokens in (9, -1):
        with pytest.raises(ValueError, match=f"num_tokens is {num_tokens}"):
            page_keys.keys(tokens, mask_TG, num_tokens)
    with pytest.raises(ValueError, match="8 tokens and 7 mask rows"):
        page_keys.keys(tokens, mask_TG[:7], 8)
    with pytest.raises(ValueError, match="7 tokens and 8 mask rows"):
        page_keys.keys(tokens[:7], mask_TG, 8)
    for wrong in (mask_TG.astype(np.int32), mask_TG[:, 0]):
        with pytest.raises(ValueError, match="must be bool"):
            page_keys.keys(tokens, wrong, 8)
    with pytest.raises(struct.error):  # a token id is never wrapped around
        page_keys.keys([2**32, *tokens[1:]], mask_TG, 8)
    with pytest.raises(ValueError, match="page_size is 0"):
        PageKeys(SALT, 0)


part = st.text(st.sampled_from("a1\0\4\xe9"), max_size=3)
salt_parts = st.fixed_dictionaries({"base": part, "kv_dtype": part, "salt": st.none() | part})
adapter_parts = st.fixed_dictionaries({"digest": part, "fold_version": st.integers(0, 12), "adapter_dtype": part})


@given(salt_parts, salt_parts)
def test_salts_are_equal_iff_all_parts_are(one, other):
    assert (cache_salt(**one) == cache_salt(**other)) == (one == other)


@given(adapter_parts, adapter_parts)
def test_adapter_salts_are_equal_iff_all_parts_are(one, other):
    assert (adapter_salt(**one) == adapter_salt(**other)) == (one == other)


def test_text_moved_from_one_part_to_the_next_makes_another_salt():
    def salt(base, kv_dtype, salt=None):
        return cache_salt(base=base, kv_dtype=kv_dtype, salt=salt)

    moved = [
        salt("ab", "c", "d"),
        salt("a", "bc", "d"),
        salt("a", "b", "cd"),
        salt("abcd", "", ""),
        salt("", "", "abcd"),
    ]
    moved += [salt("a", "b", "c"), salt("a", "bc"), salt("ab", "c"), salt("a", "b")]
    adapters = ("c", 11, ""), ("c1", 1, ""), ("c11", 0, ""), ("c", 1, "1")
    moved += [adapter_salt(digest=digest, fold_version=v, adapter_dtype=dtype) for digest, v, dtype in adapters]
    assert len(set(moved)) == len(moved)


def test_an_adapter_named_like_another_part_does_not_collide(rng):
    names = ["llama", "bfloat16", "1", "base", "adapter:", "None", "", "adapter:0a1b"]
    # The last is what another component looks like once it is encoded.
    names += [SALT.decode()]
    tokens, mask_TG = rng.integers(9, size=4).tolist(), np.ones((4, 2), bool)
    keys = {
        PageKeys(cache_salt(**PARTS | {"base": base}), 4, adapter_salt(**ADAPTER | {"digest": name})).keys(
            tokens, mask_TG, 4
        )[0]
        for name in names
        for base in ("llama", "0a1b")
    }
    assert len(keys) == 2 * len(names)


def test_a_base_model_in_fp8_shares_no_page_with_the_plain_one(tiny_text):
    """Though their digests are the same, so that adapters load on both."""

    def first_key(model):
        config = EngineConfig(max_num_seqs=1, max_model_len=64)
        pages, seeds = PageManager(16, 4), np.random.default_rng(0)
        admission = Admission(model, config, pages, lambda digest: True, "float32", "float32", seeds)
        (sequence,) = admission.sequences(Request(prompt=EncodedPrompt((1, 2, 3, 4), ()), max_tokens=1), 0)
        return sequence.keys.keys([1, 2, 3, 4], np.zeros((4, 2), bool), 4)[0]

    models = [dataclasses.replace(tiny_text, quantization=name) for name in ("none", "fp8", "fp8, layers 0 kept")]
    assert len({first_key(model) for model in models}) == 3
    assert len({model.digest for model in models}) == 1
