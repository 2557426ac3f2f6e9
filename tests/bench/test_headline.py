import json

import pytest

from bench import headline, tables

TINY = (
    "--model tiny --num-prompts 8 --input-len 32 --output-len 6 --max-num-seqs 4 --prefill-tokens 64 "
    "--num-adapters 1,4 --bank-adapters 2 --modes base,prefill-only"
)


def test_every_contender_serves_the_same_requests(capsys, tmp_path):
    path = tmp_path / "figures.json"
    assert headline.main([*TINY.split(), "--output-json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    rows = {(row["mode"], row["num_adapters"]): row for row in figures["rows"]}
    assert list(rows) == [("base", 0), ("prefill-only", 1), ("prefill-only", 4)]
    for row in rows.values():
        assert 8 * 6 / row["output_throughput"] == pytest.approx(row["seconds"], abs=6e-4)
        assert (row["most_running"], row["recompiles"]) == (4, 0)
    assert rows["prefill-only", 1]["adapter_loads"] == 0
    assert rows["prefill-only", 4]["adapter_loads"] > 0
    assert tables.engine(figures).count("\n| ") == len(rows) + 2


def test_all_token_adapters_must_all_fit_the_bank():
    assert headline.plan(["base", "prefill-only", "all-token"], [1, 64, 512], 64) == [
        ("base", 0, [0]),
        ("prefill-only", 64, [1, 64, 512]),
        ("all-token", 64, [1, 64]),
        ("all-token", 512, [512]),
    ]


def test_a_rank_that_fills_no_pages_is_refused(capsys):
    assert headline.main([*TINY.split(), "--rank", "12"]) == 1
    assert "--rank is 12" in capsys.readouterr().err
