"""How an engine divides an accelerator's memory: KV pages, adapters' copies on their way, and what calls work in."""

from typing import Any, NamedTuple

import jax
import numpy as np

from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError
from preft_jax.shapes import RANK_PAGE
from serve.engine.config import EngineConfig


class Room(NamedTuple):
    """``kv_pages`` of the cache, rank pages that may be copied ahead, and the bytes that calls need beside both."""

    kv_pages: int
    staged_pages: int
    working_bytes: int


def limit() -> int | None:
    """Return the bytes that the process may take of an accelerator; None where that means nothing, as on a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    return None if jax.default_backend() == "cpu" else stats.get("bytes_limit")


def in_use() -> int:
    """Return the bytes of an accelerator that the process uses."""
    return (jax.devices()[0].memory_stats() or {})["bytes_in_use"]


def share_out(
    model: ModelConfig,
    config: EngineConfig,
    dtype: np.dtype,
    *,
    held: Any,
    table_width: int,
    logit_rows: int,
    staged_pages: int,
    writes: int,
) -> Room:
    """Return what there is room for: KV pages for all rows, or what memory leaves.

    Args:
        model: sizes of the model.
        config: of the engine.
        dtype: of the weights and the cache.
        held: arrays that are being made, counted as used.
        table_width: KV pages of the longest sequence.
        logit_rows: rows of the buffer of logits.
        staged_pages: rank pages to be copied ahead, fewer where memory is short; 0: there are no adapters.
        writes: rank pages that one call writes.

    Raises:
        ConfigError: if not even one sequence fits.
    """
    jax.block_until_ready(held)
    most = int((limit() or 0) * config.memory_utilization)
    free, size = most - in_use(), dtype.itemsize
    layer = config.prefill_tokens * (4 * model.hidden_size + 3 * model.intermediate_size) * size
    working = 2 * layer + 6 * 4 * logit_rows * model.vocab_size
    if staged_pages:
        slab = RANK_PAGE * sum(map(sum, map(model.site_shape, config.bank_sites))) * model.num_hidden_layers * size
        # With all-token adapters, memory is what limits the rows of a step, and a bank seldom changes.
        staged_pages = max(writes, min(staged_pages, (free - working) // (16 if config.all_token else 6) // slab))
        # Copies that wait to be written, and those being written.
        working += (staged_pages + (config.tile_entries or 1) + writes) * slab
    page = 2 * model.num_hidden_layers * model.kv_size * size * (config.page_size or 1)
    fitting = (free - working) // page
    if fitting < table_width:
        raise ConfigError(
            f"{fitting} KV pages of {page >> 10} KiB fit beside the weights and {config.bank_pages} rank pages; one "
            f"sequence of max_model_len {config.max_model_len} needs {table_width}: lower bank_pages, "
            "bank_sites, max_model_len, prefill_tokens or max_num_seqs"
        )
    return Room(min(fitting, config.max_num_seqs * table_width), staged_pages, working)
