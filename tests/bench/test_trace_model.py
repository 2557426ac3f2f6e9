"""The model of a trace: what it says moves with what it is told."""

import json

import pytest

from bench import trace_model

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Return a file of twenty seconds with four requests in each."""
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for i in range(80):
        when = f"2023-11-16 18:15:{i // 4:02d}.{i % 4 * 25:02d}00000"
        lines.append(f"{when},{200 + 37 * i % 900},{20 + 11 * i % 60}")
    path.write_text("\n".join(lines) + "\n")
    return path


def run(path, capsys, *arguments):
    assert trace_model.main([str(path), *arguments]) in (0, None)
    return {row["variant"]: row for row in json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]}


@pytest.mark.parametrize("better", ["mixed", "all-off"])
def test_what_is_not_padded_or_waited_for_shortens_tpot(better, trace, capsys):
    found = run(trace, capsys, "--rates", "16", "--variants", f"now,{better}")
    assert found[better]["tpot_ms"] < found["now"]["tpot_ms"]


def test_more_load_takes_longer(trace, capsys):
    slow, fast = (run(trace, capsys, "--rates", rate, "--variants", "now")["now"] for rate in ("2", "30"))
    assert slow["tpot_ms"] < fast["tpot_ms"]
