"""An engine that draws plainly where it can, as on a GPU, gives what one gives that always draws in full."""

import dataclasses

import numpy as np
import pytest
from engine_runs import TIGHT, alone, serve
from engine_runs import request as make

from preft_jax.sampling.arrays import PlainSampling
from preft_jax.sampling.parameters import SamplingParams
from serve.engine.engine import Engine
from serve.engine.runner import Runner

PLAIN = (SamplingParams(temperature=0.0), SamplingParams(temperature=1.1), SamplingParams(temperature=0.6, seed=5))
OTHERS = (
    SamplingParams(top_p=0.8), SamplingParams(temperature=0.0, repetition_penalty=1.4),
    SamplingParams(temperature=0.0, logit_bias={5: 3.0}),
)  # fmt: skip


@pytest.fixture
def plainly(monkeypatch):
    """Let runners have the programs that they have on a GPU; returns how calls draw and what decodes, in a list."""
    calls, choose, draw, decode = [], Runner._choose_programs, Runner.draw, Runner.decode

    def gpu_programs(self):
        choose(self)
        self.draws_plainly, self.draw_counts = True, [self.config.max_num_seqs]
        self.row_counts, self.adapted_row_counts = self.row_counts[:1], [4, 6]

    def named(self, name, rows, pages=None):
        if (np.asarray(rows.slot_B) < self.config.max_num_seqs).any():
            calls.append(name)
        return decode(self, name, rows, pages)

    def counted(self, picks, sampling, texts=None):
        calls.append("plain" if isinstance(sampling, PlainSampling) else "full")
        return draw(self, picks, sampling, texts)

    monkeypatch.setattr(Runner, "_choose_programs", gpu_programs)
    monkeypatch.setattr(Runner, "draw", counted)
    monkeypatch.setattr(Runner, "decode", named)
    return calls


def close(sample, other):
    assert sample.token_ids == other.token_ids
    np.testing.assert_allclose(sample.logprobs, other.logprobs, atol=1e-4)
    np.testing.assert_allclose(sample.sampling_logprobs, other.sampling_logprobs, atol=1e-4)
    assert sample.finish_reason == other.finish_reason


def some(rng, adapters, samplings):
    kinds = (None, "lora", "direft", "lora_all")
    return [
        make(
            rng.integers(0, 250, 5 + 3 * i), adapters.get(kinds[i % 4]), sampling=samplings[i % len(samplings)],
            max_tokens=5 + i, n=1 + (i == 2), seed=i,
        )
        for i in range(9)
    ]  # fmt: skip


@pytest.fixture(params=[PLAIN, PLAIN + OTHERS], ids=["plain", "mixed"])
def asked(request, lively, adapters, rng):
    """Return requests, what each is alone where all is drawn in full, and how they may be drawn."""
    requests = some(rng, adapters, request.param)
    # Plain rows alone, more than the plain program takes.
    requests += [make(rng.integers(0, 250, 6 + i), max_tokens=20, seed=i) for i in range(5)]
    wanted = [[alone(lively, one, index) for index in range(one.n)] for one in requests]
    return requests, wanted, {"plain"} if request.param is PLAIN else {"plain", "full"}


def test_requests_are_served_as_alone_and_in_full(asked, plainly, lively):
    requests, wanted, ways = asked
    found = serve(Engine(lively, dataclasses.replace(TIGHT, prefill_seqs=3)), requests)
    for group, others in zip(found, wanted, strict=True):
        for sample, other in zip(group, others, strict=True):
            close(sample, other)
    assert set(plainly) == ways | {"decode-2", "decode-adapted-4", "decode-adapted-6"}
