"""The contracts of serving, one at a time: who is edited when, and whose KV is whose.

Each has a twin that breaks it on purpose and must differ by far more than the tolerance, or a count that shows that
the thing in question happened. Random schedules of everything at once are in ``test_engine_schedules.py``.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import reference
from engine_runs import (
    ATOL,
    GREEDY,
    ROOMY,
    TIGHT,
    VISIBLE,
    alone,
    assert_idle,
    assert_is_reference,
    assert_same,
    collect,
    request,
    serve,
    serve_one,
)

from preft_jax import Adapter, SamplingParams, random_adapter
from preft_jax.sampling.parameters import derived_seed
from serve.engine.engine import Engine

PREFILL_ONLY = ("lora", "lora_r24", "lora_pattern", "direft", "direft_free", "loreft", "loreft_f3l2", "lora_skip")
ALL_TOKEN = ("lora_all", "loreft_all")
EDITS_ALL_PROMPT = tuple(name for name in PREFILL_ONLY if name != "loreft_f3l2")
PAGE = ROOMY.page_size


@pytest.fixture(scope="module")
def kinds(adapters):
    """Return adapters by name; None is the base model."""
    return {None: None, **adapters}


@pytest.fixture
def roomy(lively):
    return Engine(lively, ROOMY)


@pytest.fixture
def tight(lively):
    return Engine(lively, TIGHT)


def like(adapter, **changes):
    """Return the same weights under another rule."""
    return Adapter(dataclasses.replace(adapter.config, **changes), adapter.params)


def retrained(adapter, model, seed=77):
    """Return other weights under the same configuration: what a reload under the same name brings."""
    return random_adapter(adapter.config, model.config, jax.random.key(seed), strength=0.7)


def check(model, one, samples, compare_alone=True):
    """Every sample of a request is the reference's, and the one that its seed gives alone."""
    for index, sample in enumerate(samples):
        assert_is_reference(model, one, sample, index)
        if compare_alone:
            assert_same(model, one, sample, alone(model, one, index), index)


def forced(model, one, token_ids, mask):
    """Return the reference's log-probabilities of a request's generated tokens under an edit mask of the caller's."""
    prompt = one.prompt.token_ids
    logits = reference.forward(model.config, model.params, [*prompt, *token_ids], one.adapter, mask)
    log_probs = reference.log_softmax(logits)[len(prompt) - 1 : -1]
    return log_probs[np.arange(len(token_ids)), token_ids]


def mask_of(one, generated):
    return reference.adapter_mask(one.adapter, len(one.prompt.token_ids), generated, one.prompt.unedited_spans)


# Mixed batches and the reference.

DRAWN = SamplingParams(temperature=0.8, top_k=30, top_p=0.9, min_p=0.01)
PENALISED = SamplingParams(
    temperature=1.0, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2, logit_bias={3: 4.0, 99: -100}
)


@pytest.mark.parametrize("config", [ROOMY, TIGHT], ids=["whole", "chunked"])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, PENALISED], ids=["greedy", "filters", "penalties"])
def test_a_mixed_batch_is_the_references(sampling, config, lively, kinds, rng):
    """Every kind, the base model among them, one prompt for all, so that no two may have the same answer."""
    tokens = rng.integers(0, 250, 19)
    requests = [
        request(tokens, adapter, spans=[(4, 9)], sampling=sampling, max_tokens=8, seed=i, n=1 + i % 2, logprobs=2)
        for i, adapter in enumerate(kinds.values())
    ]
    done = serve(Engine(lively, config), requests)
    for one, samples in zip(requests, done, strict=True):
        check(lively, one, samples, compare_alone=False)
    first = np.array([samples[0].logprobs[0] for samples in done])
    apart = np.abs(first[:, None] - first) + np.eye(len(first))
    assert (apart > 1e-6).all(), "two adapters gave one answer"


@pytest.mark.parametrize("name", [None, *PREFILL_ONLY, *ALL_TOKEN])
def test_logprobs_are_the_trainers_on_the_same_tokens(name, roomy, lively, kinds, trained, rng):
    """15 prompt tokens and six drawn at temperature 0.8; the raw log-probability is that of temperature 1."""
    sampling = SamplingParams(temperature=0.8, top_k=40)
    one = request(rng.integers(0, 250, 15), kinds[name], sampling=sampling, seed=3)
    sample, _ = serve_one(roomy, one)
    tokens = [*one.prompt.token_ids, *sample.token_ids]
    log_probs = trained(lively, one.adapter, tokens, mask_of(one, 6))[14:-1]
    np.testing.assert_allclose(sample.logprobs, log_probs[np.arange(6), sample.token_ids], atol=ATOL)


def test_the_same_batch_twice_is_bitwise_the_same(lively, kinds, rng):
    requests = [
        request(rng.integers(0, 250, 3 + 2 * i), kinds[name], sampling=DRAWN, seed=i)
        for i, name in enumerate((None, "lora", "direft", "loreft_f3l2", "lora_all", "lora_pattern"))
    ]
    first, again = (serve(Engine(lively, ROOMY), requests) for _ in range(2))
    assert [sample for (sample,) in first] == [sample for (sample,) in again]


def test_prompts_and_generated_tokens_share_calls(tight, lively, kinds, rng):
    """Requests that come one by one, so that chunks of some are prefilled between the decodes of others."""
    names = ("loreft_f3l2", None, "lora_all", "lora_r24", "direft", "lora_pattern", "loreft_all", "lora")
    requests = [
        request(rng.integers(0, 250, count), kinds[name], max_tokens=12)
        for name, count in zip(names, (33, 1, 17, 40, 16, 8, 25, 2), strict=True)
    ]
    for one, samples in zip(requests, serve(tight, requests, every=2), strict=True):
        check(lively, one, samples)


@pytest.mark.slow
def test_chunks_may_be_shorter_than_a_tile(lively, kinds, rng):
    """Two adapters that fit no tile together: the second one's chunk begins at the next, after a gap."""
    engine = Engine(lively, dataclasses.replace(TIGHT, chunk_tokens=5, prefill_seqs=2, bank_pages=8))
    requests = [request(rng.integers(0, 250, 24), kinds[name]) for name in ("lora_pattern", "loreft_f3l2")]
    for one, (sample,) in zip(requests, serve(engine, requests), strict=True):
        assert_is_reference(lively, one, sample)


def test_a_cancelled_request_in_the_queue_disturbs_no_other(roomy, lively, kinds, rng):
    """Its adapter is gone from the host while it still stands in line behind others."""
    requests = [request(rng.integers(0, 250, 9), max_tokens=5 + 5 * i) for i in range(10)]
    ids, samples = [roomy.add(one) for one in requests], {}
    collect(samples, roomy.step())
    cancelled = roomy.add(request(rng.integers(0, 250, 9), kinds["lora"]))
    roomy.cancel(cancelled)
    while roomy.has_work:
        collect(samples, roomy.step())
    assert samples[cancelled, 0].finish_reason == "abort"
    for request_id, one in zip(ids, requests, strict=True):
        assert_is_reference(lively, one, samples[request_id, 0])
    assert_idle(roomy)


# Contracts 2 and 3: the last prompt token is edited, generated ones never are.


def assert_last_prompt_token_was_edited(model, one, sample):
    assert_is_reference(model, one, sample)
    mask = mask_of(one, len(sample.token_ids))
    mask[len(one.prompt.token_ids) - 1] = False
    broken = forced(model, one, sample.token_ids, mask)
    assert np.abs(broken - sample.logprobs)[0] > VISIBLE


@pytest.mark.parametrize("name", PREFILL_ONLY)
@pytest.mark.parametrize("count", [1, 2 * TIGHT.chunk_tokens + 1, 2 * TIGHT.chunk_tokens, 5])
def test_the_last_prompt_token_is_edited(count, name, tight, lively, kinds, rng):
    """One-token prompts, last chunks of one token, and full ones."""
    one = request(rng.integers(0, 250, count), kinds[name])
    sample, _ = serve_one(tight, one)
    if name == "loreft_f3l2" and count == 1:
        assert_is_reference(lively, one, sample)  # f3+l2 edits no token of a prompt of one
    else:
        assert_last_prompt_token_was_edited(lively, one, sample)
    assert tight.stats.prefill_calls == -(-count // TIGHT.chunk_tokens)


@pytest.mark.parametrize("name", PREFILL_ONLY)
@pytest.mark.parametrize("count", [4 * PAGE, 4 * PAGE + 1, PAGE])
def test_the_last_prompt_token_is_edited_on_a_full_hit(count, name, roomy, lively, kinds, rng):
    """All of the prompt is cached. Its last token is computed again for its logits, and edited."""
    one = request(rng.integers(0, 250, count), kinds[name])
    cold, hits = serve_one(roomy, one)
    assert hits == 0
    for _ in range(2):
        warm, hits = serve_one(roomy, one)
        assert (count - 1) // PAGE * PAGE <= hits < count
        assert_last_prompt_token_was_edited(lively, one, warm)
        assert_same(lively, one, warm, cold)


def test_a_short_prompts_last_token_is_edited_beside_decodes(tight, lively, kinds, rng):
    """One-token prompts that come while others decode look like decodes themselves."""
    requests = [request(rng.integers(0, 250, 9), kinds["lora"], max_tokens=20)]
    requests += [request([token], kinds[name]) for token, name in enumerate(EDITS_ALL_PROMPT)]
    for one, (sample,) in zip(requests, serve(tight, requests, every=1), strict=True):
        assert_last_prompt_token_was_edited(lively, one, sample)


@pytest.mark.parametrize("caching", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_generated_tokens_stay_unedited_when_computed_again(caching, lively, kinds, rng):
    """Six long answers in a cache for two: all but the first are preempted, and resumed with generated tokens."""
    engine = Engine(lively, dataclasses.replace(TIGHT, prefix_caching=caching))
    names = ("lora", "loreft", "direft", "loreft_f3l2", "lora_r24", "lora_skip")
    requests = [request(rng.integers(0, 250, 13 + i), kinds[name], max_tokens=34) for i, name in enumerate(names)]
    done = serve(engine, requests)
    assert engine.stats.preemptions >= 4
    assert engine.stats.prompt_tokens > sum(13 + i for i in range(6)) + 8, "nothing was computed again"
    for one, (sample,) in zip(requests, done, strict=True):
        check(lively, one, [sample])
        mask = mask_of(one, 34)
        assert not mask[len(one.prompt.token_ids) :].any()
        mask[len(one.prompt.token_ids) :, 0] = True
        assert np.abs(forced(lively, one, sample.token_ids, mask) - sample.logprobs).max() > VISIBLE


def test_an_all_token_adapter_edits_generated_tokens_when_computed_again(tight, lively, kinds, rng):
    """The other way round, in one batch with others."""
    names = ("lora_all", None, "loreft_all", "lora")
    requests = [request(rng.integers(0, 250, 13 + i), kinds[name], max_tokens=34) for i, name in enumerate(names)]
    done = serve(tight, requests)
    assert tight.stats.preemptions >= 2
    for one, samples in zip(requests, done, strict=True):
        check(lively, one, samples)


def test_a_preempted_request_goes_on_with_the_adapter_it_began_with(tight, lively, kinds, rng):
    """While newer weights of the same configuration are served."""
    old, new = kinds["lora"], retrained(kinds["lora"], lively)
    tokens = rng.integers(0, 250, 13)
    requests = [request(tokens, adapter, max_tokens=34) for adapter in (old, old, new, new)]
    done = serve(tight, requests, every=1)
    assert tight.stats.preemptions >= 2
    for one, samples in zip(requests, done, strict=True):
        check(lively, one, samples)


def test_an_adapter_loaded_again_is_the_one_just_loaded(tight, lively, kinds, rng):
    """One that takes the whole bank comes between; a third request finds the adapter still there."""
    for name, loads in (("lora", 1), ("lora_pattern", 2), ("lora", 3), ("lora", 3), (None, 3), ("lora_r24", 4)):
        one = request(rng.integers(0, 250, 12), kinds[name])
        sample, _ = serve_one(tight, one)
        check(lively, one, [sample])
        assert tight.stats.adapter_loads == loads


# Contract 5: whose KV is whose.

STRANGERS = {
    "another adapter": lambda kinds, model: (kinds["lora"], kinds["lora_r24"]),
    "another kind": lambda kinds, model: (kinds["direft"], kinds["loreft"]),
    "the base model": lambda kinds, model: (kinds["lora"], None),
    "another mask rule": lambda kinds, model: (kinds["lora"], like(kinds["lora"], positions="f3+l2")),
    "all tokens": lambda kinds, model: (kinds["lora"], like(kinds["lora"], positions="all")),
    "newer weights": lambda kinds, model: (kinds["lora"], retrained(kinds["lora"], model)),
    "another scale": lambda kinds, model: (kinds["lora"], like(kinds["lora"], alpha=24.0)),
    "free and orthonormal": lambda kinds, model: (kinds["direft"], like(kinds["direft"], orthonormal=False)),
    "all-token and base": lambda kinds, model: (kinds["loreft_all"], None),
}


@pytest.mark.parametrize("case", STRANGERS)
@pytest.mark.parametrize("reverse", [False, True])
def test_kv_belongs_to_one_adapter(case, reverse, roomy, lively, kinds, rng):
    """The same prompt for two: the second finds nothing, each finds its own later, and all answers are cold ones."""
    pair = STRANGERS[case](kinds, lively)[:: -1 if reverse else 1]
    tokens = rng.integers(0, 250, 5 * PAGE)
    requests = [request(tokens, adapter, max_tokens=10) for adapter in pair]
    cold = [alone(lively, one) for one in requests]
    assert np.abs(np.subtract(*[sample.logprobs for sample in cold])).max() > VISIBLE
    for expected_hits in (0, 4 * PAGE):
        for one, expected in zip(requests, cold, strict=True):
            sample, hits = serve_one(roomy, one)
            assert hits == 0 if expected_hits == 0 else hits >= expected_hits
            assert_same(lively, one, sample, expected)
            assert_is_reference(lively, one, sample)


def test_kv_of_two_adapters_served_at_once_is_not_shared(roomy, lively, kinds, rng):
    tokens = rng.integers(0, 250, 5 * PAGE)
    pair = (kinds["lora"], like(kinds["lora"], positions="f3+l2"), retrained(kinds["lora"], lively), None)
    requests = [request(tokens, adapter) for adapter in pair]
    for one, samples in zip(requests, serve(roomy, requests), strict=True):
        check(lively, one, samples)
    assert roomy.stats.prefix_hit_tokens == 0


def test_kv_under_another_mask_is_not_found(roomy, lively, kinds, rng):
    """One adapter, the same tokens: a longer prompt's last ones lie elsewhere, so a page they were in is another."""
    tokens = rng.integers(0, 250, 5 * PAGE)
    short, long = (request(tokens[:count], kinds["loreft_f3l2"]) for count in (3 * PAGE, 5 * PAGE))
    serve_one(roomy, short)
    sample, hits = serve_one(roomy, long)
    assert hits == 2 * PAGE
    check(lively, long, [sample])


def test_an_answer_and_a_users_text_of_the_same_tokens_are_not_the_same(roomy, lively, kinds, rng):
    """A ``skip`` adapter edits the one and not the other."""
    tokens = rng.integers(0, 250, 5 * PAGE)
    plain, chat = (request(tokens, kinds["lora_skip"], spans=spans) for spans in ((), [(2 * PAGE + 3, 3 * PAGE)]))
    for one, found in ((plain, 0), (chat, 2 * PAGE), (plain, 4 * PAGE), (chat, 4 * PAGE)):
        sample, hits = serve_one(roomy, one)
        assert hits == found
        check(lively, one, [sample])


@pytest.mark.parametrize("name", [None, *PREFILL_ONLY, *ALL_TOKEN])
def test_a_prompt_that_begins_alike_is_found(name, roomy, lively, kinds, rng):
    """Hit and cold are the same: for the whole prompt, and for one that goes on otherwise within a page."""
    tokens = rng.integers(0, 250, 5 * PAGE)
    other = [*tokens[: 3 * PAGE + 4], *rng.integers(0, 250, 9)]
    serve_one(roomy, request(tokens, kinds[name]))
    for ids, least in ((tokens, 4 * PAGE), (other, 3 * PAGE)):
        one = request(ids, kinds[name], max_tokens=10)
        sample, hits = serve_one(roomy, one)
        assert least <= hits < len(ids)
        check(lively, one, [sample])


def test_forks_do_not_write_into_each_others_pages(roomy, lively, kinds, rng):
    """Samples share the prompt's pages; its last one is part full, and each sample goes on in it."""
    sampling = SamplingParams(temperature=1.2)
    requests = [
        request(rng.integers(0, 250, count), kinds[name], sampling=sampling, n=3, max_tokens=12, seed=count)
        for name, count in (("lora", 2 * PAGE + 3), ("lora_all", 3 * PAGE - 1))
    ]
    done = serve(roomy, requests)
    assert roomy.stats.prompt_tokens < 60, "the prompts were not prefilled once"
    for one, samples in zip(requests, done, strict=True):
        assert len({tuple(sample.token_ids) for sample in samples}) == 3
        check(lively, one, samples)


# Contract 6: many turns.


def chat(engine, adapter, rng, counts):
    """Run turns with one new user text each; returns requests, samples and hits, one each per turn.

    The newest token of an answer has no KV yet, also where it would fill a page.
    """
    tokens, spans, turns = [], [], []
    for user, answer in counts:
        tokens += rng.integers(0, 250, user).tolist()
        one = request(tokens, adapter, spans=spans, max_tokens=answer)
        sample, hits = serve_one(engine, one)
        turns.append((one, sample, hits))
        spans = [*spans, (len(tokens), len(tokens) + answer)]
        tokens += sample.token_ids
    return turns


@pytest.mark.parametrize("name", ["lora", "loreft", "direft_free"])
def test_a_skip_adapter_finds_the_kv_that_it_generated(name, roomy, lively, kinds, rng):
    turns = chat(roomy, like(kinds[name], assistant_turns="skip"), rng, [(11, 13), (5, 14), (4, 6)])
    for (one, sample, hits), computed in zip(turns, (0, 11 + 13 - 1, 24 + 5 + 14 - 1), strict=True):
        assert hits == computed // PAGE * PAGE
        check(lively, one, [sample])
    mask = mask_of(one, len(sample.token_ids))
    mask[: len(one.prompt.token_ids), 0] = True
    assert np.abs(forced(lively, one, sample.token_ids, mask) - sample.logprobs).max() > VISIBLE


@pytest.mark.parametrize("name", ["lora", "loreft", "direft_free"])
def test_an_edit_adapter_finds_its_prompts_only(name, roomy, lively, kinds, rng):
    """Earlier answers are edited now: the KV that they were generated with is another."""
    turns = chat(roomy, kinds[name], rng, [(11, 13), (5, 14), (4, 6)])
    for (one, sample, hits), edited in zip(turns, (0, 11, 24 + 5), strict=True):
        assert hits == edited // PAGE * PAGE
        check(lively, one, [sample])


@pytest.mark.parametrize("name", [None, *ALL_TOKEN])
def test_base_and_all_token_requests_find_the_kv_that_they_generated(name, roomy, lively, kinds, rng):
    """Their rule is one for prompts and answers."""
    turns = chat(roomy, kinds[name], rng, [(11, 13), (5, 13)])
    assert [hits for *_, hits in turns] == [0, (11 + 13 - 1) // PAGE * PAGE]
    for one, sample, _ in turns:
        check(lively, one, [sample])


def test_a_chat_that_was_preempted_is_found_too(tight, lively, kinds, rng):
    """A cache that holds two of four chats: the last to end are the first to go on."""
    adapter = like(kinds["lora"], assistant_turns="skip")
    firsts = [request(rng.integers(0, 250, 11), adapter, max_tokens=22) for _ in range(4)]
    answers = [samples[0].token_ids for samples in serve(tight, firsts)]
    assert tight.stats.preemptions > 0
    seconds = [
        request([*one.prompt.token_ids, *answer, *rng.integers(0, 250, 5)], adapter, spans=[(11, 33)], max_tokens=9)
        for one, answer in zip(firsts, answers, strict=True)
    ]
    before = tight.stats.prefix_hit_tokens
    for one, samples in zip(seconds[::-1], serve(tight, seconds[::-1]), strict=True):
        check(lively, one, samples)
    assert tight.stats.prefix_hit_tokens > before


# Seeds.


def test_draws_do_not_depend_on_neighbours_or_arrival(lively, kinds, rng):
    """The same tokens in a batch, in the batch reversed, one after the other, cut and preempted, and alone."""
    sampling = SamplingParams(temperature=1.0)
    requests = [
        request(rng.integers(0, 250, 5 + 4 * i), kinds[name], sampling=sampling, seed=i, max_tokens=16)
        for i, name in enumerate((None, "lora", "loreft_f3l2", "lora_all", "direft", None, "loreft"))
    ]
    cold = [alone(lively, one) for one in requests]
    for config, every in itertools.product((ROOMY, TIGHT), (0, 3)):
        for order in (requests, requests[::-1]):
            done = dict(zip(order, serve(Engine(lively, config), order, every), strict=True))
            for one, expected in zip(requests, cold, strict=True):
                assert not assert_same(lively, one, done[one][0], expected)


def test_a_seed_is_the_requests_own(roomy, kinds, rng):
    """``sampling.seed`` goes before ``seed``; a request's samples and its neighbours' differ."""
    tokens = rng.integers(0, 250, 9)

    def drawn(seed=0, own=None, n=1):
        sampling = SamplingParams(temperature=1.0, seed=own)
        (samples,) = serve(roomy, [request(tokens, kinds["lora"], sampling=sampling, seed=seed, n=n, max_tokens=12)])
        return [sample.token_ids for sample in samples]

    many = [drawn(seed, n=3) for seed in range(4)]
    assert len({tuple(ids) for samples in many for ids in samples}) == 12
    assert [samples[0] for samples in many] == [drawn(seed)[0] for seed in range(4)]
    assert drawn(seed=1, n=3) == many[1]
    assert drawn(seed=derived_seed(1, 2)) == [many[1][2]]
    assert drawn(seed=99, own=2, n=2) == many[2][:2]
