import numpy as np
import pytest

from preft_jax.errors import ConfigError
from serve.bench.datasets import Conversation, Trace
from serve.bench.workload import (
    MIXED_ADAPTERS,
    adapter_configs,
    conversation_texts,
    draw_users,
    parse_range,
    random_texts,
    trace_texts,
)

pytestmark = pytest.mark.host


def texts(seed):
    rng = np.random.default_rng(seed)
    return random_texts(rng, 200, input_len=(3, 9), output_len=(2, 4), vocab_size=50)


def test_one_seed_is_one_workload_and_another_seed_another():
    assert texts(3) == texts(3)
    assert texts(3) != texts(4)


def test_lengths_fill_their_ranges_with_both_ends():
    found = texts(0)
    assert {len(prompt) for prompt in found.prompts} == set(range(3, 10))
    assert set(found.output_lens) == {2, 3, 4}
    assert all(0 <= token < 50 for prompt in found.prompts for token in prompt)


def test_a_prefix_is_in_front_of_all_prompts_of_a_round():
    rng = np.random.default_rng(0)
    found = random_texts(rng, 20, input_len=(3, 9), output_len=(2, 4), vocab_size=50, prefix_len=30)
    assert len({tuple(prompt[:30]) for prompt in found.prompts}) == 1
    assert {len(prompt) for prompt in found.prompts} <= set(range(33, 40))
    assert len({tuple(prompt[30:]) for prompt in found.prompts}) == 20


def test_a_trace_gives_lengths_that_fit_the_model():
    trace = Trace(arrivals=[0, 1, 2], prompt_lens=[5, 50, 5], output_lens=[3, 3, 500])
    found = trace_texts(np.random.default_rng(0), trace, vocab_size=9, max_len=40)
    assert [len(prompt) for prompt in found.prompts] == [5, 37, 1]
    assert found.output_lens == [3, 3, 39]
    assert found.clipped == 2
    whole = trace_texts(np.random.default_rng(0), trace, vocab_size=9, max_len=None)
    assert ([len(prompt) for prompt in whole.prompts], whole.clipped) == ([5, 50, 5], 0)


def conversations(*lengths):
    return [Conversation("q" * asked, "a" * answered) for asked, answered in lengths]


def encode(text):
    return [ord(letter) for letter in text]


def test_conversations_give_prompts_and_the_lengths_of_their_answers():
    chats = conversations((5, 6), (3, 9), (9, 3), (50, 60), (7, 8))
    found = conversation_texts(np.random.default_rng(0), 4, chats, encode, output_len=None, max_len=100)
    pairs = {(len(prompt), length) for prompt, length in zip(found.prompts, found.output_lens, strict=True)}
    assert pairs == {(5, 6), (7, 8)}
    assert len(found.prompts) == 4
    assert found.skipped == 3
    other = conversation_texts(np.random.default_rng(0), 9, chats, encode, output_len=(2, 2), max_len=None)
    assert set(other.output_lens) == {2}
    assert {len(prompt) for prompt in other.prompts} == {5, 9, 50, 7}


def test_conversations_that_are_all_too_long_are_refused():
    with pytest.raises(ConfigError, match="none of the 1 conversations"):
        conversation_texts(np.random.default_rng(0), 1, conversations((50, 60)), encode, output_len=None, max_len=100)


def test_zipf_makes_early_adapters_popular():
    counts = np.bincount(draw_users(np.random.default_rng(0), 20_000, 10, "zipf", 1.5), minlength=10)
    expected = np.arange(1, 11) ** -1.5
    np.testing.assert_allclose(counts / counts.sum(), expected / expected.sum(), atol=0.02)
    uniform = np.bincount(draw_users(np.random.default_rng(0), 20_000, 10, "uniform", 1.5), minlength=10)
    np.testing.assert_allclose(uniform / uniform.sum(), 0.1, atol=0.02)


def test_round_robin_goes_round_and_distinct_repeats_nobody(rng):
    assert draw_users(rng, 5, 3, "round-robin") == [0, 1, 2, 0, 1]
    assert len(set(draw_users(rng, 6, 9, "distinct"))) == 6
    with pytest.raises(ConfigError, match="6 requests with distinct adapters"):
        draw_users(rng, 6, 5, "distinct")


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
