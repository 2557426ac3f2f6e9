import copy
import json

import pytest

from bench import tables

pytestmark = pytest.mark.host


@pytest.mark.parametrize("schema", ["preft-jax/serve-bench/1", "preft-jax/serve-bench/2"])
def test_the_serve_table_reads_both_schemas_with_and_without_interval(schema):
    figures = json.loads((tables.RESULTS / "cpu-serve-bench.json").read_text()) | {"schema": schema}
    with_interval, without = copy.deepcopy(figures), copy.deepcopy(figures)
    for ratio in with_interval["ratio_to_base"].values():
        ratio |= {"low": ratio["mean"] - 0.25, "high": ratio["mean"] + 0.25}
    for ratio in without["ratio_to_base"].values():
        ratio.pop("low", None), ratio.pop("high", None)
    made = tables.cpu_serve_bench(with_interval)
    assert "1.00 (0.75 to 1.25)" in made
    assert " to " not in tables.cpu_serve_bench(without)
    assert tables.cpu_serve_bench(without).splitlines()[0] == made.splitlines()[0]


def test_every_committed_table_is_what_its_figures_say():
    assert tables.main(["--check"]) == 0


def test_a_table_that_is_not_measured_yet_keeps_its_place(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    empty = "before\n<!-- table h100-tiers -->\n<!-- end -->\nafter\n"
    assert tables.render(empty) == empty
    with pytest.raises(FileNotFoundError):
        tables.render(empty.replace("<!-- end", "| goodput |\n<!-- end"))
