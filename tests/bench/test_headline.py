import json

import numpy as np
import pytest
from rich.console import Console

from bench import headline, headline_plot, tables
from bench.engine_contenders import WatchedEngine, ready
from preft_jax import load_model
from preft_jax.errors import ConfigError
from serve.engine.config import EngineConfig

pytestmark = pytest.mark.usefixtures("one_layer_tiny")

TINY = (
    "--model tiny --num-prompts 8 --input-len 32 --output-len 6 --max-num-seqs 4 --prefill-tokens 64 "
    "--num-adapters 1,4 --bank-adapters 2 --modes base,prefill-only"
)


def test_every_contender_serves_the_same_requests(capsys, tmp_path):
    path = tmp_path / "figures.json"
    assert headline.main([*TINY.split(), "--output-json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    rows = {(row["mode"], row["num_adapters"]): row for row in figures["rows"]}
    assert list(rows) == [("base", 0), ("prefill-only", 1), ("prefill-only", 4)]
    for row in rows.values():
        assert 8 * 6 / row["output_throughput"] == pytest.approx(row["seconds"], abs=6e-4)
        assert (row["most_running"], row["recompiles"]) == (4, 0)
    assert rows["prefill-only", 1]["adapter_loads"] == 0
    assert rows["prefill-only", 4]["adapter_loads"] > 0
    assert tables.engine(figures).count("\n| ") == len(rows) + 2


def test_all_token_adapters_must_all_fit_the_bank():
    assert headline.plan(["base", "prefill-only", "all-token"], [1, 64, 512], 64) == [
        ("base", 0, [0]),
        ("prefill-only", 64, [1, 64, 512]),
        ("all-token", 64, [1, 64]),
        ("all-token", 512, [512]),
    ]


@pytest.mark.parametrize(
    ("all_token", "held", "rows"), [(True, 48, 4), (True, 10**6, 1), (True, 24, 8), (False, 48, 8)]
)
def test_all_token_engines_have_as_many_rows_as_their_cache_holds(all_token, held, rows, monkeypatch):
    model, warm = load_model("tiny"), []
    monkeypatch.setattr(WatchedEngine, "warm_up", lambda engine: warm.append(engine))
    config = EngineConfig(
        max_num_seqs=8, max_model_len=64, page_size=16, num_kv_pages=12, prefill_tokens=64, bank_pages=3, max_rank=16,
        all_token=all_token,
    )  # fmt: skip
    engine, _ = ready(model, config, "any", Console(quiet=True), held=held)
    assert (engine.config.max_num_seqs, engine.kv_tokens) == (rows, 192)
    assert warm == [engine], "those with too many rows compile nothing"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--modes", "foo"), "--modes has 'foo'; allowed: base, prefill-only, all-token, or all"),
        (("--num-adapters", "abc"), "--num-adapters is 'abc'; give numbers with commas"),
        (("--num-adapters", "2,-1"), "--num-adapters has -1; give at least 1"),
        (("--input-len", "0"), "--input-len is 0; give at least 1"),
        (("--num-prompts", "0"), "--num-prompts is 0; give at least 1"),
        (("--bank-adapters", "0"), "--bank-adapters is 0; give at least 1"),
        (("--rounds", "0"), "--rounds is 0; give at least 1"),
        (("--max-concurrency", "0"), "--max-concurrency is 0; give at least 1, or leave it out for all"),
        (("--modes", "base", "--adapter-distribution", "even"), "--adapter-distribution has 'even'; allowed: uniform"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_runs(options, told, capsys, monkeypatch):
    monkeypatch.setattr(headline, "load_model", None)
    assert headline.main([*TINY.split(), *options]) == 1
    assert told in capsys.readouterr().err


def test_the_base_comes_first_and_once():
    args = headline.make_parser().parse_args(["--modes", "prefill-only,base,base", "--num-adapters", "8,1,8"])
    assert headline.check(args) == (["base", "prefill-only"], [8, 1])


def test_a_rank_that_fills_no_pages_is_refused(capsys):
    assert headline.main([*TINY.split(), "--rank", "12"]) == 1
    assert "--rank is 12" in capsys.readouterr().err


def test_contenders_take_turns_and_what_was_measured_is_kept(capsys, tmp_path, monkeypatch):
    """Figures are medians over rounds, ratios are taken round by round, and an end in the middle loses nothing."""
    path, served = tmp_path / "figures.json", []
    real = headline.serve

    def serve(engine, requests, adapters, most=None):
        if len(requests) == 8:
            served.append([request.prompt for request in requests])
        if len(served) == 8:
            raise ConfigError("stopped")
        return real(engine, requests, adapters, most)

    monkeypatch.setattr(headline, "serve", serve)
    assert headline.main([*TINY.split(), "--rounds", "3", "--adapter-dtype", "fp8", "--output-json", str(path)]) == 1
    figures = json.loads(path.read_text())
    assert served[0] == served[1] == served[2] != served[3] == served[5]
    rows = figures["rows"]
    assert [len(row["rounds"]) for row in rows] == [3, 2, 2]
    base = rows[0]["rounds"]
    for row in rows:
        assert row["output_throughput"] == pytest.approx(np.median(row["rounds"]), abs=0.06)
        ratios = np.divide(row["rounds"], base[: len(row["rounds"])])
        assert row["ratio_to_base"]["mean"] == pytest.approx(np.exp(np.log(ratios).mean()), rel=1e-3)
    assert tables.engine(figures).count("\n| ") == 5


def test_the_picture_has_the_peer(tmp_path):
    pytest.importorskip("matplotlib")
    ours = json.loads((tables.RESULTS / "h100-headline.json").read_text())
    peer = {"who": "vllm", "adapters": 64, "output_throughput": 6276.0}
    found = headline_plot.points([ours, peer, {**peer, "adapters": 0, "output_throughput": 14627.0}])
    assert {mode: sorted(line) for mode, line in found.items()} == {
        "prefill-only": [0, 1, 8, 64, 512], "vllm": [0, 64],
    }  # fmt: skip
    paths = [tmp_path / "ours.json", tmp_path / "peer.json"]
    for path, figures in zip(paths, (ours, peer), strict=True):
        path.write_text(json.dumps(figures))
    picture = tmp_path / "picture.png"
    assert headline_plot.main([*map(str, paths), "--output", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    assert headline_plot.main([str(paths[1]), "--output", str(picture)]) == 1
