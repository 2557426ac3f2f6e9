"""Serving over several devices: on eight of a CPU, in a process of their own, and on GPUs where there are two."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from engine_runs import TIGHT, request, serve
from shared_programs import forget_shared

from preft_jax import SamplingParams
from preft_jax.loading import spread_model
from serve.engine.engine import Engine


def test_eight_devices_of_a_cpu():
    """Run ``several_devices.py``."""
    path = Path(__file__).with_name("several_devices.py")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("mixed", [0, 64])
def test_two_gpus_serve_what_one_serves(lively, adapters, rng, mixed):
    """Every kernel on each device's own heads and channels, adapters of every kind, rank pages from pinned memory."""
    if jax.default_backend() != "gpu" or jax.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    config = dataclasses.replace(
        TIGHT, max_num_seqs=8, num_kv_pages=60, bank_pages=8, prefill_tokens=64, mixed_tokens=mixed, all_token=not mixed
    )
    kinds = (None, "lora", "direft", "loreft_f3l2", "lora_r24", None, "loreft", "lora_pattern")
    requests = [
        request(
            rng.integers(0, 250, 5 + 5 * i).tolist(), adapters.get(kind), seed=i, max_tokens=4 + i,
            sampling=SamplingParams(temperature=0.7 * (i % 2), ignore_eos=True),
        )
        for i, kind in enumerate(kinds if mixed else (*kinds, "lora_all", "loreft_all"))
    ]  # fmt: skip
    alone = serve(Engine(lively, config), requests, every=2)
    forget_shared()
    engine = Engine(spread_model(lively, "tp=2"), config)
    engine.warm_up()
    for group, others in zip(serve(engine, requests, every=2), alone, strict=True):
        for sample, other in zip(group, others, strict=True):
            assert sample.token_ids == other.token_ids
            np.testing.assert_allclose(sample.logprobs, other.logprobs, atol=1e-3)
    assert engine.stats.recompiles == 0
