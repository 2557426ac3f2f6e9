"""Fine-tuning beside serving: adapters as if trained alone, requests as if served alone.

Sums in another order move parameters after updates of 3e-3 by less than 2e-4, as in ``test_jobs``.
"""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases as cases
from conftest import ADAPTER_CONFIGS
from engine_outputs import TIGHT, advance, assert_as_alone, assert_released, request, some

from preft_jax.adapters.config import AdapterConfig
from preft_jax.device.ahead import Rehearsal
from preft_jax.device.memory import Budget
from serve.engine.background import Unit
from serve.engine.engine import Engine
from serve.store.files import AdapterFiles
from serve.store.host import AdapterStore
from serve.store.names import Registry
from train import ahead
from train.coserve import Hooks, Training
from train.cutting import WindowOptions
from train.trainer import Trainer

WINDOWS = WindowOptions(tokens=32, layers=1)
NAMES = {"lora": 5, "loreft_f3l2": 3}
"""Kinds of jobs, and how many updates each has."""
CONFIGS = ADAPTER_CONFIGS | {"lora": AdapterConfig(rank=8, alpha=12.0, targets=("gate", "up"))}
"""Units with edits of two linears compile sooner than with edits of all."""


def jobs(model):
    made = []
    for n, (name, steps) in enumerate(NAMES.items()):
        config, rng = CONFIGS[name], np.random.default_rng(n)
        data = cases.examples(config, rng, 6)
        made.append(cases.job(model, config, data, name=name, max_steps=steps, gradient_accumulation_steps=2 - n))
    return made


def serve(engine, requests, rng, steps=2000):
    """Add requests now and then and step until nothing is left for requests and other work; returns their samples."""
    wholes, ids, waiting = {}, [], list(requests)
    for _ in range(steps):
        if waiting and rng.random() < 0.2:
            ids.append(engine.add(waiting.pop(0)))
        advance(engine, wholes)
        if not waiting and not engine.has_work:
            pause = engine.pause  # Asked once: what another thread compiles may be ready a moment later.
            if pause is None:
                break
            time.sleep(pause)
    assert_released(engine)
    return [[wholes[number, 0]] for number in ids]


def first_unit(training, params):
    """Return the first unit of an update, once its programs are compiled."""
    while (unit := training.next()) is None or unit.name == "weights":
        if unit is None:
            time.sleep(training.pause)
        else:
            unit.start(params)
    return unit


@pytest.fixture(scope="module")
def alone(lively):
    """Return the adapters and the losses of the jobs trained without an engine."""
    return cases.train(lively, jobs(lively))


def test_jobs_beside_traffic_are_as_alone_and_so_are_requests(lively, alone, adapters, rng):
    expected, losses = alone
    told, ended = {name: [] for name in NAMES}, {}
    training = Training(
        Trainer(lively, jobs(lively)),
        WINDOWS,
        updated=lambda result: told[result.job.name].append(result.loss),
        ended=lambda job, adapter: ended.update({job.name: adapter}),
    )
    engine = Engine(lively, TIGHT, background=training, background_share=0.5)
    names = (None, "lora", "direft", None, "lora_r24", "loreft")
    requests = [request(some(rng, 5 + 3 * n), adapters.get(name), max_tokens=9) for n, name in enumerate(names)]
    samples = serve(engine, requests, rng)
    assert training.error is None
    assert training.updates == max(NAMES.values())
    for name, adapter in expected.items():
        np.testing.assert_allclose(told[name], losses[name], rtol=1e-4)
        for ours, other in zip(cases.leaves(ended[name]), cases.leaves(adapter), strict=True):
            np.testing.assert_allclose(ours, other, atol=2e-4)
    for one, sample in zip(requests, samples, strict=True):
        assert_as_alone(lively, one, sample)
    assert training.seconds.keys() >= {"edits", "forward-32", "loss", "backward-32", "fold", "update"}


def test_a_finished_adapter_is_served_by_the_same_engine(lively, alone, rng):
    store = AdapterStore(AdapterFiles(lively), Registry(), host_bytes=10**8)
    job = jobs(lively)[0]
    training = Training(
        Trainer(lively, [job]), WINDOWS, ended=lambda job, adapter: store.publish(f"mine-{job.name}", adapter)
    )
    engine = Engine(lively, TIGHT, store=store, background=training)
    serve(engine, [], rng)  # No request: the device is the training's.
    named, tokens = store.get("mine-lora"), some(rng, 9)
    (sample,) = serve(engine, [request(tokens, named)], rng)
    assert_as_alone(lively, request(tokens, alone[0]["lora"]), sample)
    store.close()


def test_paused_training_gives_no_unit_and_goes_on_where_it_was(lively, alone, rng):
    ended = []
    training = Training(Trainer(lively, jobs(lively)[:1]), WINDOWS, ended=lambda job, adapter: ended.append(adapter))
    engine = Engine(lively, TIGHT, background=training)
    for _ in range(7):
        engine.step()
    training.paused = True
    updates = training.updates
    serve(engine, [request(some(rng, 6))], rng)
    assert (training.updates, ended, engine.pause) == (updates, [], None)
    training.paused = False
    serve(engine, [], rng)
    for ours, other in zip(cases.leaves(ended[0]), cases.leaves(alone[0]["lora"]), strict=True):
        np.testing.assert_allclose(ours, other, atol=2e-4)


@pytest.mark.parametrize("where", ["prepare", "gather"])
def test_a_job_whose_units_fail_is_given_up_and_spoils_nothing(where, lively, alone, rng, monkeypatch):
    trainer, ended = Trainer(lively, jobs(lively)), {}
    training = Training(trainer, WINDOWS, ended=lambda job, adapter: ended.update({job.name: (job, adapter)}))
    engine = Engine(lively, TIGHT, background=training, background_share=0.5)
    while training.updates < 1:
        engine.step()
    bad, given = trainer.running[1], getattr(trainer, where)

    def fails(*args):
        micro = given(*args) if where == "prepare" else args[0]
        if bad in micro.jobs:
            raise RuntimeError("the device is out of memory")
        return micro if where == "prepare" else given(*args)

    monkeypatch.setattr(trainer, where, fails)
    one = request(some(rng, 6))
    (sample,) = serve(engine, [one], rng)
    assert "out of memory" in str(training.error)
    assert "out of memory" in ended[bad.name][0].failed
    (good,) = ended.keys() - {bad.name}
    assert ended[good][0].failed is None
    for ours, other in zip(cases.leaves(ended[good][1]), cases.leaves(alone[0][good]), strict=True):
        np.testing.assert_allclose(ours, other, atol=2e-4)
    assert_as_alone(lively, one, sample)


def test_jobs_whose_states_an_update_has_spoiled_join_again(lively, alone, rng, monkeypatch):
    (job,), kept, ended = jobs(lively)[:1], {}, []
    hooks = Hooks(
        keeps=lambda job: True,
        kept=lambda job, step, state: kept.update({step: state}),
        lost=lambda job: rejoin(),
    )
    training = Training(Trainer(lively, [job]), WINDOWS, ended=lambda job, adapter: ended.append(adapter), hooks=hooks)

    def rejoin():
        again = jobs(lively)[0]
        again.step = max(kept)
        training.join(again, kept[again.step])

    given = training.trainer.optim_step

    def spoils(jobs):
        if jobs[0].step == 3 and not spoiled:
            spoiled.append(True)
            jax.tree.map(lambda leaf: leaf.delete(), training.trainer._state)
            raise InterruptedError("the device was reset")
        return given(jobs)

    spoiled = []
    monkeypatch.setattr(training.trainer, "optim_step", spoils)
    serve(Engine(lively, TIGHT, background=training), [], rng)
    assert spoiled
    for ours, other in zip(cases.leaves(ended[0]), cases.leaves(alone[0]["lora"]), strict=True):
        np.testing.assert_allclose(ours, other, atol=2e-4)


def test_jobs_join_and_leave_while_the_engine_runs(lively, alone, rng):
    """A job that left joins again with its state; what is evaluated and kept on the way is what it has then."""
    states, evaluated, kept, ended = {}, {}, {}, {}
    held_out = cases.examples(CONFIGS["lora"], np.random.default_rng(9), 5)
    hooks = Hooks(
        left=lambda job, state: states.update({job: state}),
        keeps=lambda job: job.step == 2,
        kept=lambda job, step, state: kept.update({(job.name, step): state}),
        evaluates=lambda job: job.step in (2, 5),
        evaluated=lambda job, step, loss, tokens: evaluated.update({step: (loss, tokens)}),
    )
    trainer = Trainer(lively)
    training = Training(trainer, WINDOWS, ended=lambda job, adapter: ended.update({job.name: adapter}), hooks=hooks)
    engine = Engine(lively, TIGHT, background=training, background_share=0.5)
    assert engine.pause is None
    lora, reft = jobs(lively)
    lora.held_out = held_out
    training.join(lora)
    while lora.step < 1:
        engine.step()
    training.leave(lora)
    training.join(reft)
    serve(engine, [request(some(rng, 6))], rng)
    assert list(states) == [lora]
    assert list(ended) == [reft.name]
    training.join(lora, states[lora])
    serve(engine, [], rng)
    for name, adapter in alone[0].items():
        for ours, other in zip(cases.leaves(ended[name]), cases.leaves(adapter), strict=True):
            np.testing.assert_allclose(ours, other, atol=2e-4)
    other = Trainer(lively, [lora])
    for step, state in {2: kept["lora", 2], 5: trainer_state(ended["lora"], kept["lora", 2])}.items():
        again = jobs(lively)[0]
        other = Trainer(lively)
        other.add(again, state)
        other.admit()
        loss, tokens = other.evaluate(again, held_out)
        assert evaluated[step] == (pytest.approx(loss, rel=1e-5), tokens)


def trainer_state(adapter, like):
    """Return a state with an adapter's parameters."""
    return like._replace(params=adapter.params)


def test_closed_training_hands_out_what_was_learned_and_gives_no_unit(lively, rng):
    left = {}
    training = Training(
        Trainer(lively, jobs(lively)), WINDOWS, hooks=Hooks(left=lambda job, state: left.update({job.name: job.step}))
    )
    engine = Engine(lively, TIGHT, background=training)
    while training.updates < 2:
        engine.step()
    for _ in range(3):
        engine.step()
    training.close()
    assert left == dict.fromkeys(NAMES, training.updates)
    assert engine.pause is None or engine.step() == []
    serve(engine, [request(some(rng, 6))], rng)
    assert (training.updates, training.error) == (left["lora"], None)


def test_what_a_unit_is_expected_to_take_follows_what_was_measured(lively):
    training = Training(Trainer(lively, jobs(lively)[:1]), WINDOWS)
    first = first_unit(training, lively.params)
    assert isinstance(first, Unit)
    assert first.seconds == 0.01
    training.done(first, 0.2)
    assert training.next().seconds == 0.2
    training.done(first, 0.4)
    assert training.next().seconds == 0.2, "once is no rule"
    training.done(first, 0.4)
    assert training.next().seconds == 0.4
    assert jnp.isfinite(first.start(lively.params)[0].vectors[0]).all()
    assert training.next().name == "forward-32"


def test_memory_of_a_micro_batch_is_leased_and_given_back_when_others_need_it(lively, alone, rng):
    """Training waits while there is no room; a micro-batch that is dropped in its middle begins anew."""
    ended = []
    job = jobs(lively)[0]
    training = Training(Trainer(lively, [job]), WINDOWS, ended=lambda job, adapter: ended.append(adapter))
    engine = Engine(lively, TIGHT, background=training)
    training.memory = budget = Budget(1 << 30)
    with budget.lease("others", budget.total):
        while training.waits is None:
            engine.step()
        assert (training.next(), engine.pause) == (None, None)
        assert "training needs" in training.waits
    while training.updates < 1 or training._update is None or training._update.gathered[job] != 1:
        engine.step()
    for _ in range(5):  # In the middle of the second micro-batch of two.
        engine.step()
    assert 0 < budget.shares()["training"] < budget.total
    with budget.lease("others", budget.total):
        assert "training" not in budget.shares()
        assert training.restarts == 1
        for _ in range(5):
            engine.step()
    serve(engine, [], rng)
    assert budget.shares() == {}
    assert training.error is None
    for ours, other in zip(cases.leaves(ended[0]), cases.leaves(alone[0]["lora"]), strict=True):
        np.testing.assert_allclose(ours, other, atol=2e-4)


def test_memory_that_another_thread_asks_for_is_given_back_before_the_next_unit(lively):
    training = Training(Trainer(lively, jobs(lively)[:1]), WINDOWS)
    training.memory = budget = Budget(1 << 30)
    unit = first_unit(training, lively.params)
    asks = threading.Thread(target=training.give_back)
    asks.start()
    asks.join()
    assert budget.shares()["training"] > 0
    assert training.next().name == unit.name, "it began anew"
    assert training.restarts == 1


def compiling_threads():
    """Return a list that gets the thread of each compilation, and a function that ends that."""
    threads = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            threads.append(threading.get_ident())

    jax.monitoring.register_event_duration_secs_listener(listen)
    return threads, lambda: jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_compiled_in_the_engines_thread_while_jobs_join_under_load(lively, rng, monkeypatch):
    """Others go on with their programs meanwhile: compiling waits here until they have."""
    first = cases.job(
        lively, ADAPTER_CONFIGS["lora_r24"], cases.examples(ADAPTER_CONFIGS["lora_r24"], rng, 6), name="first",
        held_out=cases.examples(ADAPTER_CONFIGS["lora_r24"], rng, 3), max_steps=1000, gradient_accumulation_steps=2,
    )  # fmt: skip
    data = cases.examples(ADAPTER_CONFIGS["loreft"], rng, 6)
    later = [cases.job(lively, ADAPTER_CONFIGS["loreft"], data, name=f"later-{n}", max_steps=2 + n) for n in range(2)]
    evaluated, left, ended = [], [], []
    hooks = Hooks(
        keeps=lambda job: True,
        evaluates=lambda job: job.step == 1,
        evaluated=lambda *args: evaluated.append(args),
        left=lambda job, state: left.append(job),
    )
    training = Training(Trainer(lively), WINDOWS, ended=lambda job, adapter: ended.append(job), hooks=hooks)
    engine = Engine(lively, TIGHT, background=training, background_share=0.5)
    engine.warm_up()

    def step():
        if not engine.has_work:
            engine.add(request(some(rng, 5), max_tokens=9))
        engine.step()

    def join(job):
        thread = threading.Thread(target=training.join, args=(job,))
        thread.start()
        thread.join()

    while engine.stats.generated_tokens < 9:
        step()
    compiled = Rehearsal.compile

    def compile_later(rehearsal):
        enough = first.step + 2 if first.step else 0
        while first.step < enough:
            time.sleep(0.001)
        compiled(rehearsal)

    monkeypatch.setattr(Rehearsal, "compile", compile_later)
    threads, end = compiling_threads()
    try:
        join(first)
        while first.step < 2:
            step()
        for job in later:
            join(job)
        while len(ended) < 2:
            step()
        training.leave(first)
        while not left:
            step()
    finally:
        end()
    assert threads
    assert threading.get_ident() not in threads
    assert engine.stats.recompiles == 0
    assert [job.failed for job in (first, *later)] == [None] * 3
    assert (len(evaluated), training.error) == (1, None)
    assert training.compile_seconds.keys() >= {"forward", "backward", "loss", "fold", "update", "grow", "take"}


def test_a_job_whose_programs_cannot_be_compiled_is_given_up_and_nobody_else(lively, alone, rng, monkeypatch):
    lora, reft = jobs(lively)
    ended = {}
    training = Training(Trainer(lively), WINDOWS, ended=lambda job, adapter: ended.update({job: adapter}))
    rehearsed = ahead.rehearse

    def fails(shapes, *args):
        if any(group.config.kind == "loreft" for group in shapes.groups):
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory to compile in")
        rehearsed(shapes, *args)

    monkeypatch.setattr(ahead, "rehearse", fails)
    training.join(lora)
    training.join(reft)
    one = request(some(rng, 6))
    (sample,) = serve(Engine(lively, TIGHT, background=training, background_share=0.5), [one], rng)
    assert "no memory to compile in" in reft.failed
    jax.tree.map(np.testing.assert_array_equal, ended[reft].params, reft.initial.params)
    assert lora.failed is None
    for ours, other in zip(cases.leaves(ended[lora]), cases.leaves(alone[0]["lora"]), strict=True):
        np.testing.assert_allclose(ours, other, atol=2e-4)
    assert_as_alone(lively, one, sample)


class Told:
    """What training tells of jobs, each by name."""

    def __init__(self):
        self.losses, self.ended, self.lost = {name: [] for name in NAMES}, {}, []
        self.hooks = Hooks(lost=self.lost.append)

    def updated(self, result):
        self.losses[result.job.name].append(result.loss)

    def end(self, job, adapter):
        self.ended[job.name] = adapter

    def assert_as_alone(self, alone, name):
        np.testing.assert_allclose(self.losses[name], alone[1][name], rtol=1e-4)
        for ours, other in zip(cases.leaves(self.ended[name]), cases.leaves(alone[0][name]), strict=True):
            np.testing.assert_allclose(ours, other, atol=2e-4)


@pytest.fixture
def told():
    return Told()


def test_a_job_that_cannot_join_is_not_noticed_by_one_that_runs(lively, alone, told, monkeypatch):
    lora, reft = jobs(lively)
    training = Training(Trainer(lively), WINDOWS, updated=told.updated, ended=told.end, hooks=told.hooks)
    engine = Engine(lively, TIGHT, background=training)
    training.join(lora)
    while lora.step < 2:
        engine.step()
    rehearsed = ahead.rehearse

    def fails(shapes, *args):
        if len(shapes.groups) > 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory to compile in")
        rehearsed(shapes, *args)

    monkeypatch.setattr(ahead, "rehearse", fails)
    training.join(reft)
    while reft.failed is None:
        engine.step()
    assert not lora.done, "it joined too late to be noticed"
    serve(engine, [], None)
    assert "after step 0: RuntimeError: RESOURCE_EXHAUSTED: no memory to compile in" in reft.failed
    told.assert_as_alone(alone, "lora")
    assert (told.lost, lora.failed, training.error) == ([], None, None)


@pytest.mark.parametrize("for_good", [False, True])
def test_a_job_that_stays_keeps_what_it_learned_where_nothing_compiles_once_another_left(
    for_good, lively, alone, told, monkeypatch
):
    """The one that is left goes on with other programs, or is given up if there are none either."""
    both = lora, reft = jobs(lively)
    training = Training(Trainer(lively, both), WINDOWS, updated=told.updated, ended=told.end, hooks=told.hooks)
    rehearsed, failed = ahead.rehearse, []

    def fails(shapes, *args):
        if reft.done and (for_good or len(shapes.groups) > 1):
            failed.append(lora.step)
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory to compile in")
        rehearsed(shapes, *args)

    monkeypatch.setattr(ahead, "rehearse", fails)
    serve(Engine(lively, TIGHT, background=training), [], None)
    assert failed
    told.assert_as_alone(alone, reft.name)
    assert (told.lost, reft.failed, training.error) == ([], None, None)
    if not for_good:
        told.assert_as_alone(alone, lora.name)
        assert lora.failed is None
        return
    learned = failed[0]
    assert f"after step {learned}: RuntimeError: RESOURCE_EXHAUSTED: no memory" in lora.failed
    np.testing.assert_allclose(told.losses["lora"], alone[1]["lora"][:learned], rtol=1e-4)
    first, last = (jax.tree.leaves(adapter.params) for adapter in (lora.initial, told.ended["lora"]))
    assert any((a != b).any() for a, b in zip(first, last, strict=True))
