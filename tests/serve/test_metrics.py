import jax
import jax.numpy as jnp
import numpy as np
import pytest

from serve.metrics import CompileCounter, RequestRecord, environment, paired_ratio, summarize


def test_latencies_follow_their_definitions():
    records = [RequestRecord(10, [1.0, 1.5, 3.0]), RequestRecord(5, [2.0])]
    figures = summarize(records, duration=4.0)
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


def test_paired_ratio_is_of_total_times_with_an_interval_around_it():
    ratio = paired_ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert ratio == {"mean": 0.5, "low": 0.5, "high": 0.5}
    noisy = paired_ratio([1.0, 1.2, 0.9, 1.1], [1.1, 1.0, 1.2, 0.9])
    assert noisy["low"] < noisy["mean"] < noisy["high"]
    assert paired_ratio([1.0], [2.0]) == {"mean": 0.5}


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
