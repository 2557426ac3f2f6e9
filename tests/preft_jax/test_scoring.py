"""Scores of given answers: those of the model that serves them, the answer un-edited under a prompt-only adapter."""

import jax
import numpy as np
import pytest
import reference
from engine_outputs import SCORING

import preft_jax as pj
from serve import Engine, Request

ATOL = 1e-3
"""Float32 rounding, in programs of other shapes, of a model whose logits are large."""

PROMPT, ANSWER = "What does the owl do?", " It hoots."
CHAT = [
    {"role": "user", "content": "Owl?"},
    {"role": "assistant", "content": "Hoots."},
    {"role": "user", "content": "And two?"},
]
KINDS = ("lora", "loreft_f3l2", "lora_all", "lora_pattern")


def ids(model, text):
    return model.tokenizer.encode(text, add_special_tokens=False)


def expected(trained, model, adapter, prompt, answer):
    """Return the log-probabilities of an answer by the rule, token by token."""
    tokens = np.array([*prompt, *answer])
    config = pj.AdapterConfig() if adapter is None else adapter.config
    mask = reference.edit_mask(len(prompt), config.positions, config.groups, generated=len(answer))
    at = np.arange(len(prompt) - 1, len(tokens) - 1)
    return trained(model, adapter, tokens, mask)[at, tokens[at + 1]]


def test_each_adapter_scores_its_own_in_one_call(lively, adapters, trained):
    owners = [*(adapters[name] for name in KINDS), None]
    scores = pj.logprobs(lively, [PROMPT] * 5, [ANSWER] * 5, owners)
    prompt, answer = lively.tokenizer.encode(PROMPT), ids(lively, ANSWER)
    for adapter, score in zip(owners, scores, strict=True):
        assert score.shape == (len(answer),)
        np.testing.assert_allclose(score, expected(trained, lively, adapter, prompt, answer), atol=ATOL)


def test_it_is_what_the_engine_drew_from(lively, adapters):
    engine = Engine(lively, SCORING)
    done = engine.generate([Request(prompt=PROMPT, adapter=adapters["lora"], max_tokens=8, seed=1)])[0]
    (score,) = pj.logprobs(lively, PROMPT, done.token_ids, adapters["lora"])
    np.testing.assert_allclose(score, done.logprobs, atol=ATOL)
    # Scored as a part of the prompt, the answer is edited too: that is another model.
    whole = [*lively.tokenizer.encode(PROMPT), *done.token_ids]
    request = Request(prompt=whole, adapter=adapters["lora"], max_tokens=1, prompt_logprobs=0)
    edited = [one.logprob for one in engine.generate([request])[0].prompt_logprobs[-len(score) :]]
    assert np.abs(score - edited).max() > 0.1


def test_prompts_and_answers_of_every_kind_are_one(lively, adapters):
    prompt, answer = lively.tokenizer.encode(PROMPT), ids(lively, ANSWER)
    encoded = pj.encode_prompt(lively.tokenizer, PROMPT, vocab_size=256)
    kinds = [PROMPT, prompt, np.array(prompt), jax.numpy.asarray(prompt), tuple(prompt), encoded]
    answers = [ANSWER, answer, np.array(answer), tuple(answer), jax.numpy.asarray(answer), ANSWER]
    scores = pj.logprobs(lively, kinds, answers, adapters["lora"])
    for score in scores[1:]:
        np.testing.assert_allclose(score, scores[0], atol=ATOL)
    for one, given in zip(kinds, answers, strict=True):
        np.testing.assert_allclose(pj.logprobs(lively, one, given, adapters["lora"])[0], scores[0], atol=ATOL)


@pytest.mark.parametrize("name", ["lora", "lora_skip"])
def test_a_chat_is_scored_through_its_end_of_turn(name, lively, adapters, trained):
    encoded, answer = pj.encode_answer(lively.tokenizer, [*CHAT, {"role": "assistant", "content": "They hoot."}])
    (score,) = pj.logprobs(lively, CHAT, "They hoot.", adapters[name])
    assert score.shape == (len(answer),)
    tokens = np.array([*encoded.token_ids, *answer])
    mask = pj.extend_edit_mask(pj.prompt_edit_mask(encoded, adapters[name].config), len(answer), "prompt")
    at = np.arange(len(encoded.token_ids) - 1, len(tokens) - 1)
    np.testing.assert_allclose(score, trained(lively, adapters[name], tokens, mask)[at, tokens[at + 1]], atol=ATOL)


def test_batches_of_many_lengths_and_masks_of_ones_own(lively, adapters, trained, rng):
    prompts = [rng.integers(0, 250, n).tolist() for n in (3, 21, 5, 9, 17)]
    answers = [rng.integers(0, 250, n).tolist() for n in (4, 1, 7, 2, 3)]
    scores = pj.logprobs(lively, prompts, answers, adapters["lora"], batch_size=2)
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        np.testing.assert_allclose(score, expected(trained, lively, adapters["lora"], prompt, answer), atol=ATOL)
    base = pj.logprobs(lively, prompts, answers)
    masks = [np.zeros(len(prompt), bool) for prompt in prompts]
    for score, own in zip(base, pj.logprobs(lively, prompts, answers, adapters["lora"], edit_masks=masks), strict=True):
        np.testing.assert_allclose(own, score, atol=ATOL)


def test_perplexity_is_over_all_tokens(lively):
    scores = np.concatenate(pj.logprobs(lively, ["a", "bc"], ["xyz", "u"]))
    assert len(scores) == 4
    np.testing.assert_allclose(pj.perplexity(lively, ["a", "bc"], ["xyz", "u"]), np.exp(-scores.mean()), rtol=1e-5)
    with pytest.raises(pj.RequestError, match="no prompts"):
        pj.perplexity(lively, [], [])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("a", ""), pj.RequestError, "the answer is empty"),
        ((["a", "b"], ["c"]), pj.RequestError, "answers has 1 entries for 2 prompts"),
        ((["a"], ["b"], [None, None]), pj.RequestError, "adapters has 2 entries for 1 prompts"),
        (("a", [300]), pj.RequestError, "token id 300 is outside"),
        (("a", "b" * 2000), pj.RequestError, "has 2001 tokens; the model has 1024 positions"),
        (("a", "b", "ann"), pj.AdapterError, "adapters holds 'ann'; give an Adapter"),
        ((7, "b"), pj.RequestError, "prompts is of type int"),
    ],
)
def test_what_cannot_be_scored_is_named(arguments, error, message, lively):
    with pytest.raises(error, match=message):
        pj.logprobs(lively, *arguments)


def test_a_config_is_no_model(tiny_text):
    with pytest.raises(pj.ModelError, match="model is of type ModelConfig; give what load_model returns"):
        pj.logprobs(tiny_text.config, "a", "b")
