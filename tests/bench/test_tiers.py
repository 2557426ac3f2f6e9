"""``bench.tiers`` on a tiny model: what it measures happens, whatever it takes."""

import json

import pytest

from bench import tables, tiers

pytestmark = pytest.mark.usefixtures("one_layer_tiny")

SMALL = (
    "--model", "tiny", "--lengths", "16,64", "--input-len", "32", "--repeats", "4", "--prefill-tokens", "128",
    "--prefill-seqs", "2", "--num-prompts", "8", "--rounds", "1", "--adapter-dtype", "fp8",
)  # fmt: skip


def test_every_tier_and_length_is_measured(tmp_path, capsys):
    out = tmp_path / "tiers.json"
    assert tiers.main([*SMALL, "--output-json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert [row["tier"] for row in figures["tiers"]] == ["base", "bank", "host", "kept", "directory"]
    assert all(0 < row["median_ttft_ms"] <= row["max_ttft_ms"] for row in figures["tiers"])
    assert [row["tier"] for row in figures["tiers"] if "gb_per_s" in row] == ["host", "kept", "directory"]
    assert [row["input_len"] for row in figures["staging"]] == [16, 64]
    assert all(row["ratio_min"] <= row["ratio"] <= row["ratio_max"] for row in figures["staging"])
    assert "| directory |" in tables.tiers(figures)


@pytest.mark.parametrize(
    ("ratios", "expected"), [((1.5, 1.02, 0.9), 64), ((1.0, 1.5, 1.0), 256), ((1.0, 1.0, 1.2), None), ((1, 1, 1), 16)]
)
def test_copies_are_hidden_from_the_length_on_after_which_they_stay_hidden(ratios, expected):
    rows = [{"input_len": n, "ratio": ratio} for n, ratio in zip((16, 64, 256), ratios, strict=True)]
    assert tiers.hidden_at(rows, 0.03) == expected


def test_too_few_prompts_are_refused(capsys):
    assert tiers.main(["--model", "tiny", "--num-prompts", "3", "--prefill-seqs", "2"]) == 1
    assert "--num-prompts is 3; give at least" in capsys.readouterr().err
