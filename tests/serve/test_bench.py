import json

import pytest

from serve import bench

SMALL = [
    *("--model", "tiny", "--num-prompts", "7", "--input-len", "5:40", "--output-len", "2:9"),
    *("--num-adapters", "4", "--max-num-seqs", "4"),
]


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "figures.json"
    assert bench.main([*SMALL, "--output-json", str(out)]) == 0
    return json.loads(out.read_text())


def test_all_modes_serve_every_request_with_the_same_work(figures):
    assert set(figures["modes"]) == {"base", "prefill_only", "all_token"}
    work = {(m["completed"], m["total_input_tokens"], m["total_output_tokens"]) for m in figures["modes"].values()}
    assert len(work) == 1
    assert work.pop()[0] == 7


def test_nothing_is_compiled_after_warm_up(figures):
    assert figures["recompiles"] == 0


def test_figures_say_what_they_are(figures):
    assert figures["schema"] == "preft-jax/serve-bench/1"
    assert figures["options"]["num_prompts"] == 7
    assert figures["ratio_to_base"]["base"]["mean"] == 1.0
    assert {"versions", "device", "commit", "date"} <= set(figures)
    for mode in figures["modes"].values():
        assert 0 < mode["mean_ttft_ms"] <= mode["mean_e2el_ms"]


def test_last_line_is_json_and_underscored_options_work(capsys):
    arguments = [*SMALL, "--num_prompts", "2", "--max_num_seqs=4", "--mode", "base"]
    assert bench.main(arguments) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    found = json.loads(line)
    assert set(found["modes"]) == {"base"}
    assert found["options"]["num_prompts"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-prompts", "0"], "--num-prompts is 0"),
        (["--input-len", "9:3"], "--input-len"),
        (["--model", "tinyy"], "did you mean 'tiny'"),
        (["--adapter-kind", "dora"], "allowed: mixed"),
        (["--rank", "0"], "rank 0"),
        (["--max-model-len", "8"], "max_model_len 8"),
        (["--dtype", "int8"], "int8"),
        (["--seed", "-1"], "--seed is -1"),
        (["--zipf-alpha", "nan"], "--zipf-alpha is nan"),
        (["--max-model-len", "0"], "max_model_len is 0"),
    ],
)
def test_bad_options_end_with_status_1_and_one_line(arguments, message, capsys):
    assert bench.main([*SMALL, *arguments]) == 1
    err = capsys.readouterr().err.strip()
    assert message in err
    assert "Traceback" not in err


def test_one_token_outputs_and_a_new_directory_for_the_figures(tmp_path):
    out = tmp_path / "new" / "figures.json"
    assert bench.main([*SMALL, "--mode", "base", "--output-len", "1", "--output-json", str(out)]) == 0
    assert "NaN" not in out.read_text()
    assert json.loads(out.read_text())["modes"]["base"]["mean_tpot_ms"] == 0


def test_usage_errors_end_with_status_2(capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main(["--mode", "fast"])
    assert caught.value.code == 2
