"""The engine's compiled programs: cache and bank are updated in place and never copied."""

import jax
import numpy as np
import pytest
from hlo import assert_in_place, copies_of, shape_of

from kernels.xla.fp8 import FP8
from preft_jax.shapes import BANK_SITES, PREFIX
from serve.engine.arrays import constants_of
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.programs import Slots, draw_plain
from serve.engine.rank_pages import RankPages

CONFIG = EngineConfig(
    max_num_seqs=4, max_model_len=48, page_size=8, num_kv_pages=37, prefill_tokens=32, prefill_seqs=2, tile=16,
    max_rank=16, bank_pages=5, all_token=True, bank_sites=BANK_SITES,
)  # fmt: skip
"""Its numbers of pages are no other size in any program."""
NAMES = ("prefill-32", "decode-4", "decode-adapted-4", "write-pages", "copy-pages", "write-prefix")


@pytest.fixture(scope="module")
def engine(tiny):
    return Engine(tiny, CONFIG)


@pytest.fixture(scope="module")
def compiled(engine, compiled_here):
    """Return the optimised HLO of each program; a GPU's engine has other numbers of rows."""
    programs = engine.runner.programs
    names = {name: name if name in programs else f"decode-{engine.runner.row_counts[-1]}" for name in NAMES}
    return {name: programs.trace(own).lower().compile().as_text() for name, own in names.items()}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "write-pages"])
def test_every_kv_buffer_is_aliased_and_never_copied(name, engine, compiled):
    assert_in_place(compiled[name], engine.runner.cache.kv)


@pytest.mark.parametrize("name", ["prefill-32", "decode-adapted-4"])
def test_the_bank_is_read_where_it_lies(name, engine, compiled):
    """No copy of a pool of rank pages: a prefill that copied 84 MB an adapter would cost more than its edits."""
    text = compiled[name]
    edits = [pools for site, pools in engine.runner.bank.sites.items() if site != PREFIX]
    shapes = {shape_of(leaf) for pools in edits for leaf in pools if leaf.ndim == 4}
    assert all(shape in text for shape in shapes), "the test looks for a shape that the program does not have"
    assert not copies_of(text, shapes)


def test_rank_pages_are_written_into_the_banks_own_buffers(engine, compiled):
    assert_in_place(compiled["write-pages"], jax.tree.leaves(engine.runner.bank))


def test_rank_pages_in_fp8_are_written_so_too(engine):
    """In the program that writes they become numbers of the bank's dtype."""
    runner = engine.runner
    pages = RankPages(runner.model.config, runner.spread, CONFIG.bank_sites, FP8, 2)
    for name in pages.programs:
        text = pages.trace(name, runner.bank).lower().compile().as_text()
        assert_in_place(text, jax.tree.leaves(runner.bank))
        assert "f8e4m3fn" in text


def test_a_draw_writes_all_slots_at_once(engine):
    """A scatter is a kernel of its own."""
    slots = engine.runner.slots
    picks, size = engine.runner.arrays.picks([], [], [], 4), CONFIG.max_num_seqs
    _, sampling = constants_of([], 4, plainly=True)
    text = jax.jit(draw_plain).lower(jax.numpy.zeros((4, 9)), slots, picks, sampling).as_text()
    (scatter,) = [line for line in text.splitlines() if '"stablehlo.scatter"' in line]
    assert "unique_indices = true" in scatter
    gathers = [line for line in text.splitlines() if '"stablehlo.gather"' in line]
    assert len([line for line in gathers if f"tensor<{size}x3xi32>" in line]) == 1


def test_slots_are_written_where_there_are_such_and_others_stay(rng):
    rows = rng.integers(0, 99, (5, 3)).astype(np.int32)
    slot = np.array([5, 3, 5, 0, 7, 5], np.int32)  # Several say the same slot that there is not.
    new = rng.integers(100, 199, (3, 6)).astype(np.int32)
    slots = Slots.of(*rows.T)
    np.testing.assert_array_equal(slots.row_S3, rows)
    np.testing.assert_array_equal(slots.holds(slot), [False, True, False, True, False, False])
    written = jax.jit(Slots.put)(slots, slot, *new)
    rows[3], rows[0] = new[:, 1], new[:, 3]
    np.testing.assert_array_equal(written.row_S3, rows)
    np.testing.assert_array_equal(np.stack(written.at(slot))[:, [1, 3]], new[:, [1, 3]])
