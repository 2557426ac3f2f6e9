import json

import jax.numpy as jnp
import numpy as np
import pytest

from bench import needle, quantization, tables
from bench.fp8_bases import Base, tensor_wise
from preft_jax.errors import ConfigError
from preft_jax.models import linear
from preft_jax.quantize import quantize

TINY = "--model tiny --documents 3 --length 16 --batch-size 2 --rank 4 --strength 0.5 --haystacks 1 --context 960"


def test_every_base_is_compared_with_the_plain_one(capsys, tmp_path):
    path = tmp_path / "figures.json"
    assert quantization.main([*TINY.split(), "--output-json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert (found["schema"], found["scored_tokens"]) == (quantization.SCHEMA, 3 * 7)
    assert {"versions", "device", "commit", "date"} <= set(found)
    assert [row["adapter"] for row in found["rows"]] == ["none"] * 6 + ["lora, prefill-only"] * 5
    for plain, *others in (found["rows"][:6], found["rows"][6:]):
        assert (plain["base"], plain["mean_kl"], plain["same_top_1"]) == ("plain", 0, 1)
        assert all(other["mean_kl"] > 0 for other in others)
    assert found["rows"][0]["perplexity"] != found["rows"][6]["perplexity"]
    sizes = list(found["weight_bytes"].values())
    assert sizes[1] == sizes[2] == sizes[5] < sizes[3] < sizes[0] == sizes[4]
    assert [row.get("asked") for row in found["rows"]] == [len(needle.PLACES)] * 6 + [None] * 5
    made = tables.quantization(found)
    assert made.count("\n| ") == 12
    assert "21 scored tokens" in made


def test_figures_are_those_of_distributions(tiny, rng):
    """A base compared with itself, and perplexity by the definition."""
    tokens = rng.integers(0, 256, (2, 10)).astype(np.int32)
    base = Base(tiny.params)
    found = quantization.compare(tiny.config, {"a": base, "b": base}, tokens, 2)
    assert found["a"] == found["b"]
    logits = np.asarray(quantization._logprobs(tiny.config, None, tiny.params, None, tokens), np.float64)
    nll = -np.mean([logits[b, i, tokens[b, 6 + i]] for b in range(2) for i in range(4)])
    assert found["a"]["perplexity"] == pytest.approx(np.exp(nll), rel=1e-4)


def test_one_scale_for_a_weight_loses_outputs_that_are_much_smaller(rng):
    w_DF = rng.uniform(1, 2, (32, 4)) * [1, 1e-2, 1e-4, 1e-7]
    layer = {"q": jnp.asarray(w_DF, jnp.float32), "attn_norm": jnp.ones(32)}
    one, each = (own["layers"][0] for own in (tensor_wise({"layers": [layer]}), quantize({"layers": [layer]})))
    assert one["attn_norm"] is layer["attn_norm"]
    one, each = (np.abs(np.asarray(linear.dequantized(own["q"], "float32")).T / w_DF - 1).max(0) for own in (one, each))
    assert each.max() <= 1 / 16
    assert one[:2].max() <= 1 / 16
    assert one[3] == 1


def test_a_number_is_found_if_each_of_its_tokens_is_the_likeliest(tiny, rng, monkeypatch):
    """In the haystack stand all needles, then all questions with their answers, in ``context`` tokens."""
    made = needle.haystack(lambda text: list(text.encode()), lambda n: np.full(n, ord("x")), 1200, rng)
    text = bytes(made.tokens_S.astype(np.uint8)).decode()
    assert len(text) == 1200
    for place, answer in zip(made.answers_NA, text.splitlines()[-len(needle.PLACES) :], strict=True):
        assert answer == f"The magic number of {answer.split()[4]} is{text[place[0] : place[-1] + 1]}"
        assert text.count(f"{answer}.\n") == 1
    given = made.tokens_S[made.answers_NA].reshape(1, -1).copy()
    given[0, [1, 2, 9]] += 1  # Two of the first number's, one of the second's.
    monkeypatch.setattr(needle, "_likeliest", lambda *args: given)
    assert needle.found(tiny.config, Base(tiny.params), [made, made]) == 2 * (len(needle.PLACES) - 2)
    low, high = needle.wilson(9, 10)
    assert (low, high) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    with pytest.raises(ConfigError, match="--context is 300; the questions alone take"):
        needle.haystack(lambda text: list(text.encode()), lambda n: np.zeros(n), 300, rng)


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
