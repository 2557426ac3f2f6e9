import json

import numpy as np
import pytest

from bench import quantization, tables

TINY = "--model tiny --documents 3 --length 16 --batch-size 2 --rank 4 --strength 0.5"


def test_every_base_is_compared_with_the_plain_one(capsys, tmp_path):
    path = tmp_path / "figures.json"
    assert quantization.main([*TINY.split(), "--output-json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert (found["schema"], found["scored_tokens"]) == (quantization.SCHEMA, 3 * 7)
    assert {"versions", "device", "commit", "date"} <= set(found)
    assert [row["adapter"] for row in found["rows"]] == ["none"] * 5 + ["lora, prefill-only"] * 5
    for plain, *others in (found["rows"][:5], found["rows"][5:]):
        assert (plain["base"], plain["mean_kl"], plain["same_top_1"]) == ("plain", 0, 1)
        assert all(other["mean_kl"] > 0 for other in others)
    assert found["rows"][0]["perplexity"] != found["rows"][5]["perplexity"]
    sizes = list(found["weight_bytes"].values())
    assert sizes[1] == sizes[4] < sizes[2] < sizes[0] == sizes[3]
    made = tables.quantization(found)
    assert made.count("\n| ") == 11
    assert "21 scored tokens" in made


def test_figures_are_those_of_distributions(tiny, rng):
    """A base compared with itself, and perplexity by the definition."""
    tokens = rng.integers(0, 256, (2, 10)).astype(np.int32)
    base = quantization.Base(tiny.params)
    found = quantization.compare(tiny.config, {"a": base, "b": base}, None, tokens, 2)
    assert found["a"] == found["b"]
    logits = np.asarray(quantization._logprobs(tiny.config, None, tiny.params, None, tokens), np.float64)
    nll = -np.mean([logits[b, i, tokens[b, 6 + i]] for b in range(2) for i in range(4)])
    assert found["a"]["perplexity"] == pytest.approx(np.exp(nll), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--documents 0", "--documents is 0; give at least 1"),
        ("--length 3", "--length is 3; give at least 4"),
        ("--documents 900000", "lower them"),
    ],
)
def test_what_cannot_be_measured_ends_with_one_line(options, reason, capsys):
    assert quantization.main([*TINY.split(), *options.split()]) == 1
    assert reason in capsys.readouterr().err
