"""``bench.prefill`` at the smallest size, and its table."""

import json

import numpy as np
import pytest

from bench import prefill, tables
from preft_jax.config import PRESETS


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "figures.json"
    options = "--model tiny --selection small --rounds 2 --quantization fp8 --keep-layers 0"
    assert prefill.main([*options.split(), "--output-json", str(out)]) == 0
    return json.loads(out.read_text())


def test_figures_pair_every_case_with_its_base(figures):
    assert figures["schema"] == "preft-jax/prefill/1"
    assert (figures["options"]["quantization"], figures["options"]["keep_layers"]) == ("fp8", [0])
    assert [row["case"] for row in figures["cases"]] == [case.name for case in prefill.SMALL]
    for row in figures["cases"]:
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["tokens"] == 256
        assert row["kv_and_bank_copies"] == 0
    assert figures["device"]
    assert figures["versions"]["jax"]


def test_the_table_shows_every_case(figures):
    table = tables.prefill(figures)
    assert "prefill of tiny in fp8, tokens/s" in table
    for row in figures["cases"]:
        assert row["case"] in table
        assert f"{row['ratio']:.3f}" in table


def test_the_ratio_is_of_neighbouring_calls():
    """A base that slows down during the run must not show as a cost of the edits."""

    class Clock:
        def __init__(self, case, seconds):
            self.case, self.copies, self.kernel_calls, self.compile_seconds = case, 0, 0, 0.0
            self._seconds = iter(seconds)

        def __call__(self, cache):
            return next(self._seconds), cache

    drift = np.arange(1.0, 9.0)
    base, edited = Clock(prefill.SMALL[0], [1, 1, *drift[::2]]), Clock(prefill.SMALL[0], [1, 1, *(1.5 * drift[1::2])])
    row, _ = prefill.compare(base, edited, None, rounds=3)
    assert row["ratio"] == 1.5


def test_every_adapter_has_pages_of_its_own():
    config = PRESETS["tiny"]
    case = prefill.Case(name="x", requests=3, length=64, rank=48)
    batch = prefill.make_batch(config, case, np.random.default_rng(0))
    pages = [set(map(int, row)) for row in np.asarray(batch.tiles["q"].page_NE)]
    assert [page - {0} for page in pages] == [{1, 2, 3}, {4, 5, 6}, {7, 8, 9}]
    assert case.pages == 10
    assert not np.asarray(batch.tiles["block"].page_NE).any()
