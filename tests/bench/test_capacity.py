"""The model of a fleet: what it says moves with what it is told, and it says what was measured."""

import json

import numpy as np
import pytest

from bench import capacity, capacity_plot
from bench.capacity_model import Cache, Costs, Load, Machine, simulate
from bench.table_parts import RESULTS
from serve.routing import Affinity, RoundRobin

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def costs():
    return Costs.measured()


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


def load(count, users, per_s=8.0):
    rng = np.random.default_rng(0)
    arrivals = np.arange(count) * 1e3 / per_s
    return Load(arrivals=arrivals, prompts=[300] * count, outputs=[40] * count, users=rng.integers(0, users, count))


def run(path, capsys, *arguments):
    assert capacity.main(["--trace", str(path), "--seconds", "6", "--cell", "2", *arguments]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_costs_are_those_of_the_committed_files(costs):
    """An adapter's bytes take 22 us at the rate of an H200's memory; edits and rows cost something."""
    assert costs.adapter_bytes == 83886080
    assert costs.adapter == pytest.approx(costs.adapter_bytes / 3.86e9, rel=0.01)
    assert min(costs.edit_call, costs.edit_token, costs.row) > 0
    assert costs.kv_pages > costs.pages_beside(64) > costs.pages_beside(256) > 0


def test_a_kind_of_adapter_costs_what_it_adds(costs):
    """Rows of all-token adapters read their own bytes at each step; edits of prompts take a little of each prompt."""
    machine = Machine(host_adapters=100, fetch_ms=0.0)
    tpot = {
        kind: simulate(load(60, 50), 1, kind, RoundRobin(), machine, costs).tpot_ms.mean()
        for kind in ("base", "prefill-only", "all-token")
    }
    assert tpot["base"] < tpot["prefill-only"]
    assert tpot["base"] < tpot["all-token"]


def test_an_adapter_that_is_nowhere_near_comes_over_the_network_once(costs):
    machine, asked = Machine(host_adapters=2, fetch_ms=300.0), load(6, 1, per_s=1.0)
    cold = simulate(asked, 1, "prefill-only", RoundRobin(), machine, costs)
    warm = simulate(asked, 1, "prefill-only", RoundRobin(), machine, costs, hot=[["0"]])
    assert (cold.host_misses, warm.host_misses) == (1, 0)
    assert cold.ttft_ms.max() == pytest.approx(warm.ttft_ms.max() + 300, abs=20)
    assert simulate(asked, 1, "base", RoundRobin(), machine, costs).host_misses == 0


def test_affinity_finds_in_memory_what_turns_do_not(costs):
    machine, asked = Machine(host_adapters=12, fetch_ms=5.0), load(120, 24)
    misses = {
        policy: simulate(asked, 4, "prefill-only", policy(), machine, costs).host_misses
        for policy in (RoundRobin, Affinity)
    }
    assert misses[Affinity] < 0.7 * misses[RoundRobin]


def test_all_token_adapters_wait_for_places_that_others_hold(costs):
    bank = Cache(2)
    assert bank.acquire("a")
    assert bank.acquire("b")
    assert not bank.acquire("c")
    bank.release("a")
    assert bank.acquire("c")
    assert "a" not in bank
    assert bank.acquire("b")
    assert bank.loads == 3


def test_more_users_and_all_tokens_need_more_replicas(trace, capsys):
    found = run(
        trace, capsys, "--users", "100000,400000", "--policies", "affinity", "--tpot-ms", "14", "--target", "0.9"
    )
    replicas = {(row["kind"], row["users"]): row["replicas"] for row in found["rows"]}
    for kind in ("prefill-only", "all-token"):
        assert 3 < replicas[kind, 400000] / replicas[kind, 100000] < 6
    assert replicas["all-token", 400000] > replicas["prefill-only", 400000]
    row = found["rows"][1]
    cost = 1e6 * row["replicas"] * 3.0 / (row["requests_per_s"] * 3600 * np.mean([20 + 11 * i % 60 for i in range(80)]))
    assert row["usd_per_million_output_tokens"] == pytest.approx(cost, rel=1e-3)
    assert found["compared"] == []  # Nothing was measured of this trace.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--users", "many"), "give whole numbers"),
        (("--kinds", "all"), "--kinds has all; allowed: base"),
        (("--target", "1"), "--target is 1"),
        (("--gpu-hour-usd", "0"), "--gpu-hour-usd is 0"),
        (("--tpot-ms", "0.1"), "not served within the bounds"),
    ],
)
def test_options_are_checked(arguments, message, trace, capsys, monkeypatch):
    monkeypatch.setattr(capacity, "_MOST_REPLICAS", 4)
    assert capacity.main(["--trace", str(trace), "--users", "100", "--seconds", "2", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_picture_is_of_capacity_alone(tmp_path, capsys):
    path = tmp_path / "capacity.png"
    assert capacity_plot.main([str(RESULTS / "model-capacity.json"), "--output", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert capacity_plot.main([str(RESULTS / "h200-trace.json"), "--output", str(path)]) == 1
    assert "is not of bench.capacity" in capsys.readouterr().err
