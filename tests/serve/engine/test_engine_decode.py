"""Contract 4: decoding has no adapter, whatever the bank holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_runs import ROOMY, STEPS, VISIBLE, assert_idle, collect, request, serve

from serve.engine.engine import Engine

KINDS = (None, "lora", "lora_r24", "direft", "loreft", "loreft_f3l2")
"""As many as run together."""


def poisoned(bank, value):
    """Return a bank of NaN, or of random numbers where ``value`` is None."""
    rng = np.random.default_rng(3)

    def bad(leaf):
        return jnp.asarray(
            rng.standard_normal(leaf.shape) if value is None else np.full(leaf.shape, value), leaf.dtype
        )  # fmt: skip

    return jax.tree.map(bad, bank)


def serve_poisoned(model, requests, value):
    """Return the only sample of each request; the bank is destroyed once all have their first token."""
    engine, samples = Engine(model, ROOMY), {}
    ids = [engine.add(one) for one in requests]
    destroyed = False
    for _ in range(STEPS):
        if not engine.has_work:
            break
        collect(samples, engine.step())
        if not destroyed and all((i, 0) in samples for i in ids):
            assert all(samples[i, 0].finish_reason is None for i in ids)
            engine.runner.bank = poisoned(engine.runner.bank, value)
            destroyed = True
    assert destroyed
    assert_idle(engine)
    return [samples[i, 0] for i in ids]


@pytest.mark.parametrize("value", [np.nan, None], ids=["nan", "random"])
def test_a_bank_destroyed_after_prefill_changes_nothing(value, lively, adapters, rng):
    requests = [request(rng.integers(0, 250, 5 + i), adapters.get(name), max_tokens=20) for i, name in enumerate(KINDS)]
    clean = [sample for (sample,) in serve(Engine(lively, ROOMY), requests)]
    bad = serve_poisoned(lively, requests, value)
    assert [sample.token_ids for sample in bad] == [sample.token_ids for sample in clean]
    assert [sample.logprobs for sample in bad] == [sample.logprobs for sample in clean]


def test_a_bank_destroyed_after_prefill_breaks_all_token_adapters(lively, adapters, rng):
    """The twin of the test above: the poison does reach a decode that reads the bank."""
    one = request(rng.integers(0, 250, 9), adapters["lora_all"], max_tokens=20)
    (((clean,),), (bad,)) = serve(Engine(lively, ROOMY), [one]), serve_poisoned(lively, [one], None)
    assert clean.logprobs[0] == bad.logprobs[0]
    assert np.abs(np.subtract(clean.logprobs, bad.logprobs))[1:].max() > VISIBLE


def test_decode_is_one_program_for_a_bank_of_1_and_of_512_adapters(lively):
    """Its lowered text is the same; that of decode for all-token adapters is not."""
    small, large = (
        Engine(lively, dataclasses.replace(ROOMY, max_rank=16, bank_pages=pages)).runner.programs for pages in (2, 513)
    )
    names = [name for name in small if name.startswith("decode-")]
    assert names == [name for name in large if name.startswith("decode-")]
    assert {name.startswith("decode-adapted") for name in names} == {False, True}
    for name in names:
        texts = {programs.trace(name).lower().as_text() for programs in (small, large)}
        assert len(texts) == (2 if name.startswith("decode-adapted") else 1), name


class Asked(dict):
    """Programs by name, and the names that were asked for."""

    def __init__(self, programs):
        super().__init__(dict.fromkeys(programs))
        self.programs, self.names = programs, set()

    def __getitem__(self, name):
        self.names.add(name)
        return self.programs[name]


@pytest.mark.usefixtures("rows_apart")
def test_a_batch_without_all_token_adapters_never_calls_a_program_that_reads_the_bank(lively, adapters, rng):
    def asked(names):
        engine = Engine(lively, ROOMY)
        engine.runner.programs = Asked(engine.runner.programs)
        serve(engine, [request(rng.integers(0, 250, 9), adapters.get(name)) for name in names])
        return {name for name in engine.runner.programs.names if name.startswith("decode")}

    assert asked(KINDS)
    assert not any("adapted" in name for name in asked(KINDS))
    assert any("adapted" in name for name in asked((*KINDS[:4], "lora_all")))
