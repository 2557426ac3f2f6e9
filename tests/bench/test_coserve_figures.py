"""Figures of co-serving, by hand."""

import pytest

from bench import tables_device
from bench.coserve import contenders, finish, make_parser
from bench.coserve_figures import attainment, by_second, latencies, over, published, tokens_per_second
from bench.coserve_plot import longest, over_rates
from serve.bench.metrics import RequestRecord

pytestmark = pytest.mark.host


def record(sent, ttft, tpot, tokens, **more):
    """Return a request whose tokens come one by one."""
    times = [ttft + n * tpot for n in range(tokens)]
    return RequestRecord(prompt_len=9, output_len=tokens, times=times, sent=sent, **more)


RECORDS = [
    record(0.0, 0.3, 0.04, 6),  # Keeps all bounds.
    record(0.5, 0.5, 0.04, 6),  # Its first token is too late for DeltaServe.
    record(1.0, 0.3, 0.1, 6),  # Its tokens are too slow for FlexLLM.
    record(1.5, 5.5, 0.0, 1),  # Waits longer than FlexLLM allows, and not than Loquetier; one token has no TPOT.
    record(2.0, 0.1, 0.01, 6, status="failed"),
]


def test_attainment_by_three_definitions():
    """FlexLLM: the first two; Loquetier: all that completed; DeltaServe: the first and the third."""
    found = attainment(RECORDS, published(ttft_ms=5000, tpot_ms=45))
    assert found == {"flexllm": 0.4, "loquetier": 0.8, "deltaserve": 0.4}
    assert attainment(RECORDS, published(ttft_ms=6000, tpot_ms=100.1))["flexllm"] == 0.8


def test_latencies_are_of_completed_requests():
    found = latencies(RECORDS)
    assert found["mean_ttft_ms"] == pytest.approx((300 + 500 + 300 + 5500) / 4)
    assert found["mean_tpot_ms"] == pytest.approx((40 + 40 + 100) / 3)
    assert found["p50_tpot_ms"] == pytest.approx(40)
    assert found["p99_tpot_ms"] == pytest.approx(40 + 60 * 0.98)
    assert found["mean_e2el_ms"] == pytest.approx((500 + 700 + 800 + 5500) / 4)


def test_latencies_over_those_of_serving_alone():
    assert over(
        {"mean_ttft_ms": 150.0, "p99_tpot_ms": 20.0, "requests": 9}, {"mean_ttft_ms": 100.0, "requests": 3}
    ) == {"mean_ttft": 1.5}


def test_tokens_trained_count_until_the_last_arrival():
    ends = [(0.5, 100.0), (1.0, 100.0), (2.5, 100.0)]
    assert tokens_per_second(ends, 2.0) == 100.0
    assert tokens_per_second([], 2.0) == 0.0


def test_what_happened_in_each_second():
    records = [record(0.2, 0.3, 0.5, 3), record(1.1, 0.1, 0.1, 5), record(1.2, 0.1, 0.0, 1)]
    found = by_second(records, [(0.5, 10.0), (0.7, 10.0), (2.1, 5.0), (9.0, 5.0)], 2.5)
    assert found["requests"] == [1, 2, 0]
    assert found["trained_tokens"] == [20, 0, 5]
    # The first is answered from 0.5 to 1.5, the second from 1.2 to 1.6; nobody in the third second.
    assert found["tpot_ms"] == [500, 300, None]


def row(name, rate, tokens, **more):
    return {"contender": name, "request_rate": rate, "fine_tuning_tokens_per_s": tokens, **more}


def test_rows_beside_training_and_serving_alone():
    rows = [
        row("train-step", None, 1000.0), row("alone", 1.0, 0.0, mean_tpot_ms=10.0), row("alone", 5.0, 0.0),
        row("coserve", 1.0, 800.0, mean_tpot_ms=20.0),
    ]  # fmt: skip
    finish(rows)
    assert rows[3]["of_standalone"] == 0.8
    assert rows[3]["over_alone"] == {"mean_tpot": 2.0}
    assert "over_alone" not in rows[0]
    assert "of_standalone" not in rows[1]
    (alone,) = ([row("coserve", 1.0, 800.0)],)
    finish(alone)
    assert "of_standalone" not in alone[0], "training alone was not measured"


def test_what_the_picture_shows():
    kept = {"attainment": {"flexllm": 0.9}}
    rows = [row("train-step", None, 9.0), *(row("coserve", rate, 10 - rate, **kept) for rate in (5.0, 1.0))]
    assert over_rates(rows) == {"coserve": [(1.0, 9.0, 0.9), (5.0, 5.0, 0.9)]}
    assert longest(rows)["request_rate"] == 5.0
    assert longest(rows[:1]) is None


def test_the_table_has_a_row_for_each_contender_and_rate():
    options = {"model": "tiny", "jobs": 1, "rank": 16, "seq": 64, "tpot_ms": 45.0, "ttft_ms": 5000.0}
    times = {f"{kind}_{of}_ms": 12.0 for kind in ("mean", "p95") for of in ("tpot", "ttft", "e2el")}
    kept = {
        "attainment": {"flexllm": 0.98, "loquetier": 1.0, "deltaserve": 0.5},
        "requests": 9,
        "seconds": 4.5,
        **times,
    }
    rows = [row("train-step", None, 1000.0), row("alone", 2.0, 0.0, **kept), row("coserve", 2.0, 800.0, **kept)]
    finish(rows)
    where = {"device": {"kind": "a device"}, "versions": {"jax": "1"}, "commit": "c", "date": "2026-01-01"}
    made = tables_device.coserve({"options": options, "rows": rows, **where}).splitlines()
    assert made[3].startswith("| alone | 2 (9) |  |  | 98.0% | 100.0% | 50.0% | 12.0 (12.0) | 12 (12) | 1.00 |")
    assert made[4].startswith("| coserve | 2 (9) | 800 | **0.80** |")


def test_the_turns_of_the_contenders():
    args = make_parser().parse_args(
        ["--contenders", "coserve,alone,temporal,train-step", "--temporal-seconds", "2,0.5"]
    )
    assert contenders(args, [1.0]) == [
        ("train-step", None), ("alone", 1.0), ("coserve", 1.0), ("temporal-2", 1.0), ("temporal-0.5", 1.0),
    ]  # fmt: skip
