import numpy as np
import pytest

from preft_jax.errors import ConfigError
from serve.workload import MIXED_ADAPTERS, adapter_configs, draw_users, make_workload, parse_range

OPTIONS = {
    "num_prompts": 200,
    "input_len": (3, 9),
    "output_len": (2, 4),
    "num_adapters": 5,
    "distribution": "uniform",
    "zipf_alpha": 1.0,
    "vocab_size": 50,
}


def test_one_seed_is_one_workload_and_another_seed_another():
    assert make_workload(**OPTIONS, seed=3) == make_workload(**OPTIONS, seed=3)
    assert make_workload(**OPTIONS, seed=3) != make_workload(**OPTIONS, seed=4)


def test_lengths_fill_their_ranges_with_both_ends():
    workload = make_workload(**OPTIONS, seed=0)
    assert {len(prompt) for prompt in workload.prompts} == set(range(3, 10))
    assert set(workload.output_lens) == {2, 3, 4}
    assert set(workload.users) == set(range(5))
    assert all(0 <= token < 50 for prompt in workload.prompts for token in prompt)


def test_zipf_makes_early_adapters_popular():
    counts = np.bincount(draw_users(np.random.default_rng(0), 20_000, 10, "zipf", 1.5), minlength=10)
    expected = np.arange(1, 11) ** -1.5
    np.testing.assert_allclose(counts / counts.sum(), expected / expected.sum(), atol=0.02)
    uniform = np.bincount(draw_users(np.random.default_rng(0), 20_000, 10, "uniform", 1.5), minlength=10)
    np.testing.assert_allclose(uniform / uniform.sum(), 0.1, atol=0.02)


def test_adapter_kinds():
    assert [(c.kind, c.rank) for c in adapter_configs(5, "mixed", None)] == [*MIXED_ADAPTERS, MIXED_ADAPTERS[0]]
    assert [(c.kind, c.rank) for c in adapter_configs(2, "loreft", None)] == [("loreft", 16)] * 2
    assert {c.rank for c in adapter_configs(4, "mixed", 4)} == {4}


@pytest.mark.parametrize("text", ["", "0", "5:4", "a", "3:", "-1", "1:2:3"])
def test_bad_lengths_are_refused(text):
    with pytest.raises(ConfigError, match="--input-len"):
        parse_range(text, "--input-len")


def test_unknown_kind_and_distribution_are_refused():
    with pytest.raises(ConfigError, match="allowed: mixed, lora"):
        adapter_configs(1, "dora", None)
    with pytest.raises(ConfigError, match="uniform, zipf"):
        draw_users(np.random.default_rng(0), 1, 1, "normal", 1.0)
