import jax
import jax.numpy as jnp
import numpy as np
import pytest

from preft_jax.device.compiles import CompileCounter
from preft_jax.errors import ConfigError
from serve.bench.environment import environment
from serve.bench.metrics import (
    LoadResult,
    MetricOptions,
    RequestRecord,
    adapter_figures,
    fairness,
    first_and_later,
    paired_ratio,
    parse_goodput,
    parse_metrics,
    parse_percentiles,
    ratios,
    summarize,
)


def record(times, output_len=None, prompt_len=1, **fields):
    return RequestRecord(prompt_len=prompt_len, output_len=output_len or len(times), times=times, **fields)


def test_latencies_follow_their_definitions():
    result = LoadResult([record([1.0, 1.5, 3.0], prompt_len=10), record([2.0], prompt_len=5)], 4.0)
    figures = summarize([result])
    assert figures["completed"] == 2
    assert figures["total_input_tokens"] == 15
    assert figures["output_throughput"] == 1.0
    assert figures["total_token_throughput"] == 4.75
    assert figures["request_throughput"] == 0.5
    assert figures["mean_ttft_ms"] == 1500
    assert figures["mean_tpot_ms"] == 1000  # the one-token request has none
    assert figures["mean_itl_ms"] == 1000
    assert figures["median_itl_ms"] == 1000
    assert figures["mean_e2el_ms"] == 2500
    assert figures["p99_e2el_ms"] == pytest.approx(np.percentile([3000, 2000], 99))


def test_outputs_of_several_tokens_count_for_tpot_but_are_one_gap():
    figures = summarize([LoadResult([record([1.0, 3.0], output_len=9)], 3.0)])
    assert figures["mean_tpot_ms"] == 250
    assert figures["mean_itl_ms"] == 2000
    assert figures["output_throughput"] == 3


def test_rounds_add_up_and_only_completed_requests_are_figures():
    lost = [record([], 0, status=status, error="e") for status in ("rejected", "aborted", "failed", "failed")]
    figures = summarize([LoadResult([record([1.0]), *lost], 1.0), LoadResult([record([3.0, 5.0])], 5.0)])
    counts = [figures[status] for status in ("completed", "rejected", "aborted", "failed")]
    assert counts == [2, 1, 1, 2]
    assert figures["duration"] == 6
    assert figures["output_throughput"] == 0.5
    assert figures["mean_ttft_ms"] == 2000


def test_percentiles_are_those_asked_for():
    options = MetricOptions(percentiles=(25.0, 99.9), percentile_metrics=("ttft",))
    figures = summarize([LoadResult([record([float(i)]) for i in range(1, 6)], 1.0)], options)
    assert figures["p25_ttft_ms"] == 2000
    assert figures["p99.9_ttft_ms"] == pytest.approx(4996)
    assert not [name for name in figures if name.startswith("p") and "ttft" not in name]
    assert figures["median_e2el_ms"] == 3000


def test_goodput_counts_requests_that_meet_every_objective():
    done = [record([0.5, 1.0]), record([0.5, 9.0]), record([3.0, 3.1]), record([0.2])]
    objectives = {"goodput": parse_goodput(["ttft:500", "tpot:500"])}
    assert summarize([LoadResult(done, 2.0)], MetricOptions(**objectives))["request_goodput"] == 1.0
    assert "request_goodput" not in summarize([LoadResult(done, 2.0)])
    assert parse_goodput(["e2el:1.5"]) == {"e2el": 1.5}


@pytest.mark.parametrize("item", ["ttft", "itl:5", "ttft:", "ttft:-1", "ttft:5ms"])
def test_bad_objectives_are_refused(item):
    with pytest.raises(ConfigError, match="allowed: ttft:MS"):
        parse_goodput([item])


def test_bad_percentiles_and_metrics_are_refused():
    assert parse_percentiles("50,99.9") == (50, 99.9)
    assert parse_metrics("ttft, itl") == ("ttft", "itl")
    for text in ("", "101", "a", "nan"):
        with pytest.raises(ConfigError, match="--metric-percentiles"):
            parse_percentiles(text)
    with pytest.raises(ConfigError, match="allowed: ttft"):
        parse_metrics("ttfb")


def test_fairness_is_jains_index_of_time_per_token():
    slow, fast = record([3.0, 6.0], adapter=2), record([1.0, 2.0], adapter=0)
    found = adapter_figures([LoadResult([slow, fast, record([1.0])], 9.0), LoadResult([fast], 2.0)])
    assert set(found["adapters"]) == {"0", "2"}
    assert found["adapters"]["0"]["completed"] == 2
    assert found["adapters"]["2"]["mean_e2el_per_token_ms"] == 3000
    assert found["adapters"]["2"]["p99_ttft_ms"] == 3000
    assert found["fairness"] == {"jain_index": 0.8, "max_over_min": 3.0}  # (1 + 3)^2 / (2 (1 + 9))
    assert fairness([2.0, 2.0, 2.0]) == {"jain_index": 1.0, "max_over_min": 1.0}
    assert fairness([]) == {}


def test_first_requests_of_adapters_are_told_from_later_ones_in_each_round():
    one = LoadResult(
        [
            record([1.0], adapter=0, sent=5.0),
            record([9.0], adapter=0, sent=0.0),
            record([3.0], adapter=1, sent=1.0),
            record([7.0], sent=0.0),
        ],
        9.0,
    )
    found = first_and_later([one, one])
    assert found["first"]["mean_ttft_ms"] == 6000
    assert found["first"]["completed"] == 4
    assert found["later"]["mean_ttft_ms"] == 1000
    assert first_and_later([LoadResult([record([7.0])], 9.0)]) == {}


def test_a_lost_first_request_leaves_only_later_ones():
    lost = record([], 0, adapter=0, status="failed")
    assert set(first_and_later([LoadResult([lost, record([1.0], adapter=0, sent=1.0)], 2.0)])) == {"later"}


def test_paired_ratio_has_an_interval_around_it():
    ratio = paired_ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert ratio == {"mean": 0.5, "low": 0.5, "high": 0.5}
    noisy = paired_ratio([1.0, 1.2, 0.9, 1.1], [1.1, 1.0, 1.2, 0.9])
    assert noisy["low"] < noisy["mean"] < noisy["high"]
    assert paired_ratio([1.0], [2.0]) == {"mean": 0.5}


def test_ratios_are_of_rounds_other_over_base():
    base = [LoadResult([record([1.0, 2.0])], 2.0), LoadResult([record([2.0, 6.0])], 6.0)]
    other = [LoadResult([record([2.0, 4.0])], 4.0), LoadResult([record([4.0, 12.0])], 12.0)]
    assert ratios(base, other) == {
        "output_throughput": {"mean": 0.5},
        "mean_tpot": {"mean": 2.0},
        "mean_ttft": {"mean": 2.0},
    }
    single = [LoadResult([record([1.0])], 1.0)]
    assert set(ratios(single, single)) == {"output_throughput", "mean_ttft"}


def test_compilations_are_counted_while_entered_only():
    make = lambda n: jax.jit(lambda x: x * n)  # noqa: E731
    make(2)(jnp.ones(3))
    with CompileCounter() as counter:
        f = make(3)
        x = np.ones(3, np.float32)
        f(x)
        f(x)
    assert counter.count == 1
    make(4)(x)
    assert counter.count == 1


def test_environment_says_where_it_ran():
    found = environment()
    assert found["versions"]["jax"] == jax.__version__
    assert found["device"]["platform"] == jax.devices()[0].platform
