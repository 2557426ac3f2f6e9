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


@pytest.fixture
def given(monkeypatch):
    """Return what may be changed: bytes that the process may take, and those it uses."""
    bytes_of = {"limit": 80 * 10**9, "in_use": 16 * 10**9}
    monkeypatch.setattr(memory, "limit", lambda: bytes_of["limit"])
    monkeypatch.setattr(memory, "in_use", lambda: bytes_of["in_use"])
    return bytes_of


def share_out(config=CONFIG, staged_pages=0):
    return memory.share_out(
        MODEL, config, jnp.dtype("bfloat16"), held=(), table_width=128, logit_rows=512, staged_pages=staged_pages,
        writes=8,
    )  # fmt: skip


def test_pages_and_working_memory_are_what_may_be_taken(given):
    for utilization in (0.5, 0.9):
        room = share_out(dataclasses.replace(CONFIG, memory_utilization=utilization))
        taken = given["in_use"] + room.kv_pages * PAGE + room.working_bytes
        assert 0 <= given["limit"] * utilization - taken < PAGE


def test_copies_of_adapters_take_from_the_pages_and_fewer_where_memory_is_short(given):
    without, few, many = share_out(), share_out(staged_pages=32), share_out(staged_pages=10**6)
    assert (without.staged_pages, few.staged_pages) == (0, 32)
    assert few.working_bytes - without.working_bytes == (32 + 1 + 8) * SLAB
    assert few.kv_pages == pytest.approx(without.kv_pages - 41 * SLAB / PAGE, abs=1)
    assert 32 < many.staged_pages < 10**6
    given["in_use"] = 60 * 10**9
    assert share_out(staged_pages=32).staged_pages < 32


def test_no_more_pages_than_all_rows_can_fill(given):
    assert share_out(dataclasses.replace(CONFIG, max_num_seqs=2)).kv_pages == 2 * 128


def test_no_room_for_one_sequence_is_said(given):
    given["in_use"] = 71 * 10**9
    with pytest.raises(ConfigError, match="KV pages of 8192 KiB fit beside the weights and 1 rank pages"):
        share_out()


def test_a_bank_for_some_sites_has_smaller_pages(given):
    linears = dataclasses.replace(CONFIG, bank_sites=LINEAR_SITES)
    with_block, without = share_out(staged_pages=32), share_out(linears, staged_pages=32)
    assert with_block.working_bytes - without.working_bytes == (32 + 1 + 8) * 16 * 32 * 2 * 2 * MODEL.hidden_size
    assert without.kv_pages > with_block.kv_pages


def test_all_token_adapters_leave_memory_to_the_rows(given):
    given["in_use"] = 60 * 10**9
    prefill_only, all_token = (
        share_out(dataclasses.replace(CONFIG, all_token=all_token), staged_pages=32) for all_token in (False, True)
    )
    assert 8 <= all_token.staged_pages < prefill_only.staged_pages
    assert all_token.kv_pages > prefill_only.kv_pages
