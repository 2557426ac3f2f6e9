"""How an engine divides an accelerator's memory, by the sizes of Llama 3.1 8B on 80 GB."""

import dataclasses

import jax.numpy as jnp
import pytest

from preft_jax.config import PRESETS
from preft_jax.errors import ConfigError
from preft_jax.shapes import LINEAR_SITES
from serve.engine import memory
from serve.engine.config import EngineConfig

pytestmark = pytest.mark.host

MODEL = PRESETS["llama3-8b"]
CONFIG = EngineConfig(max_num_seqs=512, max_model_len=8192, page_size=64, prefill_tokens=8192, tile_entries=1)
PAGE, SLAB = 8 << 20, 16 * 32 * 2 * 90_112  # The last is the sum of the widths of all linears and the stream.


def share_out(config=CONFIG, staged_pages=0, free=int(0.9 * 80e9) - 16 * 10**9, **dtypes):
    dtypes = {"dtype": "bfloat16", "kv_dtype": "bfloat16", "adapter_dtype": "bfloat16", **dtypes}
    return memory.share_out(
        MODEL, config, free, **{name: jnp.dtype(one) for name, one in dtypes.items()}, table_width=128, logit_rows=512,
        staged_pages=staged_pages, writes=8,
    )  # fmt: skip


def test_pages_and_what_calls_need_are_what_may_be_taken():
    for free in (20 * 10**9, 50 * 10**9):
        room = share_out(free=free)
        assert 0 <= free - (room.kv_pages * PAGE + room.call_bytes + room.staged_bytes) < PAGE
    reserved = share_out(dataclasses.replace(CONFIG, reserved_bytes=100 * PAGE), free=free)
    assert reserved.kv_pages == room.kv_pages - 100


def test_the_cache_and_rank_pages_have_dtypes_of_their_own():
    usual, wide_kv, wide_pages = (
        share_out(staged_pages=32, **dtypes) for dtypes in ({}, {"kv_dtype": "float32"}, {"adapter_dtype": "float32"})
    )
    assert wide_kv.kv_pages == usual.kv_pages // 2
    assert wide_kv.staged_bytes == usual.staged_bytes
    assert wide_pages.staged_bytes == 2 * usual.staged_bytes
    assert wide_pages.call_bytes == usual.call_bytes


def test_copies_of_adapters_take_from_the_pages_and_fewer_where_memory_is_short():
    without, few, many = share_out(), share_out(staged_pages=32), share_out(staged_pages=10**6)
    assert (without.staged_pages, few.staged_pages) == (0, 32)
    assert few.staged_bytes - without.staged_bytes == (32 + 1 + 8) * SLAB
    assert few.kv_pages == pytest.approx(without.kv_pages - 41 * SLAB / PAGE, abs=1)
    assert 32 < many.staged_pages < 10**6
    assert share_out(staged_pages=32, free=12 * 10**9).staged_pages < 32


def test_no_more_pages_than_all_rows_can_fill():
    assert share_out(dataclasses.replace(CONFIG, max_num_seqs=2)).kv_pages == 2 * 128


def test_no_room_for_one_sequence_is_said():
    with pytest.raises(ConfigError, match="KV pages of 8192 KiB fit beside the weights and 1 rank pages"):
        share_out(free=10**9)


def test_a_bank_for_some_sites_has_smaller_pages():
    linears = dataclasses.replace(CONFIG, bank_sites=LINEAR_SITES)
    with_block, without = share_out(staged_pages=32), share_out(linears, staged_pages=32)
    assert with_block.staged_bytes - without.staged_bytes == (32 + 1 + 8) * 16 * 32 * 2 * 2 * MODEL.hidden_size
    assert without.kv_pages > with_block.kv_pages


def test_all_token_adapters_leave_memory_to_the_rows():
    prefill_only, all_token = (
        share_out(dataclasses.replace(CONFIG, all_token=all_token), staged_pages=32, free=12 * 10**9)
        for all_token in (False, True)
    )
    assert 8 <= all_token.staged_pages < prefill_only.staged_pages
    assert all_token.kv_pages > prefill_only.kv_pages
