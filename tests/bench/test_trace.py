"""``bench.trace`` on a tiny model and a trace written here: what is served, and that figures agree with each other."""

import json

import pytest

from bench import tables, trace
from preft_jax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_layer_tiny")

LENGTHS = ((30, 5), (12, 9), (70, 4), (1, 6), (25, 1), (90, 20), (8, 8), (16, 3))
"""Tokens of prompt and output."""

OPTIONS = (
    "--model tiny --num-adapters 3 --bank-adapters 2 --max-num-seqs 4 --prefill-tokens 64 --capacity-prompts 5 "
    "--max-model-len 96"
)


@pytest.fixture
def recorded(tmp_path):
    """Return a trace of eight requests in 3.5 s, and one that comes a minute later."""
    path = tmp_path / "trace.csv"
    rows = [f"2024-05-10 00:00:0{i / 2:.3f},{prompt},{output}" for i, (prompt, output) in enumerate(LENGTHS)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, "2024-05-10 00:01:04,5,5", ""]))
    return path


@pytest.fixture
def loads(monkeypatch):
    """Return what is served, in order: requests, and whether there were adapters."""
    seen, real = [], trace.load

    def load(engine, requests, adapters, most=None):
        seen.append((requests, bool(adapters)))
        return real(engine, requests, adapters, most)

    monkeypatch.setattr(trace, "load", load)
    return seen


def run(path, *more):
    return trace.main(["--trace", str(path), *OPTIONS.split(), "--minutes", "1", *more])


def test_both_contenders_serve_the_trace_at_the_load_that_was_asked_for(recorded, loads, capsys, tmp_path):
    out = tmp_path / "figures.json"
    assert run(recorded, "--load", "2", "--output-json", str(out)) == 0
    figures, printed = json.loads(out.read_text()), capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == figures
    assert "1 of 8 requests were clipped to 96 tokens" in printed.err
    # Before capacity and before each turn there is something that is not counted.
    counts = [len(requests) for requests, _ in loads]
    assert counts == [4, 5, 4, 8, 4, 8]
    (capacity, _), (base, _), (adapted, _) = loads[1::2]
    assert [request.arrival for request in capacity] == [0.0] * 5
    clipped = [(min(prompt, 96 - output), output) for prompt, output in LENGTHS]
    for requests in (base, adapted):
        assert [(len(request.prompt), request.max_tokens) for request in requests] == clipped
    assert [request.prompt for request in base] == [request.prompt for request in adapted]
    assert [request.prompt for request in capacity] == [request.prompt for request in base[:5]]
    assert {request.user for request in base} == {None} != {request.user for request in adapted}
    found = figures["capacity"]
    assert 5 / found["requests_per_s"] == pytest.approx(found["seconds"], abs=6e-4)  # Rounded to milliseconds.
    assert figures["trace"]["requests_per_s"] == 2.0
    assert figures["offered_requests_per_s"] == pytest.approx(2 * found["requests_per_s"], rel=1e-3)
    assert [request.arrival for request in base] == pytest.approx([i / 2 / figures["speedup"] for i in range(8)], 1e-3)
    assert [request.arrival for request in base] == [request.arrival for request in adapted]


def test_the_figures_of_a_contender_agree(recorded, loads, capsys):
    """With bounds that all meet, goodput is throughput; the totals are those of the trace."""
    assert run(recorded, "--speedup", "50", "--ttft-ms", "1e9", "--tpot-ms", "1e9") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["mode"], row["num_adapters"]) for row in figures["rows"]] == [("base", 0), ("prefill-only", 3)]
    base = figures["rows"][0]
    for row in figures["rows"]:
        assert (row["completed"], row["goodput_fraction"], row["recompiles"]) == (8, 1.0, 0)
        assert row["request_goodput"] == row["request_throughput"]
        assert 8 / row["request_throughput"] == pytest.approx(row["duration"], abs=6e-4)
        assert row["total_output_tokens"] == sum(output for _, output in LENGTHS)
        assert row["total_input_tokens"] == sum(prompt for prompt, _ in LENGTHS) - 14
        expected = row["request_goodput"] / base["request_goodput"]
        assert row["goodput_ratio_to_base"] == pytest.approx(expected, abs=1e-4)
        assert 1 <= row["most_running"] <= 4
        assert 0 < row["prefill_seconds"] + row["decode_seconds"] < row["duration"] + 2e-3
        for name in ("ttft", "tpot", "itl"):
            assert 0 < row[f"median_{name}_ms"] <= row[f"p90_{name}_ms"] <= row[f"p99_{name}_ms"]
    users = {request.user for request in loads[-1][0]}
    assert (base["adapters_used"], figures["rows"][1]["adapters_used"]) == (0, len(users))
    assert "2024" not in tables.trace(figures)
    assert tables.trace(figures).count("\n| ") == 3


def test_bounds_that_few_meet_lower_goodput(recorded, capsys):
    """The request of one token has no time per token, so that it alone meets a bound that is too small for any."""
    assert run(recorded, "--speedup", "50", "--modes", "base", "--ttft-ms", "1e9", "--tpot-ms", "1e-9") == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]
    assert row["goodput_fraction"] == 1 / 8
    assert row["request_goodput"] == pytest.approx(row["request_throughput"] / 8, abs=2e-3)
    assert run(recorded, "--speedup", "50", "--modes", "base", "--ttft-ms", "1e-9") == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]
    assert (row["goodput_fraction"], row["goodput_ratio_to_base"]) == (0.0, None)


def test_a_speedup_that_is_given_measures_no_capacity(recorded, loads, capsys):
    assert run(recorded, "--speedup", "50", "--modes", "prefill-only", "--limit", "6") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["capacity"], figures["speedup"], figures["offered_requests_per_s"]) == (None, 50.0, 100.0)
    assert [len(requests) for requests, _ in loads] == [4, 6]
    assert [request.arrival for request in loads[-1][0]] == pytest.approx([i / 100 for i in range(6)])
    assert figures["rows"][0]["goodput_ratio_to_base"] is None
    assert "of the base's capacity" not in tables.trace(figures)


def test_contenders_may_run_one_command_after_the_other(recorded, loads, capsys, tmp_path):
    first, both = tmp_path / "base.json", tmp_path / "both.json"
    assert run(recorded, "--load", "2", "--modes", "base", "--output-json", str(first)) == 0
    one = json.loads(first.read_text())
    go_on = ("--load", "2", "--continue-json", str(first), "--output-json", str(both))
    assert run(recorded, *go_on, "--modes", "prefill-only") == 0
    two = json.loads(both.read_text())
    assert (two["capacity"], two["speedup"], two["rows"][0]) == (one["capacity"], one["speedup"], one["rows"][0])
    assert [row["mode"] for row in two["rows"]] == ["base", "prefill-only"]
    assert two["rows"][1]["goodput_ratio_to_base"] == pytest.approx(
        two["rows"][1]["request_goodput"] / one["rows"][0]["request_goodput"], abs=1e-3
    )
    assert two["options"] == one["options"] | {"modes": "base,prefill-only"}
    (base, _), (adapted, _) = loads[3], loads[5]
    assert [request.arrival for request in base] == [request.arrival for request in adapted]
    capsys.readouterr()
    for options, told in (
        (("--modes", "base"), "--modes has base, which"),
        (("--modes", "prefill-only", "--rank", "32"), "was made with rank 16; give the same options"),
        (("--modes", "prefill-only", "--speedup", "99"), "--speedup is 99; that of"),
    ):
        assert run(recorded, *go_on, *options) == 1
        assert told in capsys.readouterr().err
    changed = dict(one, device={"kind": "another"})
    first.write_text(json.dumps(changed))
    assert run(recorded, *go_on, "--modes", "prefill-only") == 1
    assert "was made on {'kind': 'another'}; go on there" in capsys.readouterr().err
    first.write_text(json.dumps(one))
    recorded.write_text(recorded.read_text().replace(",30,5", ",31,5"))
    assert run(recorded, *go_on, "--modes", "prefill-only") == 1
    assert "was made with another trace of that name" in capsys.readouterr().err
    first.write_text("{}")
    assert run(recorded, *go_on, "--modes", "prefill-only") == 1
    assert "holds no figures of bench.trace" in capsys.readouterr().err


def test_what_was_measured_is_kept(recorded, monkeypatch, capsys, tmp_path):
    out, real = tmp_path / "deep" / "figures.json", trace.load

    def load(engine, requests, adapters, most=None):
        if adapters:
            raise ConfigError("stopped")
        return real(engine, requests, adapters, most)

    monkeypatch.setattr(trace, "load", load)
    assert run(recorded, "--output-json", str(out)) == 1
    assert "bench.trace: stopped" in capsys.readouterr().err
    figures = json.loads(out.read_text())
    assert (figures["schema"], [row["mode"] for row in figures["rows"]]) == ("preft-jax/trace/1", ["base"])
    assert figures["rows"][0]["goodput_ratio_to_base"] in (1.0, None)


def test_the_length_served_is_what_the_trace_needs_within_bounds():
    short = trace.Trace(arrivals=[0.0], prompt_lens=[100], output_lens=[30])
    long = trace.Trace(arrivals=[0.0], prompt_lens=[14000], output_lens=[89])
    assert [trace.longest_of(one, None, 131072) for one in (short, long)] == [192, 9216]
    assert (trace.longest_of(long, None, 1024), trace.longest_of(long, 16384, 1024)) == (1024, 16384)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--modes base,both", "--modes has 'both'; allowed: base, prefill-only, all-token"),
        ("--modes prefill-only", "add base, or give --speedup"),
        ("--load 0", "--load is 0; give a number above 0"),
        ("--speedup nan", "--speedup is nan"),
        ("--minutes -1", "--minutes is -1"),
        ("--limit 0", "--limit is 0"),
        ("--limit 1", "all arrive at once"),
        ("--bank-adapters 0", "--bank-adapters is 0"),
        ("--max-model-len 4", "--max-model-len is 4"),
        ("--rank 12", "--rank is 12"),
        ("--adapter-distribution best", "adapter distribution 'best' is not allowed"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, told, recorded, capsys):
    assert run(recorded, *options.split()) == 1
    assert told in capsys.readouterr().err


def test_a_trace_without_a_column_and_one_that_is_not_there_are_refused(tmp_path, capsys):
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens\n2024-05-10 00:00:00,5\n")
    assert run(path) == 1
    assert "line 1: no column 'GeneratedTokens'" in capsys.readouterr().err
    assert run(tmp_path / "none.csv") == 1
    assert "none.csv" in capsys.readouterr().err
