"""Two thousand requests over five hundred named adapters, with room for few of them anywhere."""

import collections
import dataclasses
import random
import threading

import jax
import numpy as np
import pytest
from engine_outputs import TIGHT, assert_released, request

from preft_jax import random_adapter, save_adapter
from preft_jax.adapter import AdapterConfig
from serve.adapter_files import AdapterFiles
from serve.adapter_store import AdapterStore
from serve.engine import Engine
from serve.registry import Registry

ADAPTERS, REQUESTS, DEVICE_ROOM = 500, 2000, 64
RANKS = (2, 5)


@pytest.fixture(scope="module")
def directory(tiny, tmp_path_factory):
    """Return a directory of five hundred adapters."""
    root = tmp_path_factory.mktemp("many")
    for i in range(ADAPTERS):
        config = AdapterConfig(rank=RANKS[i % 2], targets=("q", "down"))
        save_adapter(root / f"u{i}", random_adapter(config, tiny.config, jax.random.key(i)))
    return root


def test_every_request_is_accounted_for_while_adapters_come_go_and_change(tiny, directory, tmp_path):
    store = AdapterStore(AdapterFiles(tiny, tmp_path / "kept"), Registry(tmp_path / "r.sqlite"), host_bytes=10**9)
    named = [store.register(f"u{i}", directory / f"u{i}") for i in range(ADAPTERS)]
    store.close()
    registry = Registry(tmp_path / "r.sqlite")
    store = AdapterStore(AdapterFiles(tiny, tmp_path / "kept"), registry, host_bytes=100 * named[0].num_bytes)
    config = dataclasses.replace(TIGHT, bank_pages=DEVICE_ROOM + 1, prefix_caching=False)
    engine = Engine(tiny, config, store=store)
    engine.warm_up()

    stop, problems = threading.Event(), []

    def reload():
        """Let names stand for other adapters, over and over."""
        mixed = random.Random(1)
        try:
            while not stop.is_set():
                name, other = (f"u{mixed.randrange(ADAPTERS)}" for _ in range(2))
                store.register(name, directory / other, replace=True)
        except Exception as error:  # Raised where the test looks.
            problems.append(error)

    rng, rank = random.Random(0), np.random.default_rng(0)
    users = (rank.zipf(1.2, REQUESTS) - 1) % ADAPTERS
    ended, asked = collections.Counter(), {}
    thread = threading.Thread(target=reload)
    thread.start()
    try:
        while len(asked) < REQUESTS or engine.has_work:
            while len(asked) < REQUESTS and len(engine._live) < 40:
                adapter = store.get(f"u{users[len(asked)]}")
                prompt = [rng.randrange(250) for _ in range(rng.randrange(3, 20))]
                number = engine.add(request(prompt, adapter, max_tokens=rng.randrange(1, 5)))
                asked[number] = adapter
                if rng.random() < 0.1:
                    engine.cancel(rng.choice(list(engine._live)))
            for output in engine.step():
                ended[output.finish_reason] += 1
    finally:
        stop.set()
        thread.join()
    assert problems == []
    assert ended["length"] + ended["stop"] + ended["abort"] == REQUESTS
    assert ended["error"] == 0
    assert ended["abort"] > REQUESTS // 20
    assert_released(engine)
    assert (len(engine._claims), engine._claims.loading, engine._live) == (0, False, {})
    assert not engine.adapters._known
    assert engine.stats.recompiles == 0
    tiers = store.tiers()
    assert tiers["host_bytes"] <= store.host_bytes
    assert tiers["leased"] == tiers["waiting"] == 0
    assert tiers["evictions"] > ADAPTERS
    assert engine.adapters.loads > DEVICE_ROOM
    store.close()
    assert len({path.name for path in (tmp_path / "kept").iterdir()}) == len({one.digest for one in _names(tmp_path)})


def _names(tmp_path):
    return Registry(tmp_path / "r.sqlite").list()
