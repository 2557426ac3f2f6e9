import copy
import json

from bench import tables


def test_the_serve_table_reads_both_schemas_and_runs_without_interval():
    figures = json.loads((tables.RESULTS / "cpu-serve-bench.json").read_text())
    made = tables.cpu_serve_bench(figures)
    assert " to " in made
    short = copy.deepcopy(figures) | {"schema": "preft-jax/serve-bench/2", "contenders": []}
    for ratio in short["ratio_to_base"].values():
        ratio.pop("low"), ratio.pop("high")
    without = tables.cpu_serve_bench(short)
    assert " to " not in without
    assert without.splitlines()[0] == made.splitlines()[0]
