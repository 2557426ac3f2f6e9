"""An engine that draws plainly where it can, as on a GPU, gives what one gives that always draws in full."""

import dataclasses
from collections.abc import Mapping

import jax
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


class Counted(Mapping):
    """Programs that note how many NumPy arrays each call is given: as many copies from the host."""

    def __init__(self, programs, calls):
        self.programs, self.calls = programs, calls

    def __getitem__(self, name):
        def call(*args):
            self.calls.append((name.rstrip("-0123456789"), host_arrays(args)))
            return self.programs[name](*args)

        return call

    def __iter__(self):
        return iter(self.programs)

    def __len__(self):
        return len(self.programs)


def host_arrays(tree):
    return sum(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(tree))


def test_a_call_takes_few_arrays_from_the_host(plainly, lively, adapters, rng, monkeypatch):
    """Each is a copy and something to wait for in a GPU's queue, which has room for about a thousand entries."""
    engine = Engine(lively, dataclasses.replace(TIGHT, prefill_seqs=3))
    calls, put = [], jax.device_put

    def counted(tree, *args, **options):
        # On a GPU an adapter that comes with a request is put into pinned memory first, which no call waits for.
        pinned = any(getattr(where, "memory_kind", None) == "pinned_host" for where in jax.tree.leaves(args))
        if host_arrays(tree) and not pinned:
            calls.append(("put", host_arrays(tree)))
        return put(tree, *args, **options)

    engine.runner.programs = Counted(engine.runner.programs, calls)
    monkeypatch.setattr(jax, "device_put", counted)
    first, second = (make(rng.integers(0, 250, 9), adapters["lora"], max_tokens=3) for _ in range(2))
    serve(engine, [first])
    writes = [count for name, count in calls if name.startswith("write")]
    assert writes
    assert set(writes) == {1}
    calls.clear()
    serve(engine, [second])  # Its adapter is there.
    # Rows and picks are sent once, for both steps.
    decode = [("put", 4), *[("decode", 0), ("draw-plain", 0)] * 2]
    assert calls == [("put", 1), ("prefill", 0), ("put", 3), ("draw-plain", 2), *decode], calls
