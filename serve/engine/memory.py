"""How an engine divides an accelerator's memory: KV pages, adapters' copies on their way, and what calls work in."""

from typing import NamedTuple

import numpy as np

from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError
from preft_jax.models.shard import shard_config
from preft_jax.shapes import RANK_PAGE
from serve.engine.config import EngineConfig


class Room(NamedTuple):
    """What there is room for.

    Attributes:
        kv_pages: pages of the cache.
        staged_pages: rank pages that may be copied ahead.
        call_bytes: what calls need beside all else.
        staged_bytes: what rank pages take that are copied ahead or written.
    """

    kv_pages: int
    staged_pages: int
    call_bytes: int = 0
    staged_bytes: int = 0


def share_out(
    model: ModelConfig,
    config: EngineConfig,
    free: int,
    *,
    dtype: np.dtype,
    kv_dtype: np.dtype,
    adapter_dtype: np.dtype,
    table_width: int,
    logit_rows: int,
    staged_pages: int,
    writes: int,
    num_devices: int = 1,
) -> Room:
    """Return what there is room for: KV pages for all rows, or what memory leaves.

    Args:
        model: sizes of the model.
        config: of the engine.
        free: bytes of an accelerator that the engine may take beside weights and bank.
        dtype: of the weights, in which calls compute.
        kv_dtype: of the cache.
        adapter_dtype: of rank pages on their way to the bank.
        table_width: KV pages of the longest sequence.
        logit_rows: rows of the buffer of logits.
        staged_pages: rank pages to be copied ahead, fewer where memory is short; 0: there are no adapters.
        writes: rank pages that one call writes.
        num_devices: devices that the model is cut over, each with so much memory.

    Raises:
        ConfigError: if not even one sequence fits.
    """
    free -= config.reserved_bytes
    own = shard_config(model, num_devices)
    layer = config.prefill_tokens * (4 * own.hidden_size + 3 * own.intermediate_size) * dtype.itemsize
    page = 2 * own.num_hidden_layers * own.kv_size * kv_dtype.itemsize * (config.page_size or 1)
    calls = 2 * layer + 6 * 4 * logit_rows * model.vocab_size
    if config.role != "both":  # The KV of prompts on its way, of two calls.
        calls += 2 * config.prefill_seqs * table_width * page
    staged = 0
    if staged_pages:
        widths = sum(map(sum, map(model.site_shape, config.bank_sites)))
        slab = RANK_PAGE * widths * model.num_hidden_layers * adapter_dtype.itemsize
        # With all-token adapters, memory is what limits the rows of a step, and a bank seldom changes.
        # Slabs lie cut over devices; those being written are gathered on each, whole and then in its own parts.
        part, gathered = slab // num_devices, 2 * slab if num_devices > 1 else slab
        staged_pages = max(writes, min(staged_pages, (free - calls) // (16 if config.all_token else 6) // part))
        # Copies that wait to be written, and those being written.
        staged = (staged_pages + (config.tile_entries or 1)) * part + writes * gathered
    fitting = (free - calls - staged) // page
    if fitting < table_width:
        raise ConfigError(
            f"{fitting} KV pages of {page >> 10} KiB fit beside the weights and {config.bank_pages} rank pages; one "
            f"sequence of max_model_len {config.max_model_len} needs {table_width}: lower bank_pages, "
            "bank_sites, max_model_len, prefill_tokens, reserved_bytes or max_num_seqs"
        )
    return Room(min(fitting, config.max_num_seqs * table_width), staged_pages, calls, staged)
