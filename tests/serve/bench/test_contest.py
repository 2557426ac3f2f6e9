import io

import pytest
from rich.console import Console

from preft_jax.errors import PreftError
from serve.bench.contest import Contender, Entry, collect, compete
from serve.bench.load import LoadRequest
from serve.bench.metrics import LoadResult, MetricOptions, RequestRecord
from serve.bench.report import print_report

pytestmark = pytest.mark.host

QUIET = Console(file=io.StringIO())


class Scripted:
    """A target whose every request takes the next of the given times, one token after it and another one later."""

    def __init__(self, log, name, seconds, status="completed", tokens=()):
        self.log, self.name, self.seconds, self.status = log, name, list(seconds), status
        self.tokens = list(tokens)
        self.count = 0

    def run(self, requests, on_done=lambda: None):
        if not requests:
            return LoadResult([], 0.0)
        took = self.seconds.pop(0)
        tokens = self.tokens.pop(0) if self.tokens else 2
        self.log.append(self.name)
        self.count += 5
        one = {"prompt_len": 1, "output_len": tokens, "times": (took, 2 * took), "status": self.status, "error": "why"}
        for _ in requests:
            on_done()
        return LoadResult([RequestRecord(**one, adapter=r.user) for r in requests], 2 * took)

    def counters(self):
        return {"calls": self.count, "never": 0}


def entries(rounds=3, **seconds):
    log = []
    requests = [[LoadRequest(arrival=0.0, prompt=[1], max_tokens=2, user=0)]] * rounds
    contenders = {
        "base": Contender("base", 0),
        "one": Contender("prefill-only", 1),
        "many": Contender("prefill-only", 8),
        "all": Contender("all-token", 1),
    }
    made = [
        Entry(contenders[name], lambda n=name, s=each: Scripted(log, n, s), (), requests)
        for name, each in seconds.items()
    ]
    return made, log


def test_contenders_take_turns_and_every_other_round_is_reversed():
    made, log = entries(base=[1, 1, 1], one=[2, 2, 2], all=[4, 4, 4])
    compete(made, QUIET)
    assert log == ["base", "one", "all", "all", "one", "base", "base", "one", "all"]


def test_ratios_are_taken_round_by_round_so_that_a_slow_machine_cancels_out():
    made, _ = entries(base=[1, 7, 3], one=[2, 14, 6])
    compete(made, QUIET)
    found = collect(made, MetricOptions())
    exact = {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert found["ratio_to_base"] == {"base": {"mean": 1.0, "low": 1.0, "high": 1.0}, "prefill_only": exact}
    assert found["contenders"][1]["ratio"]["mean_tpot"]["mean"] == 2.0
    assert found["contenders"][1]["ratio"]["mean_ttft"]["mean"] == 2.0


def test_two_rounds_have_no_interval_and_no_base_no_ratio():
    made, _ = entries(rounds=2, base=[1, 1], one=[2, 2])
    compete(made, QUIET)
    assert collect(made, MetricOptions())["ratio_to_base"]["prefill_only"] == {"mean": 0.5}
    made, _ = entries(rounds=1, one=[2])
    compete(made, QUIET)
    found = collect(made, MetricOptions())
    assert "ratio_to_base" not in found
    assert found["contenders"][0]["ratio"] == {}


def test_modes_hold_the_first_number_of_adapters_and_contenders_all():
    made, _ = entries(rounds=1, base=[1], one=[2], many=[4])
    compete(made, QUIET)
    found = collect(made, MetricOptions())
    assert list(found["modes"]) == ["base", "prefill_only"]
    assert found["modes"]["prefill_only"]["mean_ttft_ms"] == 2000
    assert [(c["mode"], c["num_adapters"]) for c in found["contenders"]] == [
        ("base", 0),
        ("prefill_only", 1),
        ("prefill_only", 8),
    ]
    assert found["recompiles"] == 0
    assert found["contenders"][1]["counters"] == {"calls": 5}
    made[0].in_process = False
    assert collect(made, MetricOptions())["recompiles"] is None


def test_a_contender_without_any_answer_ends_the_run_with_the_reason():
    made, log = entries(rounds=1, base=[1])
    made[0].make_target = lambda: Scripted(log, "base", [1], status="rejected")
    with pytest.raises(PreftError, match="none of the 1 requests of base completed; the first: why"):
        compete(made, QUIET)
    made[0].warmups, made[0]._target = made[0].rounds[0], None
    with pytest.raises(PreftError, match="none of the 1 warm-ups of base"):
        compete(made, QUIET)


def test_a_round_without_a_token_has_no_ratio():
    made, log = entries(base=[1, 1, 1], one=[2, 2, 2])
    made[1].make_target = lambda: Scripted(log, "one", [2, 2, 2], tokens=(2, 0, 2))
    compete(made, QUIET)
    found = collect(made, MetricOptions())
    assert list(found["ratio_to_base"]) == ["base"]
    assert found["modes"]["prefill_only"]["total_output_tokens"] == 4
    console = Console(file=io.StringIO(), width=150)
    print_report(found, MetricOptions(), console)
    assert "prefill-only, 1" in console.file.getvalue()


def test_the_report_says_what_the_figures_mean_and_what_went_wrong():
    made, _ = entries(base=[1, 1, 1], one=[2, 2, 2], many=[3, 3, 3])
    compete(made, QUIET)
    options = MetricOptions(goodput={"ttft": 1500.0})
    console = Console(file=io.StringIO(), width=150)
    print_report(collect(made, options), options, console)
    text = console.file.getvalue()
    for expected in ("prefill-only, 8", "0.50 (0.50 to 0.50)", "TPOT:", "Jain", "goodput", "base: 3 x why"):
        assert expected in text
