"""Memory of an engine: weights, KV cache and bank have dtypes of their own, and what it takes is leased.

bfloat16 has 8 bits: 0.15 of log-probabilities within ±10.
"""

import contextlib
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from engine_runs import ROOMY, request, serve

from kernels.xla.fused import write_kv
from preft_jax.adapters.own import adapter_in_fp8
from preft_jax.device.memory import Budget
from preft_jax.errors import ConfigError
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.store.files import AdapterFiles
from serve.store.host import AdapterStore
from serve.store.names import Registry

PLAIN = dataclasses.replace(ROOMY, all_token=False)


def first_logprobs(engine, requests):
    return np.array([sample.logprobs[0] for (sample,) in serve(engine, requests)])


@pytest.mark.parametrize("field", ["kv_dtype", "bank_dtype"])
def test_one_of_them_narrower_loses_its_own_rounding_only(field, lively, adapters, rng):
    requests = [
        request(rng.integers(0, 250, 12), adapters[name], max_tokens=2)
        for name in ("lora_r24", "direft", "loreft_f3l2")
    ]
    engine = Engine(lively, dataclasses.replace(PLAIN, **{field: "bfloat16"}))
    dtypes = {
        "kv_dtype": engine.runner.cache.kv[0].dtype,
        "bank_dtype": engine.runner.bank.sites["q"].a_LPDR.dtype,
        "weights": engine.runner.params["embed"].dtype,
    }
    assert {name for name, dtype in dtypes.items() if dtype == jnp.bfloat16} == {field}
    loss = np.abs(first_logprobs(engine, requests) - first_logprobs(Engine(lively, PLAIN), requests))
    assert 1e-5 < loss.max() < 0.15


def test_keys_and_values_in_fp8(lively, adapters, rng):
    """Chunks, decode steps and hits of the prefix cache read what a whole prompt reads."""
    prompt = rng.integers(0, 250, 40)
    requests = [request(prompt, adapters[name], max_tokens=6) for name in ("lora_r24", "direft")]
    config = dataclasses.replace(PLAIN, kv_dtype="fp8")
    engine = Engine(lively, config)
    assert {leaf.dtype for leaf in engine.runner.cache.kv} == {jnp.dtype("float8_e4m3fn")}
    first, again = (serve(engine, requests) for _ in range(2))
    assert engine.stats.prefix_hit_tokens > 0
    whole = serve(Engine(lively, dataclasses.replace(config, prefix_caching=False, chunk_tokens=16)), requests)
    for ours in (again, whole):
        for (sample,), (other,) in zip(ours, first, strict=True):
            assert sample.token_ids == other.token_ids
            np.testing.assert_allclose(sample.logprobs, other.logprobs, atol=1e-4)
    loss = np.abs(first_logprobs(engine, requests) - first_logprobs(Engine(lively, PLAIN), requests))
    assert 1e-4 < loss.max() < 0.5


def test_rank_pages_in_fp8_are_served_as_the_edits_that_they_stand_for(lively, adapters, rng, tmp_path):
    """To the last bit, from memory and from a store that keeps them on disk, in a quarter of the bytes of float32."""
    kinds, prompts = ("lora_r24", "direft", "loreft"), rng.integers(0, 250, (3, 12))
    plain = Engine(lively, PLAIN)
    expected = serve(
        plain, [request(p, adapter_in_fp8(adapters[k], lively.config)) for p, k in zip(prompts, kinds, strict=True)]
    )
    requests = [request(p, adapters[k]) for p, k in zip(prompts, kinds, strict=True)]
    files = AdapterFiles(lively, tmp_path, dtype="fp8")
    with contextlib.closing(AdapterStore(files, Registry(), host_bytes=1 << 24)) as store:
        engine = Engine(lively, dataclasses.replace(PLAIN, adapter_dtype="fp8"), store=store)
        assert engine.runner.bank.sites["q"].a_LPDR.dtype == np.float32
        engine.warm_up()
        assert serve(engine, requests) == expected
        named = [store.publish(kind, adapters[kind]) for kind in kinds]
        loaded = [files.load("", one.digest) for one in named]
        assert [one.digest for one in named] == [adapters[kind].digest for kind in kinds]
        engine = Engine(lively, engine.config, store=store)
        assert (
            serve(engine, [dataclasses.replace(o, adapter=n) for o, n in zip(requests, named, strict=True)]) == expected
        )
    usual = [AdapterFiles(lively).take(adapters[kind]).known.num_bytes for kind in kinds]
    assert all(one.num_bytes < 0.3 * size for one, size in zip(loaded, usual, strict=True))
    loss = np.abs(first_logprobs(plain, requests) - [sample.logprobs[0] for (sample,) in expected])
    assert 1e-4 < loss.max() < 0.5


def test_what_fp8_cannot_hold_is_its_largest():
    keys = jnp.asarray([[[1e4, -500.0, jnp.nan, 1.0]]])
    pool = write_kv(jnp.zeros((1, 2, 2, 4), "float8_e4m3fn"), jnp.asarray([1]), keys, -keys)
    np.testing.assert_array_equal(np.asarray(pool, np.float32)[0, 1], [[448, -448, np.nan, 1], [-448, 448, np.nan, -1]])


@pytest.mark.parametrize(
    ("field", "allowed"),
    [
        ("kv_dtype", "float32, bfloat16, float16, fp8"),
        ("bank_dtype", "float32, bfloat16, float16"),
        ("adapter_dtype", "fp8"),
    ],
)
def test_another_dtype_is_refused_with_those_there_are(field, allowed):
    with pytest.raises(ConfigError, match=f"{field} is 'int4'; allowed: {allowed}, or None"):
        EngineConfig(**{field: "int4"})


def test_adapters_of_a_store_have_the_dtype_that_it_is_told(lively, adapters):
    (usual,), (narrow,) = (
        {slab.dtype for slabs in files.take(adapters["direft"]).known.slabs.values() for slab in slabs}
        for files in (AdapterFiles(lively), AdapterFiles(lively, dtype="bfloat16"))
    )
    assert (usual, narrow) == (np.float32, jnp.bfloat16)


def test_an_engine_leases_what_it_takes_and_leaves_what_is_reserved(tiny, monkeypatch):
    """As on an accelerator: on a CPU memory is not counted."""
    budget, reserved = Budget(2 * 10**8), 10**8
    monkeypatch.setattr(Budget, "of", lambda devices, utilization: budget)
    config = EngineConfig(max_num_seqs=4, max_model_len=64, prefill_tokens=64, bank_pages=4, reserved_bytes=reserved)
    engine = Engine(tiny, config)
    assert engine.memory is budget
    shares = budget.shares()
    assert shares.keys() == {"calls", "adapters on their way", "KV cache"}
    assert shares["KV cache"] == sum(pool.nbytes for pool in engine.runner.cache.kv)
    assert budget.free >= reserved
    budget.lease("training", reserved)
    monkeypatch.setattr(Budget, "of", lambda devices, utilization: Budget(2 * 10**8))
    with pytest.raises(ConfigError, match="reserved_bytes"):
        Engine(tiny, dataclasses.replace(config, reserved_bytes=2 * 10**8))
