"""``python -m bench.background``: what it measures of other work beside requests."""

import json

import pytest

from bench import background

pytestmark = pytest.mark.usefixtures("one_layer_tiny")

SMALL = [
    "--model", "tiny", "--size", "64", "--rows", "2", "--requests", "2", "--idle-seconds", "0.2", "--input-len", "16",
    "--output-len", "16", "--prefill-tokens", "64", "--units", "2",
]  # fmt: skip


def test_a_run_has_a_row_for_each_size_of_units(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert background.main([*SMALL, "--output-json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert figures == json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = figures["rows"]
    assert row["idle_share"] > 0
    assert row["units_beside"] >= 0
    assert 0 <= row["ahead"] <= 1
    assert all(row["gap_ms"][name]["beside"] >= 0 for name in ("p50", "p99", "most"))


@pytest.mark.parametrize(("options", "message"), [(["--rows", "0"], "--rows is 0"), (["--model", "no"], "no")])
def test_wrong_options_are_named(options, message, capsys):
    assert background.main([*SMALL, *options]) == 1
    assert message in capsys.readouterr().err
