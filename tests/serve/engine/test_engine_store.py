"""Named adapters: the engine serves what the store has registered, whichever tier it comes from."""

import dataclasses
import os
import shutil
import threading

import jax
import numpy as np
import pytest
from engine_outputs import TIGHT, Whole, alone, assert_as_alone, drain, request, run_all, some

from preft_jax import random_adapter, save_adapter
from preft_jax.adapters import pages
from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.fold import fold_on_host
from preft_jax.errors import AdapterError, ConfigError, RequestError
from preft_jax.io.adapter_files import load_adapter
from serve.engine.engine import Engine
from serve.store.directory import AdapterDirectory
from serve.store.files import AdapterFiles
from serve.store.host import AdapterStore
from serve.store.names import Registry

BROKEN = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(lively, adapters, tmp_path_factory):
    """Return a directory with every kind of adapter, made for ``lively``."""
    root = tmp_path_factory.mktemp("adapters")
    for name, adapter in adapters.items():
        save_adapter(root / name, adapter)
    return root


def make_store(model, registry=None, kept=None, host_bytes=10**8):
    return AdapterStore(AdapterFiles(model, kept), registry or Registry(), host_bytes=host_bytes)


@pytest.fixture
def store(lively):
    store = make_store(lively)
    yield store
    store.close()


def test_a_store_of_another_dtype_is_refused(lively, store):
    with pytest.raises(ConfigError, match="the store has rank pages in float32 and the engine takes float8_e4m3fn"):
        Engine(lively, dataclasses.replace(TIGHT, adapter_dtype="fp8"), store=store)


def direct(lively, one, path):
    """Return the same request with the adapter itself."""
    return dataclasses.replace(one, adapter=load_adapter(path, lively))


def test_every_kind_by_name_is_the_adapter_itself(lively, saved, adapters, store, rng):
    requests = [
        request(some(rng, 6 + i), store.register(name, saved / name), max_tokens=5) for i, name in enumerate(adapters)
    ]
    engine = Engine(lively, TIGHT, store=store)
    for one, samples in zip(requests, run_all(engine, requests), strict=True):
        assert_as_alone(lively, direct(lively, one, one.adapter.path), samples)
    tiers = store.tiers()
    assert tiers["leased"] == 0
    assert tiers["host_adapters"] == len(adapters)


def test_room_for_three_on_the_host_and_fewer_on_the_device_serves_twelve(lively, tmp_path, rng):
    config = AdapterConfig(rank=8, alpha=12.0)
    for i in range(12):
        save_adapter(tmp_path / f"u{i}", random_adapter(config, lively.config, jax.random.key(i), strength=0.7))
    store = make_store(lively)
    named = [store.register(f"u{i}", tmp_path / f"u{i}") for i in range(12)]
    store.close()
    store = make_store(lively, host_bytes=3 * named[0].num_bytes)
    named = [store.register(f"u{i}", tmp_path / f"u{i}") for i in range(12)]
    requests = [request(some(rng, 7), one, max_tokens=5) for one in (*named, *reversed(named))]
    engine = Engine(lively, TIGHT, store=store)
    for one, samples in zip(requests, run_all(engine, requests), strict=True):
        assert_as_alone(lively, direct(lively, one, one.adapter.path), samples)
    assert store.tiers()["host_bytes"] <= store.host_bytes
    assert store.tiers()["evictions"] > 6
    store.close()


def test_what_is_published_from_memory_is_what_its_file_holds(lively, saved, adapters, tmp_path, rng, monkeypatch):
    """Every kind is folded once, and served also after it left host memory."""
    folds = []
    monkeypatch.setattr(pages, "fold_on_host", lambda *args: folds.append(args) or fold_on_host(*args))
    store = make_store(lively)
    host_bytes = 3 * max(store.publish(name, one).num_bytes for name, one in adapters.items())
    store.close()
    folds.clear()
    store = make_store(lively, kept=tmp_path / "kept", host_bytes=host_bytes)
    named = [store.publish(name, Adapter(one.config, one.params)) for name, one in adapters.items()]
    requests = [request(some(rng, 6 + i), one, max_tokens=5) for i, one in enumerate(named)]
    served = run_all(Engine(lively, TIGHT, store=store), requests)
    assert len(folds) == len(adapters)
    for one, samples in zip(requests, served, strict=True):
        assert one.adapter.digest == load_adapter(saved / one.adapter.name, lively).digest
        assert_as_alone(lively, direct(lively, one, saved / one.adapter.name), samples)
    assert min(store.tiers()["evictions"], store.tiers()["loads"]) > 0
    store.close()


def test_adapters_of_another_model_are_not_published(lively, adapters, store):
    Engine(lively, dataclasses.replace(TIGHT, all_token=False), store=store)
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), adapters["lora"].params)
    other = dataclasses.replace(adapters["lora"].config, base_model_digest="1" * 64)
    for adapter, message in (
        (adapters["lora_all"], "edits every token"),
        (Adapter(adapters["lora"].config, broken), "NaN or infinite"),
        (Adapter(other, adapters["lora"].params), "base model"),
    ):
        with pytest.raises(AdapterError, match=message):
            store.publish("bad", adapter)
    assert store.get("bad") is None
    assert store.tiers()["host_bytes"] == 0


def test_a_name_of_an_earlier_run_is_not_served_on_another_base_model(lively, adapters, tmp_path, rng):
    """The other model has the same shape, so that the rank pages that were kept would fit it."""
    made_for = dataclasses.replace(adapters["lora"].config, base_model_digest=lively.digest)
    save_adapter(tmp_path / "ann", Adapter(made_for, adapters["lora"].params))
    refused = []
    for digest in (lively.digest, "1" * 64, lively.digest):
        base = dataclasses.replace(lively, digest=digest)
        store = make_store(base, Registry(tmp_path / "names.sqlite"), tmp_path / "pages")
        engine = Engine(base, TIGHT, store=store)
        ann = store.get("ann") or store.register("ann", tmp_path / "ann")
        try:
            engine.add(request(some(rng, 5), ann))
            store.check(ann.config)
        except AdapterError as error:
            refused.append((digest, str(error)))
            with pytest.raises(AdapterError, match="made for the base model"):
                store.check(ann.config)
        store.close()
    ((digest, reason),) = refused
    assert digest == "1" * 64
    assert reason.startswith(f"the adapter was made for the base model {lively.digest[:12]}")


class Slow(AdapterFiles):
    """Loads when it is told to."""

    def __init__(self, model):
        super().__init__(model)
        self.gate = threading.Event()

    def load(self, path, digest):
        self.gate.wait(60)
        return super().load(path, digest)


def slow_store(lively, saved, *names):
    """Return a store whose named adapters are not in host memory, and what lets them come."""
    files = Slow(lively)
    store = AdapterStore(files, Registry(), host_bytes=10**8)
    named = []
    for name in names:
        store.register(name, saved / name)
        store._used, store._copies = 0, type(store._copies)()
        named.append(store.get(name))
    return store, files.gate, named


def test_a_request_whose_adapter_is_loading_blocks_no_other(lively, saved, rng):
    store, gate, (named,) = slow_store(lively, saved, "lora")
    engine = Engine(lively, TIGHT, store=store)
    waits = request(some(rng, 8), named, max_tokens=5, n=2)
    others = [request(some(rng, 8 + i), max_tokens=5) for i in range(4)]
    number = engine.add(waits)
    for one, samples in zip(others, run_some(engine, others), strict=True):
        assert_as_alone(lively, one, samples)
    assert engine.has_work
    gate.set()
    wholes = drain(engine)
    assert_as_alone(lively, direct(lively, waits, saved / "lora"), [wholes[number, 0], wholes[number, 1]])
    assert store.tiers()["leased"] == 0
    store.close()


def run_some(engine, requests):
    """Return the samples of requests, while others may be left over."""
    numbers, found = [engine.add(one) for one in requests], {}
    for _ in range(3000):
        for output in engine.step():
            found.setdefault((output.request_id, output.index), []).append(output)
        if all(any(o.finish_reason for o in found.get((n, 0), ())) for n in numbers):
            break
    return [[whole(found[number, 0])] for number in numbers]


def whole(outputs):
    made = Whole()
    for output in outputs:
        made.add(output)
    return made


@pytest.mark.parametrize("when", ["at once", "after it came"])
def test_a_request_cancelled_while_its_adapter_loads_leaves_nothing(when, lively, saved, rng):
    store, gate, (named,) = slow_store(lively, saved, "lora")
    engine = Engine(lively, TIGHT, store=store)
    number = engine.add(request(some(rng, 8), named))
    if when == "after it came":
        gate.set()
        for _ in range(500):
            store.wait(0.01)
            if store._done:
                break
    engine.cancel(number)
    gate.set()
    wholes = drain(engine)
    assert wholes[number, 0].finish_reason == "abort"
    assert store.tiers()["leased"] == 0
    assert engine.adapters.on_host == set()
    one = request(some(rng, 8), named)
    ((sample,),) = run_all(engine, [one])
    assert_as_alone(lively, direct(lively, one, saved / "lora"), [sample])
    store.close()


def test_an_adapter_that_cannot_be_loaded_any_more_fails_its_own_requests(lively, saved, tmp_path, rng):
    shutil.copytree(saved / "lora", tmp_path / "gone")
    files = AdapterFiles(lively)
    store = AdapterStore(files, Registry(), host_bytes=10**8)
    gone, direft = store.register("gone", tmp_path / "gone"), store.register("direft", saved / "direft")
    store._used, store._copies = 0, type(store._copies)()
    (tmp_path / "gone" / BROKEN).write_bytes(b"not tensors")
    requests = [request(some(rng, 8), gone), request(some(rng, 9), direft), request(some(rng, 7))]
    engine = Engine(lively, TIGHT, store=store)
    numbers = [engine.add(one) for one in requests]
    wholes = drain(engine)
    assert wholes[numbers[0], 0].finish_reason == "error"
    assert "not a whole safetensors file" in wholes[numbers[0], 0].error
    assert_as_alone(lively, direct(lively, requests[1], saved / "direft"), [wholes[numbers[1], 0]])
    assert_as_alone(lively, requests[2], [wholes[numbers[2], 0]])
    assert store.tiers()["leased"] == 0
    store.close()


@pytest.mark.parametrize("source", ["files", "memory"])
def test_a_reload_under_load_never_mixes_digests(source, lively, adapters, tmp_path, rng):
    """The name stands for other adapters while its requests run: each request is served by the one it asked for."""
    store = make_store(lively, kept=tmp_path / "kept" if source == "files" else None, host_bytes=10**6)
    engine = Engine(lively, TIGHT, store=store)
    wholes, asked = {}, {}
    for turn, kind in enumerate(["lora", "direft", "loreft", "lora"] * 3):
        if source == "files":
            save_adapter(tmp_path / "changing", adapters[kind])
            named = store.register("changing", tmp_path / "changing", replace=True)
        else:
            named = store.publish("changing", adapters[kind])
        for _ in range(2):
            one = request(some(rng, 5 + turn), named, max_tokens=7)
            asked[engine.add(one)] = dataclasses.replace(one, adapter=adapters[kind])
        for output in engine.step():
            wholes.setdefault(output.request_id, []).append(output)
    while engine.has_work:
        for output in engine.step():
            wholes.setdefault(output.request_id, []).append(output)
    for number, one in asked.items():
        assert_as_alone(lively, one, [whole(wholes[number])])
    store.unregister("changing")
    assert store.tiers()["host_bytes"] == 0
    store.close()  # Deletes what is still to be deleted.
    assert list((tmp_path / "kept").glob("*")) == []


def test_kept_rank_pages_serve_without_the_directory(lively, saved, tmp_path, rng):
    shutil.copytree(saved / "loreft_f3l2", tmp_path / "a")
    path = tmp_path / "adapters.sqlite"
    store = make_store(lively, Registry(path), tmp_path / "kept")
    store.register("a", tmp_path / "a")
    store.close()
    shutil.rmtree(tmp_path / "a")
    store = make_store(lively, Registry(path), tmp_path / "kept")
    one = request(some(rng, 12), store.get("a"))
    ((sample,),) = run_all(Engine(lively, TIGHT, store=store), [one])
    assert_as_alone(lively, direct(lively, one, saved / "loreft_f3l2"), [sample])
    assert store.tiers()["loads"] == 1
    store.close()


def rename_site(file, others):
    """Let the file's header name another site: a letter of it."""
    data = file.read_bytes()
    assert b'"block.0.' in data or b'"linears.0.' in data
    file.write_bytes(data.replace(b'"block.', b'"blocj.').replace(b'"linears.', b'"linearz.'))


def zero_block(file, others):
    data = file.read_bytes()
    middle = len(data) // 2
    file.write_bytes(data[:middle] + bytes(4096) + data[middle + 4096 :])


def take_anothers(file, others):
    shutil.copy(others[0], file)


@pytest.mark.parametrize("damage", [rename_site, zero_block, take_anothers])
def test_damaged_rank_pages_end_neither_the_engine_nor_a_request(damage, lively, saved, tmp_path, rng, caplog):
    """What has a directory is made again; what was published without one fails alone."""
    path, kept = tmp_path / "adapters.sqlite", tmp_path / "kept"
    store = make_store(lively, Registry(path), kept)
    store.register("a", saved / "loreft_f3l2")
    before = set(kept.iterdir())
    store.publish("b", load_adapter(saved / "lora", lively))
    store.close()
    (first,), (second,) = before, set(kept.iterdir()) - before
    shutil.copytree(kept, tmp_path / "whole")
    damage(first, [tmp_path / "whole" / second.name])
    damage(second, [tmp_path / "whole" / first.name])
    store = make_store(lively, Registry(path), kept)
    engine = Engine(lively, TIGHT, store=store)
    ones = [request(some(rng, 12), store.get(name)) for name in ("a", "b")]
    numbers = [engine.add(one) for one in ones]
    wholes = drain(engine)
    assert_as_alone(lively, direct(lively, ones[0], saved / "loreft_f3l2"), [wholes[numbers[0], 0]])
    assert wholes[numbers[1], 0].finish_reason == "error"
    assert caplog.text.count("kept rank pages are damaged") == 2
    store.close()


def test_a_published_adapter_outlives_the_process_where_a_directory_keeps_it(lively, adapters, tmp_path):
    path = tmp_path / "adapters.sqlite"
    store = make_store(lively, Registry(path), tmp_path / "kept")
    store.publish("a", adapters["lora"])
    store.close()
    for kept, error in ((tmp_path / "kept", None), (None, "publish it again")):
        store = make_store(lively, Registry(path), kept)
        lease = store.lease(store.get("a"))
        store.wait(60)
        ((told, reason),) = store.poll()
        assert told is lease
        assert (lease.known is None) == (error is not None)
        assert reason is None or error in reason
        store.close()


def test_adapters_that_the_engine_can_never_serve_are_refused_at_registration(lively, saved, store):
    Engine(lively, dataclasses.replace(TIGHT, all_token=False), store=store)
    with pytest.raises(AdapterError, match="edits every token"):
        store.register("lora_all", saved / "lora_all")
    assert store.get("lora_all") is None


def test_a_named_adapter_needs_a_store(lively, saved, store, rng):
    with pytest.raises(RequestError, match="no store"):
        Engine(lively, TIGHT).add(request(some(rng, 5), store.register("lora", saved / "lora")))


def test_a_directory_is_followed(lively, saved, store, tmp_path):
    root = tmp_path / "watched"
    root.mkdir()
    shutil.copytree(saved / "lora", root / "ann")
    (root / "empty").mkdir()
    (root / "link").symlink_to(saved / "direft")
    watched = AdapterDirectory(store, root)
    assert watched.scan() == (["ann"], [], {})
    assert watched.scan() == ([], [], {})
    shutil.copytree(saved / "direft", root / "bob")
    (root / "bob" / BROKEN).write_bytes(b"nothing")
    changes = watched.scan()
    assert list(changes.refused) == ["bob"]
    assert "not a whole safetensors file" in changes.refused["bob"]
    assert watched.scan() == ([], [], {}), "it is not read again before it changes"
    shutil.copyfile(saved / "direft" / BROKEN, root / "bob" / BROKEN)
    assert watched.scan().registered == ["bob"]
    before = store.register("ann", root / "ann", owner="ann", pinned=True, replace=True)
    save_adapter(root / "ann", load_adapter(saved / "direft", lively))
    assert watched.scan().registered == ["ann"]
    now = store.get("ann")
    assert now.digest != before.digest
    assert (now.owner, now.pinned) == ("ann", True), "another's adapter does not become everybody's when it changes"
    shutil.rmtree(root / "bob")
    assert watched.scan() == ([], ["bob"], {})
    assert [one.name for one in store.list()] == ["ann"]


def test_one_bad_adapter_in_a_directory_holds_up_no_other(lively, saved, store, tmp_path):
    Engine(lively, dataclasses.replace(TIGHT, all_token=False), store=store)
    for name, kind in (("ann", "lora"), ("base", "lora"), ("every", "lora_all"), ("zoe", "direft")):
        shutil.copytree(saved / kind, tmp_path / "watched" / name)
    watched = AdapterDirectory(store, tmp_path / "watched", taken=("base",))
    changes = watched.scan()
    assert changes.registered == ["ann", "zoe"]
    assert "base model's name" in changes.refused["base"]
    assert "--all-token" in changes.refused["every"]
    assert watched.scan() == ([], [], {})


def test_a_directory_swapped_for_an_older_one_is_noticed(lively, saved, store, tmp_path):
    root = tmp_path / "watched"
    shutil.copytree(saved / "direft", tmp_path / "new")
    for path in (tmp_path / "new", *(tmp_path / "new").iterdir()):
        os.utime(path, (1e9, 1e9))
    shutil.copytree(saved / "lora", root / "ann")
    watched = AdapterDirectory(store, root)
    watched.scan()
    before = store.get("ann")
    (root / "ann").rename(tmp_path / "old")
    (tmp_path / "new").rename(root / "ann")
    assert watched.scan().registered == ["ann"]
    assert store.get("ann").digest != before.digest
    for path in (root / "ann", *(root / "ann").iterdir()):
        os.utime(path, (4e9, 4e9))
    watched.scan()
    assert watched.scan() == ([], [], {}), "a clock that is ahead does not make it new at every look"


def test_after_a_restart_a_directory_is_not_read_again(lively, saved, store, tmp_path):
    shutil.copytree(saved / "lora", tmp_path / "watched" / "ann")
    AdapterDirectory(store, tmp_path / "watched").scan()
    assert AdapterDirectory(store, tmp_path / "watched").scan() == ([], [], {})


def test_a_damaged_file_of_rank_pages_is_made_again(lively, saved, tmp_path):
    files = AdapterFiles(lively, tmp_path / "kept")
    read = files.read(str(saved / "lora"))
    files.keep(read.digest, read.known)
    (file,) = (tmp_path / "kept").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    known = files.load(str(saved / "lora"), read.digest)
    assert known.sites == read.known.sites
    assert file.read_bytes() == whole
    file.write_bytes(b"damaged")
    with pytest.raises(AdapterError, match="another adapter"):
        files.load(str(saved / "direft"), read.digest)


def test_alone_is_the_right_oracle(lively, saved, rng):
    """Two adapters are two texts: the comparisons above could fail."""
    one = request(some(rng, 9), load_adapter(saved / "lora", lively))
    other = dataclasses.replace(one, adapter=load_adapter(saved / "direft", lively))
    assert alone(lively, one).token_ids != alone(lively, other).token_ids
