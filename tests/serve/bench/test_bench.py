import json
import math
import sys

import pytest
from fake_engine import FakeClock, FakeEngine

from serve.bench import __main__ as bench
from serve.bench import sides

pytestmark = pytest.mark.usefixtures("one_layer_tiny")

SMALL = [
    *("--model", "tiny", "--num-prompts", "7", "--input-len", "5:40", "--output-len", "2:9"),
    *("--num-adapters", "4", "--max-num-seqs", "4"),
]


class Made:
    """Makes fake engines and keeps them."""

    def __init__(self):
        self.clock = FakeClock()
        self.engines = []

    def engine(self, model, config):
        made = FakeEngine(self.clock, config.max_num_seqs, config.max_model_len)
        self.engines.append((config, made))
        return made

    def main(self, *arguments):
        return bench.main([*SMALL, *arguments], self.engine, self.clock, self.clock.sleep)


@pytest.fixture
def made():
    return Made()


def figures(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Return the figures of a run on the engine itself."""
    out = tmp_path_factory.mktemp("bench") / "figures.json"
    assert bench.main([*SMALL, "--output-json", str(out)]) == 0
    return json.loads(out.read_text())


def test_all_modes_serve_every_request_with_the_same_work(real):
    assert set(real["modes"]) == {"base", "prefill_only", "all_token"}
    work = {(m["completed"], m["total_input_tokens"], m["total_output_tokens"]) for m in real["modes"].values()}
    assert len(work) == 1
    assert work.pop()[0] == 7


def test_the_engines_of_all_modes_divide_the_memory(made, capsys, monkeypatch):
    in_use = iter([0.2, 0.4, 0.7])
    monkeypatch.setattr(sides, "memory_in_use", lambda: next(in_use))
    assert made.main("--memory-utilization", "0.8") == 0
    shares = [config.memory_utilization for config, _ in made.engines]
    assert shares == pytest.approx([0.2 + 0.6 / 3, 0.4 + 0.4 / 2, 0.8])


def test_without_an_accelerator_there_is_no_memory_to_divide(made, capsys):
    assert made.main("--memory-utilization", "0.7") == 0
    assert [config.memory_utilization for config, _ in made.engines] == [0.7] * 3
    assert made.main("--memory-utilization", "1.5") == 1
    assert "--memory-utilization is 1.5" in capsys.readouterr().err


def test_nothing_is_compiled_after_warm_up(real):
    assert real["recompiles"] == 0


def test_figures_say_what_they_are(real):
    assert real["schema"] == "preft-jax/serve-bench/2"
    assert real["options"]["num_prompts"] == 7
    assert real["options"]["num_adapters"] == 4
    assert real["ratio_to_base"]["base"]["mean"] == 1.0
    assert {"versions", "device", "commit", "date"} <= set(real)
    for mode in real["modes"].values():
        assert 0 < mode["mean_ttft_ms"] <= mode["mean_e2el_ms"]


def test_last_line_is_json_and_underscored_options_work(made, capsys):
    assert made.main("--num_prompts", "2", "--max_num_seqs=3", "--mode", "base") == 0
    found = figures(capsys)
    assert set(found["modes"]) == {"base"}
    assert found["options"]["num_prompts"] == 2
    assert made.engines[0][0].max_num_seqs == 3


def test_a_sweep_shares_an_engine_for_each_mode_and_its_adapters_are_its_own(made, capsys):
    assert made.main("--num-adapters", "1,3", "--rounds", "2", "--rank", "32") == 0
    found = figures(capsys)
    assert found["options"]["num_adapters"] == [1, 3]
    assert [(c["mode"], c["num_adapters"]) for c in found["contenders"]] == [
        ("base", 0),
        *[("prefill_only", 1), ("prefill_only", 3)],
        *[("all_token", 1), ("all_token", 3)],
    ]
    (base, base_engine), (only, only_engine), (every, every_engine) = made.engines
    assert (base.bank_pages, base.all_token) == (1, True)
    assert only == every
    assert (only.bank_pages, only.all_token) == (1 + 3 * 2, True)
    assert only.max_rank == 32
    assert base_engine.loaded == []
    assert len({adapter.digest for adapter in only_engine.loaded}) == 4
    assert {adapter.config.positions for adapter in every_engine.loaded} == {"all"}
    assert all(engine.warm for _, engine in made.engines)
    assert [len(engine.requests) for _, engine in made.engines] == [1 + 2 * 7, 2 * (1 + 2 * 7), 2 * (1 + 2 * 7)]


def test_contenders_of_a_round_serve_the_same_and_rounds_differ(made):
    assert made.main("--num-warmups", "0", "--rounds", "2") == 0
    prompts = [[tuple(r.prompt.token_ids) for r in engine.requests] for _, engine in made.engines]
    assert prompts[0] == prompts[1] == prompts[2]
    assert not set(prompts[0][:7]) & set(prompts[0][7:])


def test_the_same_seed_is_the_same_run(capsys):
    found = []
    for seed in ("3", "3", "4"):
        assert Made().main("--seed", seed, "--request-rate", "2") == 0
        found.append(figures(capsys)["contenders"])
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_figures_of_a_known_engine_are_exact(made, capsys):
    # Four rows, one token a second each, all requests at once, three tokens each: two waves of 3 s for 7 requests.
    options = ("--output-len", "3", "--mode", "base", "--goodput", "ttft:1500", "--metric-percentiles", "50,100")
    assert made.main(*options) == 0
    base = figures(capsys)["modes"]["base"]
    assert base["duration"] == 6
    assert base["output_throughput"] == 3.5
    assert base["mean_tpot_ms"] == 1000
    assert base["p100_ttft_ms"] == 4000
    assert base["mean_ttft_ms"] == pytest.approx((4 * 1000 + 3 * 4000) / 7, abs=1e-3)
    assert base["request_goodput"] == pytest.approx(4 / 6, abs=1e-3)


def test_max_concurrency_and_rate_reach_the_load(made, capsys):
    assert made.main("--max-concurrency", "2", "--request-rate", "0.01", "--mode", "base") == 0
    assert made.engines[0][1].most <= 2
    assert made.clock.now > 200
    assert figures(capsys)["options"]["request_rate"] == 0.01


def test_requests_that_are_too_long_are_counted(made, capsys):
    assert made.main("--max-model-len", "30", "--mode", "base", "--num-warmups", "0") == 0
    captured = capsys.readouterr().out
    base = json.loads(captured.strip().splitlines()[-1])["modes"]["base"]
    assert base["rejected"] > 0
    assert base["completed"] + base["rejected"] == 7
    assert "more than max_model_len 30" in captured


def test_a_trace_gives_arrivals_and_lengths(made, capsys, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00,20,3\n2023-11-16 18:00:40,9000,2\n"
        "2023-11-16 18:02:00,9,9\n"
    )
    options = ["--model", "tiny", "--dataset-name", "trace", "--dataset-path", str(path), "--max-model-len", "64"]
    run = [*options, "--mode", "base", "--trace-speedup", "4"]
    assert bench.main(run, made.engine, made.clock, made.clock.sleep) == 0
    found = figures(capsys)
    assert found["clipped"] == 1
    assert found["modes"]["base"]["total_input_tokens"] == 20 + 62
    assert found["modes"]["base"]["total_output_tokens"] == 5
    assert found["modes"]["base"]["duration"] == 12


def test_conversations_are_encoded_and_answers_give_lengths(made, capsys, tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [{"from": "human", "value": "a question"}, {"from": "gpt", "value": "answer"}]
    path.write_text(json.dumps({"conversations": turns}))
    options = ["--model", "tiny", "--dataset-name", "sharegpt", "--dataset-path", str(path), "--num-prompts", "2"]
    assert bench.main([*options, "--mode", "base"], made.engine, made.clock, made.clock.sleep) == 0
    base = figures(capsys)["modes"]["base"]
    assert (base["total_input_tokens"], base["total_output_tokens"]) == (20, 12)


def test_the_plot_is_a_png(made, tmp_path):
    out = tmp_path / "new" / "plot.png"
    assert made.main("--num-adapters", "1,4", "--plot", str(out)) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert made.main("--mode", "base", "--output-len", "1", "--plot", str(out)) == 0


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(made, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert made.main("--plot", "x.png") == 1
    assert "pip install 'preft-jax[bench]'" in capsys.readouterr().err
    assert not made.engines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-prompts", "0"], "--num-prompts is 0"),
        (["--num-adapters", "0"], "--num-adapters is 0"),
        (["--num-adapters", "1,x"], "--num-adapters is 1,x"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--input-len", "9:3"], "--input-len"),
        (["--random-prefix-len", "-1"], "--random-prefix-len is -1"),
        (["--positions", "all"], "--positions is 'all', which --mode all-token measures"),
        (["--positions", "last"], "'last' is not a rule"),
        (["--model", "tinyy"], "did you mean 'tiny'"),
        (["--adapter-kind", "dora"], "allowed: mixed"),
        (["--rank", "0"], "rank 0"),
        (["--max-model-len", "8"], "max_model_len 8"),
        (["--dtype", "int8"], "int8"),
        (["--seed", "-1"], "--seed is -1"),
        (["--seed", "9" * 20], "give 0 to 4294967295"),
        (["--output-json", "/"], "--output-json is /, a directory"),
        (["--zipf-alpha", "nan"], "--zipf-alpha is nan"),
        (["--max-model-len", "0"], "max_model_len is 0"),
        (["--request-rate", "0"], "--request-rate is 0"),
        (["--burstiness", "0"], "--burstiness is 0"),
        (["--max-concurrency", "0"], "--max-concurrency is 0"),
        (["--adapter-distribution", "distinct"], "7 requests with distinct adapters"),
        (["--goodput", "ttfb:1"], "--goodput has 'ttfb:1'"),
        (["--metric-percentiles", "200"], "--metric-percentiles"),
        (["--dataset-name", "trace"], "needs a --dataset-path"),
        (["--dataset-path", "x"], "takes no --dataset-path"),
        (["--trace-speedup", "2"], "--trace-speedup was given"),
        (["--lora-modules", "a"], "--lora-modules was given"),
        (["--base-url", "http://127.0.0.1:9", "--rank", "4"], "--rank was given"),
        (["--plot", "a.pdf"], "ends in .png"),
    ],
)
def test_bad_options_end_with_status_1_and_one_line(arguments, message, made, capsys):
    assert made.main(*arguments) == 1
    err = capsys.readouterr().err.strip()
    assert message in err
    assert len(err.splitlines()) == 1


def test_one_token_outputs_and_a_new_directory_for_the_figures(made, tmp_path):
    out = tmp_path / "new" / "figures.json"
    assert made.main("--mode", "base,prefill-only", "--output-len", "1", "--output-json", str(out)) == 0
    assert "NaN" not in out.read_text()
    assert json.loads(out.read_text())["modes"]["base"]["mean_tpot_ms"] == 0


@pytest.mark.parametrize("arguments", [["--mode", "fast"], ["--mode", "base,"], ["--endpoint", "/v2"], ["--nonsense"]])
def test_usage_errors_end_with_status_2(arguments):
    with pytest.raises(SystemExit) as caught:
        bench.main(arguments)
    assert caught.value.code == 2


def test_an_interrupt_ends_with_one_line(made, capsys, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeEngine, "step", interrupt)
    assert made.main() == 130
    assert capsys.readouterr().err.strip() == "serve.bench: interrupted"


def test_options_can_be_written_as_json():
    args = bench.make_parser().parse_args(["--api-key", "secret"])
    written = json.dumps(bench._written_options(args, (16,)), allow_nan=False)
    assert math.isinf(args.request_rate)
    assert "secret" not in written
