"""``bench.coserve`` on the tiny preset: contenders, figures kept after each, going on, and what is refused."""

import json

import pytest

from bench import coserve
from preft_jax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_layer_tiny")

OPTIONS = (
    "--model tiny --request-rate 8 --minutes 0.02 --prompt-tokens 12 --output-tokens 6 --seq 32 --window-tokens 32 "
    "--window-layers 3 --max-num-seqs 4 --max-model-len 64 --prefill-tokens 64 --temporal-seconds 0.2 "
    "--train-seconds 0.2 --tpot-ms 200 --decode-steps 2"
)


def run(*more):
    return coserve.main([*OPTIONS.split(), *more])


def test_contenders_are_measured_and_the_figures_go_on(tmp_path, capsys, monkeypatch):
    out = tmp_path / "figures.json"
    assert run("--contenders", "train-step,coserve,temporal", "--output-json", str(out)) == 0
    figures = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    step, beside, temporal = figures["rows"]
    assert [row["contender"] for row in figures["rows"]] == ["train-step", "coserve", "temporal-0.2"]
    for row in (beside, temporal):
        assert row["completed"] == row["requests"] == figures["traces"][0]["requests"] > 2
        assert (row["device_failures"], row["request_rate"]) == (0, 8.0)
        assert set(row["attainment"]) == {"flexllm", "loquetier", "deltaserve"}
        assert 0 < row["mean_ttft_ms"] <= row["p99_ttft_ms"]
        assert sum(row["by_second"]["requests"]) == row["requests"]
        share = row["fine_tuning_tokens_per_s"] / step["fine_tuning_tokens_per_s"]
        assert row["of_standalone"] == pytest.approx(share, abs=1e-4)
    assert beside["fine_tuning_tokens_per_s"] > 0

    def fails(*_):
        raise ConfigError("nothing is to be measured")

    monkeypatch.setattr(coserve, "make_machine", fails)
    again = ("--continue-json", str(out), "--output-json", str(tmp_path / "more.json"))
    assert run("--contenders", "train-step,coserve", *again) == 0, "all of it was measured"
    assert run("--contenders", "alone", *again) == 1
    assert "nothing is to be measured" in capsys.readouterr().err
    assert run("--contenders", "alone", *again, "--seq", "64") == 1
    assert "was made with seq 32; give the same options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--contenders both", "--contenders has 'both'"),
        ("--request-rate 0", "--request-rate is '0'; give numbers above 0"),
        ("--temporal-seconds x", "--temporal-seconds is 'x'; give numbers, with commas"),
        ("--jobs 0", "--jobs is 0; give at least 1"),
        ("--minutes -1", "--minutes is -1"),
        ("--speedup 2", "--speedup is of a trace"),
        ("--request-rate 0.001", "no request arrives"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, told, capsys):
    assert run(*options.split()) == 1
    assert told in capsys.readouterr().err


def test_a_trace_arrives_at_each_rate(tmp_path):
    path = tmp_path / "trace.csv"
    lines = [f"2024-05-10 00:00:{n:02d}.000000,{10 + n},4" for n in range(0, 60, 2)]
    lines += [f"2024-05-10 00:01:00.{n:06d},9,4" for n in range(500)]  # What is not played does not count.
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    args = coserve.make_parser().parse_args(["--trace", str(path), "--request-rate", "1,2", "--minutes", "0.1"])
    found = coserve.traces(args)
    assert [len(one.arrivals) for one in found.values()] == [6, 12]
    assert found[1.0].arrivals[:3] == [0.0, 1.0, 2.0]
    assert found[2.0].arrivals[:3] == [0.0, 0.5, 1.0]
    assert found[2.0].prompt_lens[:2] == [10, 12]
