"""Runs of the serving engine, and what its samples must be: those of the request alone, and those of the reference.

All of them are float32 on a two-layer model whose logits are within about ±10.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import reference

from preft_jax import SamplingParams
from preft_jax.sampling.parameters import derived_seed
from preft_jax.text.chat import EncodedPrompt
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.request import Request

ATOL = 1e-4
"""Float32 rounding of log-probabilities through two layers and a head; measured at about 1e-5."""
VISIBLE = 50 * ATOL
"""What a broken contract must change at least."""
TIE = 2 * ATOL
"""Tokens whose logits (with their noise, over the temperature) are closer than this may change places."""

GREEDY = SamplingParams(temperature=0.0)

# Two configurations only: each compiles its own programs.
ROOMY = EngineConfig(
    max_num_seqs=6, max_model_len=64, page_size=8, num_kv_pages=64, prefill_tokens=64, prefill_seqs=4, tile=16,
    max_rank=48, bank_pages=32, all_token=True, decode_steps=4,
)  # fmt: skip
"""Every prompt is prefilled at once, and nothing is ever short."""
TIGHT = EngineConfig(
    max_num_seqs=6, max_model_len=64, page_size=8, num_kv_pages=12, prefill_tokens=32, prefill_seqs=4, chunk_tokens=16,
    tile=16, max_rank=48, bank_pages=4, all_token=True, decode_steps=4,
)  # fmt: skip
"""Prompts come in chunks of two pages; two long sequences fill the cache; three rank pages hold few adapters."""

LONGEST_SAMPLE = 64
"""Tokens of a sample that the reference checks, at most."""

STEPS = 3000
"""No schedule here needs a tenth of these; one that takes them all is stuck."""


@dataclasses.dataclass
class Sample:
    """All outputs of one sample, put together."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    sampling_logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None


def collect(samples, outputs):
    """Add what a step gave to ``samples``, a dict by request id and index."""
    for output in outputs:
        sample = samples.setdefault((output.request_id, output.index), Sample())
        assert sample.finish_reason is None, f"{output} after the sample's last output"
        sample.token_ids += output.token_ids
        sample.logprobs += output.logprobs
        sample.sampling_logprobs += output.sampling_logprobs
        sample.top_logprobs += output.top_logprobs or []
        sample.finish_reason, sample.error = output.finish_reason, output.error
        assert len(sample.token_ids) == len(sample.logprobs) == len(sample.sampling_logprobs)


def request(tokens, adapter=None, *, spans=(), sampling=GREEDY, max_tokens=6, seed=0, **fields):
    prompt = EncodedPrompt([int(token) for token in tokens], tuple(spans))
    return Request(prompt=prompt, adapter=adapter, sampling=sampling, max_tokens=max_tokens, seed=seed, **fields)


def serve(engine, requests, every=0):
    """Return the samples of each request: all added at once, or one ``every`` so many steps."""
    samples, ids, waiting = {}, [], list(requests)
    for step in range(STEPS):
        while waiting and step >= every * len(ids):
            ids.append(engine.add(waiting.pop(0)))
        collect(samples, engine.step())
        if not waiting and not engine.has_work:
            break
    assert_idle(engine)
    done = [[samples[i, index] for index in range(one.n)] for i, one in zip(ids, requests, strict=True)]
    assert {sample.finish_reason for group in done for sample in group} <= {"stop", "length"}
    return done


def serve_one(engine, one):
    """Return the only sample of a request, and how many of its prompt's tokens the prefix cache had."""
    before = engine.stats.prefix_hit_tokens
    ((sample,),) = serve(engine, [one])
    return sample, engine.stats.prefix_hit_tokens - before


def assert_idle(engine):
    """Nothing is left of any request, nothing was compiled on the way, and no device call failed."""
    assert not engine.has_work
    assert engine.pages.num_used == 0
    assert engine.stats.recompiles == 0
    assert engine.stats.device_failures == 0


def seed_of(one, index):
    return derived_seed(one.seed if one.sampling.seed is None else one.sampling.seed, index)


def alone(model, one, index=0, config=ROOMY):
    """Return one sample of a request as a fresh engine gives it, with nothing beside it and nothing cached."""
    sampling = dataclasses.replace(one.sampling, seed=seed_of(one, index))
    return serve_one(Engine(model, config), dataclasses.replace(one, n=1, sampling=sampling))[0]


@functools.partial(jax.jit, static_argnums=2)
def _noise(seed, positions, vocab):
    return jax.vmap(lambda at: jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), at), (vocab,)))(positions)


def chances(model, one, index, token_ids):
    """Return float64 raw log-probabilities, the sampling distribution's, and what the drawn token is the argmax of.

    Each is ``[len(token_ids), V]``: at every step given the tokens before it.
    """
    prompt, sampling = one.prompt.token_ids, one.sampling
    first, count = len(prompt), len(token_ids)
    mask = reference.adapter_mask(one.adapter, first, count, one.prompt.unedited_spans, prompt)
    logits = reference.forward(model.config, model.params, [*prompt, *token_ids], one.adapter, mask)[first - 1 : -1]
    behind = 0 if one.adapter is None else reference.prefix_length(one.adapter)
    places = behind + np.arange(first, first + LONGEST_SAMPLE)  # of one length: one program
    noise = np.asarray(_noise(np.uint32(seed_of(one, index)), places, logits.shape[1]), np.float64)[:count]
    drawn_from, chosen_by = np.full_like(logits, -np.inf), np.full_like(logits, -np.inf)
    for step, row in enumerate(logits.copy()):
        for token, bias in sampling.logit_bias or ():
            row[token] += bias
        written = token_ids[:step]
        for token in {*prompt, *written}:
            row[token] *= sampling.repetition_penalty ** (-1 if row[token] > 0 else 1)
        for token in written:
            row[token] -= sampling.frequency_penalty
        for token in set(written):
            row[token] -= sampling.presence_penalty
        if sampling.temperature == 0:
            drawn_from[step, row.argmax()] = 0
            chosen_by[step] = row
        else:
            kept = reference.kept_tokens(row, sampling)
            drawn_from[step, kept] = reference.log_softmax(row[kept] / sampling.temperature)
            chosen_by[step, kept] = row[kept] / sampling.temperature + noise[step, kept]
    return reference.log_softmax(logits), drawn_from, chosen_by


def tie(one):
    """``TIE`` at the request's temperature."""
    return TIE / min(one.sampling.temperature or 1.0, 1.0)


def assert_is_reference(model, one, sample, index=0):
    """Compare a sample with the reference: every token its choice, with its log-probabilities.

    Returns the largest difference of a raw log-probability, and at how many steps two tokens nearly tie.
    """
    count, own = len(sample.token_ids), (np.arange(len(sample.token_ids)), sample.token_ids)
    if not count:
        return 0.0, 0
    raw, drawn_from, chosen_by = chances(model, one, index, sample.token_ids)
    np.testing.assert_allclose(sample.logprobs, raw[own], atol=ATOL)
    best = np.sort(chosen_by, axis=1)[:, ::-1]
    assert (best[:, 0] - chosen_by[own] < tie(one)).all(), f"{sample.token_ids} are not what {one} draws"
    close = best[:, 0] - best[:, 1] < tie(one)
    np.testing.assert_allclose(np.array(sample.sampling_logprobs)[~close], drawn_from[own][~close], atol=10 * ATOL)
    if one.logprobs:
        assert len(sample.top_logprobs) == count
        for top, row in zip(sample.top_logprobs, raw, strict=True):
            assert sorted(top.top.values())[-one.logprobs :] == pytest.approx(np.sort(row)[-one.logprobs :], abs=ATOL)
            assert all(row[token] == pytest.approx(value, abs=ATOL) for token, value in top.top.items())
    return float(np.abs(np.array(sample.logprobs) - raw[own]).max()), int(close.sum())


def assert_same(model, one, ours, other, index=0):
    """Compare two runs of a sample, of which ours may have been cut short; returns whether they part.

    They may part only at a step where the reference itself nearly ties.
    """
    for step, (a, b) in enumerate(zip(ours.token_ids, other.token_ids, strict=False)):
        if a != b:
            row = chances(model, one, index, [*ours.token_ids[:step], a])[2][step]
            assert row.max() - min(row[a], row[b]) < tie(one), f"step {step}: {a}, and {b} otherwise"
            return True
        assert ours.logprobs[step] == pytest.approx(other.logprobs[step], abs=ATOL)
        assert ours.sampling_logprobs[step] == pytest.approx(other.sampling_logprobs[step], abs=10 * ATOL)
    if ours.finish_reason == "abort":
        assert len(ours.token_ids) <= len(other.token_ids)
    else:
        assert len(ours.token_ids) == len(other.token_ids)
        assert ours.finish_reason == other.finish_reason
    return False
