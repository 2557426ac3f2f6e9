"""Contract 7: whatever else the engine does, each request gets what it gets alone.

Random schedules of mixed, chunked, forked, preempted, cancelled and cached requests; every sample is compared with the
same request alone in a fresh engine, and with the float64 reference.
"""

import dataclasses

import hypothesis
import jax
import numpy as np
import pytest
import reference
from engine_runs import (
    GREEDY,
    STEPS,
    TIGHT,
    Sample,
    alone,
    assert_idle,
    assert_is_reference,
    assert_same,
    collect,
    request,
    serve,
)
from hypothesis import strategies as st

from preft_jax import Adapter, AdapterConfig, SamplingParams, random_adapter
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine

LENGTHS = (1, 2, 7, 8, 9, 16, 17, 24, 31, 32, 33, 40)
"""Of prompts: one token, whole pages and chunks, and one token more or less."""
LONGEST = 40
MAX_TOKENS = 20
SPANS = ((3, 7), (18, 27))
"""Where the earlier answers of a chat lie, for prompts that are one."""

samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from((0.0, 0.7, 1.0, 1.4)),
    top_k=st.sampled_from((-1, -1, 5, 40)),
    top_p=st.sampled_from((1.0, 1.0, 0.8)),
    min_p=st.sampled_from((0.0, 0.0, 0.02)),
    presence_penalty=st.sampled_from((0.0, 0.0, 1.5)),
    frequency_penalty=st.sampled_from((0.0, 0.0, 0.5)),
    repetition_penalty=st.sampled_from((1.0, 1.0, 1.3)),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 255), st.sampled_from((-100.0, -2.0, 3.0)), max_size=3),
    seed=st.none() | st.integers(0, 5),
    stop_token_ids=st.sampled_from(((), (), tuple(range(12)))),
)


@dataclasses.dataclass(frozen=True)
class Arrival:
    """One request of a schedule. ``adapter`` is a place in the schedule's palette."""

    step: int
    adapter: int
    document: int
    length: int
    chat: bool
    follows: bool
    sampling: SamplingParams
    seed: int
    max_tokens: int
    n: int
    priority: int
    logprobs: int | None
    cancel_after: int | None


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 24),
    adapter=st.integers(0, 5),
    document=st.integers(0, 1),
    length=st.sampled_from(LENGTHS),
    chat=st.booleans(),
    follows=st.booleans(),
    sampling=st.just(GREEDY) | samplings,
    seed=st.integers(0, 3),
    max_tokens=st.integers(1, MAX_TOKENS),
    n=st.sampled_from((1, 1, 1, 2, 3)),
    priority=st.sampled_from((0, 0, 0, 1, -1)),
    logprobs=st.sampled_from((None, 2)),
    cancel_after=st.sampled_from((None,) * 36 + tuple(range(12))),
)


def plain_arrival(step, adapter):
    return Arrival(
        step=step,
        adapter=adapter,
        document=1,
        length=9,
        chat=False,
        follows=False,
        sampling=GREEDY,
        seed=0,
        max_tokens=3,
        n=1,
        priority=0,
        logprobs=None,
        cancel_after=None,
    )


RELOADS = (plain_arrival(0, 1), plain_arrival(6, 2), plain_arrival(14, 1))
"""In each schedule the adapter that takes the whole bank, another one, and the first again."""


@dataclasses.dataclass
class Tally:
    """What really happened in all schedules together."""

    schedules: int = 0
    samples: int = 0
    tokens: int = 0
    base: int = 0
    all_token: int = 0
    forked: int = 0
    chunked: int = 0
    followed: int = 0
    aborted: int = 0
    sampled: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    reloads: int = 0
    near_ties: int = 0
    parted: int = 0
    largest_difference: float = 0.0

    def check(self):
        """Everything that a schedule can do was done, and near ties excuse next to nothing."""
        for name in ("base", "all_token", "forked", "followed", "aborted", "sampled"):
            assert getattr(self, name) > self.samples / 50, f"{name} happened too rarely to be tested: {self}"
        for name in ("chunked", "preemptions", "prefix_hit_tokens", "reloads"):
            assert getattr(self, name) > self.schedules / 10, f"{name} happened too rarely to be tested: {self}"
        assert self.near_ties <= self.tokens / 200, self
        assert self.parted <= self.tokens / 1000, self


def variants(adapters):
    """Return ``adapters`` and None by name, and those that differ from one of them in a single respect."""
    lora = adapters["lora"]

    def like_lora(**changes):
        return Adapter(dataclasses.replace(lora.config, **changes), lora.params)

    return {
        None: None,
        **adapters,
        "lora_f2l2": like_lora(positions="f2+l2"),
        "lora_everywhere": like_lora(positions="all"),
        "lora_same_skip": like_lora(assistant_turns="skip"),
        "lora_retrained": Adapter(lora.config, jax.tree.map(lambda leaf: leaf[::-1].copy(), lora.params)),
    }


@pytest.fixture(scope="module")
def kinds(adapters):
    return variants(adapters)


class Schedule:
    """One run of an engine: requests come, go on where others ended, and are given up."""

    def __init__(self, engine, palette, documents, longest):
        self.engine, self.palette, self.documents, self.longest = engine, palette, documents, longest
        self.samples, self.requests, self.cancel_at, self.followed = {}, {}, {}, 0

    def made(self, one):
        """Return the request of an arrival: new, or the next turn of a chat whose answer is there."""
        tokens = self.documents[one.document][: one.length]
        spans = tuple((a, min(b, one.length)) for a, b in SPANS if one.chat and a < one.length)
        adapter = self.palette[one.adapter % len(self.palette)]
        if one.follows:
            for (request_id, _), sample in self.samples.items():
                before = self.requests[request_id]
                start = len(before.prompt.token_ids)
                end = start + len(sample.token_ids)
                if sample.finish_reason in ("stop", "length") and end + 3 <= self.longest:
                    tokens = [*before.prompt.token_ids, *sample.token_ids, *self.documents[0][:3]]
                    spans, adapter = (*before.prompt.unedited_spans, (start, end)), before.adapter
                    self.followed += 1
                    break
        return request(
            tokens, adapter, spans=spans, sampling=one.sampling, max_tokens=one.max_tokens, n=one.n, seed=one.seed,
            priority=one.priority, logprobs=one.logprobs,
        )  # fmt: skip

    def run(self, arriving):
        waiting = sorted(arriving, key=lambda one: one.step)
        for step in range(STEPS):
            while waiting and waiting[0].step <= step:
                one = waiting.pop(0)
                made = self.made(one)
                request_id = self.engine.add(made)
                self.requests[request_id] = made
                self.samples |= {(request_id, index): Sample() for index in range(made.n)}
                if one.cancel_after is not None:
                    self.cancel_at[request_id] = step + one.cancel_after
            for request_id, at in self.cancel_at.items():
                if at == step:
                    self.engine.cancel(request_id)
            collect(self.samples, self.engine.step())
            if not waiting and not self.engine.has_work:
                break
        assert_idle(self.engine)

    def check(self, model, tally):
        """Compare every sample with its solo run and with the reference, and count what happened."""
        tally.schedules += 1
        for (request_id, index), sample in self.samples.items():
            one = self.requests[request_id]
            assert sample.finish_reason in ("stop", "length", "abort"), sample
            aborted = sample.finish_reason == "abort"
            assert request_id in self.cancel_at or not aborted
            difference, near_ties = assert_is_reference(model, one, sample, index)
            tally.largest_difference = max(tally.largest_difference, difference)
            tally.near_ties += near_ties
            tally.parted += assert_same(model, one, sample, alone(model, one, index), index)
            tally.samples += 1
            tally.tokens += len(sample.token_ids)
            tally.base += one.adapter is None
            tally.all_token += one.adapter is not None and not one.adapter.config.prefill_only
            tally.forked += one.n > 1 and not aborted
            tally.chunked += len(one.prompt.token_ids) > TIGHT.chunk_tokens and not aborted
            tally.aborted += aborted
            tally.sampled += one.sampling.temperature > 0
        stats = self.engine.stats
        used = {one.adapter.digest for one in self.requests.values() if one.adapter is not None}
        tally.followed += self.followed
        tally.preemptions += stats.preemptions
        tally.prefix_hit_tokens += stats.prefix_hit_tokens
        tally.reloads += max(0, stats.adapter_loads - len(used))


def check_schedules(model, kinds, config, seed, examples):
    """Run random schedules, the same ones each time for a seed; returns the tally."""
    tally, documents = Tally(), [np.random.default_rng(i).integers(0, 250, 64).tolist() for i in range(2)]
    # With the base model, an adapter that takes the whole bank, and an all-token one.
    palettes = st.tuples(
        st.just(None),
        st.just("lora_pattern"),
        st.sampled_from(("lora_all", "loreft_all", "lora_everywhere")),
        *[st.sampled_from([name for name in kinds if name])] * 2,
    )

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
        phases=[hypothesis.Phase.generate],  # shrinking takes minutes: each try serves all requests alone, too
    )
    @hypothesis.given(palettes, st.lists(arrivals, min_size=4, max_size=9))
    def each_request_is_itself(palette, arriving):
        engine = Engine(model, config)
        schedule = Schedule(engine, [kinds[name] for name in palette], documents, LONGEST + 4)
        schedule.run([*RELOADS, *arriving])
        schedule.check(model, tally)

    each_request_is_itself()
    return tally


def test_each_request_of_a_random_schedule_is_served_as_if_alone(lively, kinds, pytestconfig):
    tally = check_schedules(lively, kinds, TIGHT, pytestconfig.getoption("--seed"), examples=25)
    print(tally)
    tally.check()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prefix_caching": False},
        {"chunk_tokens": 5, "num_kv_pages": 9, "prefill_seqs": 2},
        {"chunk_tokens": 21, "num_kv_pages": 9},
        {"max_num_seqs": 2},
    ],
    ids=str,
)
def test_many_random_schedules(changes, lively, kinds, pytestconfig):
    config = dataclasses.replace(TIGHT, **changes)
    print(check_schedules(lively, kinds, config, 1 + pytestconfig.getoption("--seed"), examples=80))


REAL = EngineConfig(
    max_num_seqs=4, max_model_len=80, page_size=16, num_kv_pages=7, prefill_tokens=32, prefill_seqs=2, chunk_tokens=16,
    tile=16, max_rank=16, bank_pages=2, all_token=True, decode_steps=4,
)  # fmt: skip


@pytest.mark.slow
def test_a_real_model_serves_schedules_as_it_was_trained(smollm2, trained, rng):
    """SmolLM2-135M in float32, thirty layers, real text, chunked, preempted and cached: training's log-probabilities.

    Log-probabilities of thirty layers differ by up to 1e-3 in float32.
    """
    configs = (AdapterConfig(rank=16), AdapterConfig(kind="loreft", rank=8), AdapterConfig(rank=8, positions="all"))
    made = [random_adapter(c, smollm2.config, jax.random.key(i), strength=0.5) for i, c in enumerate(configs)]
    texts = ("The capital of France is", "def add(a, b):\n    return", "Once upon a time, in a far away land, there")
    prompts = [smollm2.tokenizer.encode(text) for text in texts]
    requests = [request(ids, adapter, max_tokens=40) for ids, adapter in zip(prompts, made, strict=True)]
    requests += [request(ids, None, max_tokens=20) for ids in prompts]
    requests += [request(prompts[2] * 2, made[0], max_tokens=8)] * 2
    engine = Engine(smollm2, REAL)
    for every in (0, 2):
        for one, (sample,) in zip(requests, serve(engine, requests, every), strict=True):
            tokens, mask = np.zeros(80, np.int32), np.zeros((80, 2), bool)  # of one length, so that little compiles
            start, count = len(one.prompt.token_ids), len(sample.token_ids)
            tokens[: start + count] = [*one.prompt.token_ids, *sample.token_ids]
            mask[: start + count] = reference.adapter_mask(one.adapter, start, count)
            log_probs = trained(smollm2, one.adapter, tokens, mask)[start - 1 : start + count - 1]
            np.testing.assert_allclose(sample.logprobs, log_probs[np.arange(count), sample.token_ids], atol=1e-3)
            assert (log_probs.max(axis=1) - log_probs[np.arange(count), sample.token_ids] < 2e-3).all()
    assert engine.stats.preemptions > 0
    assert engine.stats.prefix_hit_tokens > 0
