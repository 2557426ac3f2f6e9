"""The compiled programs: buffers updated in place."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preft_jax.programs import DecodeState, programs

from preft_jax.adapters.bank import init_bank
from preft_jax.loading import serving_params
from preft_jax.models.batch import Span, pack_prefill, pack_rows
from preft_jax.models.cache import init_cache
from preft_jax.sampling.arrays import sampling_arrays
from preft_jax.shapes import NUM_GROUPS

PAGES, PAGE_SIZE, WIDTH, ROWS = 37, 8, 6, 4


@pytest.fixture(scope="module")
def compiled(tiny, compiled_here):
    """Return the optimised HLO of prefill, decode and decode_adapted."""
    cache = init_cache(tiny.config, PAGES, PAGE_SIZE, jnp.float32)
    bank = init_bank(tiny.config, 5, jnp.float32)
    span = Span(tokens=np.arange(9), start=0, edit_mask=np.ones((9, NUM_GROUPS), bool), kv_pages=[1, 2])
    batch = pack_prefill([span], num_tokens=32, num_requests=2, page_table_width=WIDTH, page_size=PAGE_SIZE, tile=16)
    zeros = np.zeros(ROWS, np.int32)
    state = DecodeState(zeros, zeros, zeros, np.zeros((ROWS, WIDTH), np.int32), np.full((ROWS, 4), -1, np.int32))
    state = jax.tree.map(jnp.asarray, state)
    sampling = sampling_arrays([], [], ROWS)
    params, p = serving_params(tiny, 4), programs(tiny.config)
    lowered = {
        "prefill": p.prefill.lower(params, bank, cache, batch, max_query_len=16),
        "decode": p.decode.lower(params, cache, state, sampling, num_steps=2),
        "decode_adapted": p.decode_adapted.lower(
            params, bank, pack_rows([{}] * ROWS), cache, state, sampling, num_steps=2
        ),
    }
    return {name: program.compile().as_text() for name, program in lowered.items()}


@pytest.mark.parametrize("program", ["prefill", "decode", "decode_adapted"])
def test_every_kv_buffer_is_aliased_and_never_copied(tiny, compiled, program):
    text = compiled[program]
    header = text.splitlines()[0]
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", header)
    assert aliases is not None
    row = f"{2 * tiny.config.num_key_value_heads},{tiny.config.head_dim}"
    kv, flat = f"f32[{PAGES},{PAGE_SIZE},{row}]", f"f32[{PAGES * PAGE_SIZE},{row}]"
    entry = text[text.index("\nENTRY ") :]
    pools = re.findall(rf"= {re.escape(kv)}\S* parameter\((\d+)\)", entry)
    assert len(pools) == tiny.config.num_hidden_layers, "the test looks for a shape that the program does not have"
    assert set(pools) <= set(re.findall(r"\((\d+), \{\}, m\w+-alias\)", aliases.group(1)))
    copies = [line for line in text.splitlines() if re.search(r"= \S+ copy\(", line) and (kv in line or flat in line)]
    assert not copies


@pytest.mark.parametrize("program", ["prefill", "decode_adapted"])
def test_the_bank_is_read_where_it_lies(tiny, compiled, program):
    """No copy of a pool of rank pages: a prefill that copied 84 MB an adapter would cost more than its edits."""
    text = compiled[program]
    shapes = {leaf.shape for leaf in jax.tree.leaves(init_bank(tiny.config, 5, jnp.float32)) if leaf.ndim == 4}
    names = [f"f32[{','.join(map(str, shape))}]" for shape in shapes]
    assert all(name in text for name in names), "the test looks for a shape that the program does not have"
    names += [f"f32[{','.join(map(str, (layers * pages, *rest)))}]" for layers, pages, *rest in shapes]
    copies = [line for line in text.splitlines() if re.search(r"= \S+ copy\(", line)]
    assert not [line for line in copies if any(name in line for name in names)]
