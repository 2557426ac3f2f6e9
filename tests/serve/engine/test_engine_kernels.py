"""The engine on a GPU, with every kernel: what it serves is what plain JAX serves there."""

import dataclasses

import jax
import numpy as np
import pytest
from engine_runs import TIGHT, request, serve
from shared_programs import forget_shared

from kernels import dispatch
from preft_jax import SamplingParams
from preft_jax.device import programs
from serve.engine.engine import Engine

pytestmark = pytest.mark.gpu

ROOMY = dataclasses.replace(TIGHT, max_num_seqs=8, num_kv_pages=60, bank_pages=17)


@pytest.fixture
def ran(monkeypatch):
    """Return what runs of each operation, ``(operation, implementation)``, and what an implementation refused."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    found, refused, real = set(), [], dispatch.load

    def load(name, op):
        function = real(name, op)

        def run(*args, **options):
            try:
                result = function(*args, **options)
            except NotImplementedError as error:
                refused.append((op, str(error)))
                raise
            found.add((op, name))
            return result

        return run

    monkeypatch.setattr(dispatch, "load", load)
    monkeypatch.setattr(programs, "_shared", {})
    jax.clear_caches()  # What was traced before would not be traced again.
    return found, refused


def asked(rng, adapters):
    kinds = (None, "lora", "direft", "loreft_f3l2", "lora_all", "lora_r24", None, "loreft", "lora_pattern")
    return [
        request(
            rng.integers(0, 250, 5 + 5 * i).tolist(), adapters.get(kind), seed=i, n=1 + (i == 3), max_tokens=4 + i,
            sampling=SamplingParams(temperature=0.7 * (i % 2), ignore_eos=True),
        )
        for i, kind in enumerate((*kinds, "loreft_all"))
    ]  # fmt: skip


def test_every_operation_of_the_engine_is_a_kernel_and_gives_what_plain_jax_gives(ran, lively, adapters, rng):
    found, refused = ran
    requests = asked(rng, adapters)
    ours = serve(Engine(lively, ROOMY), requests)
    assert not refused
    operations = {
        "norm_shrink", "rope_kv", "silu_mul_shrink", "decode_edit", "paged_attention", "decode_attention", "draw",
        "write_pages",
    }  # fmt: skip
    assert operations <= {op for op, _ in found}
    assert {name for _, name in found} == {"triton"}
    found.clear()
    forget_shared()
    with dispatch.preferring("xla"):
        plain = serve(Engine(lively, ROOMY), requests)
    assert {name for _, name in found} == {"xla"}
    for group, others in zip(ours, plain, strict=True):
        for sample, other in zip(group, others, strict=True):
            assert sample.token_ids == other.token_ids
            np.testing.assert_allclose(sample.logprobs, other.logprobs, atol=1e-3)
