"""Adapters of an engine: on the host, in the bank, beside each other; and the programs that they need."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
from engine_outputs import (
    SCORING,
    TIGHT,
    advance,
    alone,
    assert_as_alone,
    drain,
    lettered,
    request,
    run_all,
    run_one,
    some,
)
from engine_runs import ROOMY

from preft_jax import AdapterConfig, SamplingParams, random_adapter
from preft_jax.device import programs
from preft_jax.errors import AdapterError, ConfigError, RequestError
from preft_jax.models.cache import init_cache
from preft_jax.shapes import LINEAR_SITES
from serve.engine import runner
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.observer import Observer


@pytest.fixture(scope="module")
def many(lively):
    """Return adapters of one rank page each, more than the bank holds."""
    config = AdapterConfig(rank=8, alpha=12.0)
    return [random_adapter(config, lively.config, jax.random.key(i), strength=0.7) for i in range(9)]


def test_an_adapter_is_loaded_once_while_it_stays_and_again_when_it_had_to_go(lively, many, rng):
    engine = Engine(lively, TIGHT)
    room = TIGHT.bank_pages - 1

    def loads(*which):
        before = engine.stats.adapter_loads
        for one in which:
            run_one(engine, request(some(rng, 9), many[one]))
        return engine.stats.adapter_loads - before

    assert loads(*range(room)) == room
    assert loads(0, room - 1) == 0
    assert loads(room) == 1
    assert loads(0, room - 1, room) == 0, "the least recently used one went"
    assert loads(1) == 1


def test_more_adapters_than_the_bank_holds(lively, many, adapters, rng):
    requests = [request(some(rng, 20), adapter, max_tokens=5) for adapter in [*many, adapters["lora_r24"], None] * 2]
    engine = Engine(lively, TIGHT)
    for one, samples in zip(requests, run_all(engine, requests), strict=True):
        assert_as_alone(lively, one, samples)
    assert engine.stats.adapter_loads >= 10
    assert engine.stats.recompiles == 0


@pytest.mark.parametrize("sites", [LINEAR_SITES, ("v", "q")])
def test_an_engine_for_some_sites_serves_their_adapters_and_refuses_others(sites, lively, rng):
    all_token = len(sites) == 2  # In one of both: it takes a program of its own.
    engine = Engine(lively, dataclasses.replace(TIGHT, bank_sites=sites, all_token=all_token))
    assert set(engine.runner.bank.sites) == set(sites)
    kinds = [
        AdapterConfig(rank=8, targets=sites, positions=positions) for positions in ("prompt", "all")[: 1 + all_token]
    ]
    own = [random_adapter(kind, lively.config, jax.random.key(i), strength=0.7) for i, kind in enumerate(kinds)]
    requests = [request(some(rng, 9), adapter, max_tokens=5) for adapter in (*own, None)]
    for one, samples in zip(requests, run_all(engine, requests), strict=True):
        assert_as_alone(lively, one, samples)
    other = random_adapter(AdapterConfig(kind="loreft", rank=4), lively.config, jax.random.key(2))
    served = "q, v;" if len(sites) == 2 else "q, k, v, o, gate, up, down;"
    with pytest.raises(AdapterError, match=f"edits block and the engine serves edits of {served} name them in bank_si"):
        engine.load_adapters([other])
    assert run_one(engine, requests[0])


@pytest.mark.parametrize("sites", ["q", (), ("q", "head"), 5, iter(["q"]), ["q", ["v"]]])
def test_sites_that_are_not_there_are_refused(sites):
    with pytest.raises(
        ConfigError, match=r"bank_sites is .*; give a tuple of some of q, k, v, o, gate, up, down, block"
    ):
        EngineConfig(bank_sites=sites)


def test_the_hosts_copy_is_dropped_with_its_last_request(lively, many, rng):
    engine = Engine(lively, TIGHT)
    first = engine.add(request(some(rng, 9), many[0], max_tokens=12, n=2))
    engine.add(request(some(rng, 9), many[0], max_tokens=3))
    engine.add(request(some(rng, 9), many[1], max_tokens=3))
    assert engine.adapters.on_host == {many[0].digest, many[1].digest}
    for _ in range(60):
        outputs = engine.step()
        if any(output.request_id == 2 and output.finish_reason for output in outputs):
            break
    assert engine.adapters.on_host == {many[0].digest}
    engine.cancel(first)
    drain(engine)
    assert engine.adapters.on_host == set()


def test_adapters_that_were_loaded_by_the_user_stay_on_the_host(lively, many, rng):
    engine = Engine(lively, TIGHT)
    engine.load_adapters(many[:2])
    run_one(engine, request(some(rng, 9), many[0]))
    assert engine.adapters.on_host == {many[0].digest, many[1].digest}


def test_a_preempted_request_keeps_its_adapter_on_the_host(lively, many, rng):
    requests = [request(some(rng, 20), adapter, max_tokens=40) for adapter in many[:6]]
    engine = Engine(lively, TIGHT)
    samples = run_all(engine, requests)
    assert engine.stats.preemptions > 0
    for one, group in zip(requests, samples, strict=True):
        assert_as_alone(lively, one, group)


@pytest.mark.parametrize("positions", ["prompt", "all"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_that_is_not_finite_is_refused_and_spoils_nothing(positions, value, lively, adapters, rng):
    """It never reaches the bank, where it would share tiles with others; those beside and after it are served."""
    config = AdapterConfig(rank=8, positions=positions)
    bad = random_adapter(config, lively.config, jax.random.key(9))
    bad.params["layers"][1]["down"]["lora_b"][3, 2] = value
    engine = Engine(lively, TIGHT)
    beside = request(some(rng, 7), adapters["lora"])
    number = engine.add(beside)
    with pytest.raises(AdapterError, match=r"'down'.*NaN or infinite"):
        engine.add(request(some(rng, 7), bad))
    assert engine.adapters.on_host == {adapters["lora"].digest}
    assert_as_alone(lively, beside, [drain(engine)[number, 0]])
    for adapter in (None, adapters["lora_all"]):
        after = request(some(rng, 7), adapter)
        assert_as_alone(lively, after, [run_one(engine, after)])


class Rows(Observer):
    """Notes how many rows each call of an operation has."""

    def __init__(self):
        self.of = collections.defaultdict(list)

    def calling(self, operation, sequences):
        self.of[operation].append(len(sequences))


@pytest.mark.parametrize("merged", [False, True])
def test_all_token_and_plain_rows_in_one_call_and_in_two(merged, lively, adapters, rng):
    kinds = (None, "lora_all", "lora", "loreft_all")  # Of two plain rows a GPU has a program of their own.
    requests = [
        request(some(rng, 7 + i), adapters.get(kind), sampling=SamplingParams(seed=i), max_tokens=12)
        for i, kind in enumerate(kinds)
    ]
    rows = Rows()
    engine = Engine(lively, TIGHT, observer=rows)
    engine.warm_up()
    for name in engine.runner.programs:
        engine.runner.step_seconds[name] = 1.0 if merged else float("adapted" in name)
    for one, samples in zip(requests, run_all(engine, requests), strict=True):
        assert_as_alone(lively, one, samples)
    assert max(rows.of["decode_adapted"]) == (4 if merged else 2)
    assert max(rows.of["decode"], default=0) == (0 if merged else 2)


def test_at_most_ten_programs_and_each_has_a_name_and_its_seconds(lively):
    engine = Engine(lively, SCORING)
    engine.warm_up()
    assert sorted(engine.runner.programs) == [
        "copy-pages", "decode-2", "decode-6", "decode-adapted-6", "draw-6", "prefill-16", "prefill-32", "score",
        "write-pages", "write-whole-pages",
    ]  # fmt: skip
    seconds = engine.runner.programs.seconds
    assert seconds.keys() == engine.runner.programs.keys()
    assert sum(seconds.values()) > 0


def test_an_engine_that_was_not_warmed_up_compiles_what_it_calls(lively, many, rng, monkeypatch):
    monkeypatch.setattr(programs, "_shared", {})
    engine = Engine(lively, TIGHT)
    assert not engine.runner.programs.seconds
    run_one(engine, request(some(rng, 9), many[0], max_tokens=3))
    compiled = set(engine.runner.programs.seconds)
    assert "decode-6" not in compiled
    assert {"decode-2", "prefill-16"} <= compiled < set(engine.runner.programs)
    assert engine.stats.recompiles == 0
    before = set(engine.runner.programs.missing)
    engine.warm_up()
    assert before
    assert not engine.runner.programs.missing
    assert engine.runner.step_seconds.keys() == {name for name in engine.runner.programs if name.startswith("decode")}
    run_one(engine, request(some(rng, 9), many[0], max_tokens=3))
    assert engine.stats.recompiles == 0


def test_an_engine_with_requests_is_not_warmed_up(lively, rng):
    engine = Engine(lively, TIGHT)
    engine.add(request(some(rng, 9)))
    with pytest.raises(RequestError, match="1 requests are unfinished"):
        engine.warm_up()


@pytest.mark.parametrize(("bank_pages", "max_tokens"), [(3, 1), (5, 12)])
def test_in_a_stream_of_prompts_only_the_first_call_waits_for_its_adapters(max_tokens, bank_pages, lively, many, rng):
    """Each call brings two adapters and the bank holds two or four: those of the next call are copied beside it."""
    config = dataclasses.replace(ROOMY, all_token=False, prefill_seqs=2, bank_pages=bank_pages, prefix_caching=False)
    engine = Engine(lively, config)
    requests = [request(some(rng, 20), many[i % len(many)], max_tokens=max_tokens) for i in range(40)]
    run_all(engine, requests)
    assert engine.stats.adapter_loads > 30
    assert engine.stats.adapter_waits == 2


@pytest.mark.parametrize("scoring", [False, True])
@pytest.mark.parametrize("all_token", [False, True])
def test_larger_engines_have_at_most_ten_programs_too(scoring, all_token, lively):
    config = dataclasses.replace(TIGHT, max_num_seqs=16, prefill_tokens=512, scoring=scoring, all_token=all_token)
    names = list(Engine(lively, config).runner.programs)
    assert 8 < len(set(names)) == len(names) <= 10


@pytest.mark.parametrize("config", [TIGHT, SCORING])
def test_nothing_is_compiled_after_warm_up(config, lively, adapters, many, rng):
    engine = Engine(lively, config)
    engine.warm_up()
    requests = []
    for i, adapter in enumerate([None, *adapters.values(), *many, None, None]):
        sampling = (
            SamplingParams(temperature=0.0), SamplingParams(top_p=0.5, top_k=9, seed=2), lettered(i),
            SamplingParams(repetition_penalty=1.3, presence_penalty=0.5),
            SamplingParams(stop_token_ids=tuple(range(40))),
        )[i % 5]  # fmt: skip
        scores = 3 if config.scoring and i % 4 == 0 else None
        requests.append(
            request(
                some(rng, 1 + 2 * i), adapter, sampling=sampling, max_tokens=1 + i % 9, n=1 + i % 3, priority=i % 2,
                logprobs=(None, 0, 5)[i % 3], prompt_logprobs=scores, stop=("ab",) * (i % 2),
            )
        )  # fmt: skip
    samples = run_all(engine, requests)
    assert all(whole.error is None for group in samples for whole in group)
    assert engine.stats.recompiles == 0


def test_nothing_is_compiled_after_warm_up_where_programs_are_shared(lively, many, rng):
    """Whatever else JAX has forgotten of what the engine before compiled."""
    run_one(Engine(lively, TIGHT), request(some(rng, 9), many[0]))
    engine = Engine(lively, TIGHT)
    jax.clear_caches()
    run_one(engine, request(some(rng, 9), many[0]))
    assert engine.stats.recompiles == 0


def test_an_adapter_whose_request_is_cancelled_before_it_came_to_the_device_is_no_failure(lively, many, rng):
    """It has a place in the bank already, and is on the host no more."""
    engine = Engine(lively, dataclasses.replace(TIGHT, decode_steps=2))
    running = [engine.add(request(some(rng, 4), max_tokens=40)) for _ in range(TIGHT.max_num_seqs)]
    wholes = advance(engine, {}, 8)
    late = engine.add(request(some(rng, 4), many[0]))
    advance(engine, wholes, 4)
    assert engine.adapters.entry(many[0].digest).place is not None
    engine.cancel(late)
    advance(engine, wholes)
    assert not engine.adapters.knows(many[0].digest)
    other = request(some(rng, 4), many[1])
    asked = engine.add(other)
    drain(engine, wholes)
    assert engine.stats.device_failures == 0
    assert [wholes[number, 0].finish_reason for number in running] == ["length"] * len(running)
    assert_as_alone(lively, other, [wholes[asked, 0]])
    again = request(some(rng, 4), many[0])
    assert run_one(engine, again).token_ids == alone(lively, again).token_ids


def test_programs_that_only_read_weights_are_not_worth_filling(lively, monkeypatch):
    sizes = Engine(lively, dataclasses.replace(TIGHT, prefill_tokens=32)).runner
    monkeypatch.setattr(runner, "READS_WEIGHTS", 20)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    sizes._choose_programs()
    assert sizes.filled_counts == sizes.token_counts
    assert len(sizes.token_counts) > 1
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    sizes._choose_programs()
    assert sizes.filled_counts == sizes.token_counts[-1:] == [32]


def test_a_cache_that_memory_has_no_room_for_in_one_piece_gets_fewer_pages(lively, monkeypatch, rng):
    most, asked = 25, []

    def cramped(config, pages, *rest):
        asked.append(pages)
        if pages > most:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.69GiB")
        return init_cache(config, pages, *rest)

    monkeypatch.setattr(runner, "init_cache", cramped)
    config = dataclasses.replace(TIGHT, num_kv_pages=None)
    engine = Engine(lively, config)
    assert engine.runner.num_kv_pages <= most < asked[-2]
    assert asked == sorted(set(asked), reverse=True)
    one = request(some(rng, 9))
    assert run_one(engine, one).token_ids == alone(lively, one).token_ids
    most -= 8
    with pytest.raises(ConfigError, match=f"the {engine.runner.num_kv_pages} KV pages that fitted at first have no"):
        engine.runner.reset()
    with pytest.raises(ConfigError, match=f"memory has no room for {most + 1} KV pages beside the weights and"):
        Engine(lively, dataclasses.replace(config, num_kv_pages=most + 1))
    most = 1
    with pytest.raises(ConfigError, match=r"memory has no room for \d KV pages beside"):
        Engine(lively, config)


def test_compilers_have_the_memory_that_calls_work_on(lively, monkeypatch):
    """XLA tries matrix products out while it compiles; cache, bank and logits are there again when it is done."""
    monkeypatch.setattr(programs, "_shared", {})
    engine = Engine(lively, TIGHT)

    def held():
        return jax.tree.leaves((engine.runner.cache, engine.runner.bank, engine.runner._logits))

    compiling = []
    monkeypatch.setattr(
        programs.Programs, "compile_missing", lambda self: compiling.extend(x.is_deleted() for x in held())
    )
    monkeypatch.setattr(runner.Runner, "_time_decode", lambda self: None)
    engine.runner.warm_up()
    assert compiling
    assert all(compiling)
    assert not any(x.is_deleted() for x in held())


def test_requests_of_one_adapter_under_two_objects_share_it(lively, many, rng):
    twin = dataclasses.replace(many[0])
    prompt = some(rng, 20)
    engine = Engine(lively, TIGHT)
    one, two = request(prompt, many[0]), request(prompt, twin)
    assert run_one(engine, one).token_ids == run_one(engine, two).token_ids == alone(lively, one).token_ids
    assert engine.stats.adapter_loads == 1
    assert engine.stats.prefix_hit_tokens == 16
