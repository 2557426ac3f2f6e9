"""Outputs of an engine put together, and requests whose tokens are letters."""

import dataclasses
from typing import Any

import numpy as np
from engine_runs import STEPS, TIGHT, request

from preft_jax import SamplingParams
from preft_jax.sampling.parameters import derived_seed
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine

SCORING: EngineConfig = dataclasses.replace(TIGHT, scoring=True, prefix_caching=False)
"""``TIGHT`` with everything on that adds a program, and the prefix cache off."""

LETTERS = frozenset(range(97, 105))
"""Few, so that texts repeat parts of themselves."""


def some(rng, length):
    """Return random token ids, none of them special."""
    return rng.integers(0, 250, length).tolist()


def lettered(seed=0, letters=LETTERS, **fields):
    """Return sampling parameters that draw nothing but ``letters``: each token is a character of the text."""
    return SamplingParams(logit_bias={t: -100 for t in range(256) if t not in letters}, seed=seed, **fields)


@dataclasses.dataclass
class Whole:
    """All outputs of one sample."""

    outputs: list = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[float] = dataclasses.field(default_factory=list)
    tops: list = dataclasses.field(default_factory=list)
    prompt_logprobs: list | None = None
    finish_reason: str | None = None
    stop_reason: Any = None
    error: str | None = None

    def add(self, output):
        """Take the next output."""
        assert self.finish_reason is None, f"{output} after the last one"
        assert len(output.token_ids) == len(output.logprobs) == len(output.sampling_logprobs)
        self.outputs.append(output)
        self.token_ids += output.token_ids
        self.text += output.text
        self.logprobs += output.logprobs
        self.tops += output.top_logprobs or []
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        self.finish_reason, self.stop_reason, self.error = output.finish_reason, output.stop_reason, output.error


def advance(engine, wholes, steps=1):
    """Take so many steps; ``wholes`` is a dict by request id and index."""
    for _ in range(steps):
        for output in engine.step():
            wholes.setdefault((output.request_id, output.index), Whole()).add(output)
    return wholes


def drain(engine, wholes=None):
    """Step until nothing is left to do; returns the samples by request id and index."""
    wholes = {} if wholes is None else wholes
    for _ in range(STEPS):
        if not engine.has_work:
            break
        advance(engine, wholes)
    assert_released(engine)
    assert all(whole.finish_reason is not None for whole in wholes.values())
    return wholes


def assert_released(engine):
    """No request is left, nor anything that one held."""
    assert not engine.has_work
    assert engine.pages.num_used == 0
    assert not engine.adapters.pinned, "an adapter is pinned"
    assert engine.scheduler.num_running == engine.scheduler.num_waiting == 0


def run_all(engine, requests):
    """Add requests at once; returns the samples of each."""
    ids = [engine.add(one) for one in requests]
    wholes = drain(engine)
    return [[wholes[i, index] for index in range(one.n)] for i, one in zip(ids, requests, strict=True)]


def run_one(engine, one):
    """Return the only sample of a request."""
    return run_all(engine, [one])[0][0]


def by_itself(one, index):
    """Return the request of one sample of a request."""
    seed = derived_seed(one.seed if one.sampling.seed is None else one.sampling.seed, index)
    sampling = dataclasses.replace(one.sampling, seed=seed)
    return dataclasses.replace(one, n=1, sampling=sampling, deadline=None, priority=0)


_solo: dict = {}


def alone(model, one, index=0, config=TIGHT):
    """Return one sample of a request as a fresh engine gives it."""
    key = one, index
    if key not in _solo:
        _solo[key] = run_one(Engine(model, config), by_itself(one, index))
    return _solo[key]


def assert_as_alone(model, one, samples):
    """Every sample of a request has the tokens and log-probabilities that it has alone."""
    for index, whole in enumerate(samples):
        other = alone(model, one, index)
        assert whole.token_ids == other.token_ids
        assert (whole.finish_reason, whole.error) == (other.finish_reason, None)
        np.testing.assert_allclose(whole.logprobs, other.logprobs, atol=1e-4)


__all__ = ["LETTERS", "SCORING", "TIGHT", "Whole", "advance", "alone", "assert_as_alone", "assert_released",
           "by_itself", "drain", "lettered", "request", "run_all", "run_one", "some"]  # fmt: skip
