"""Many requests over named adapters, with room for few of them anywhere."""

import collections
import dataclasses
import random
import threading

import jax
import numpy as np
import pytest
from engine_outputs import TIGHT, assert_released, request

from preft_jax import random_adapter, save_adapter
from preft_jax.adapters.config import AdapterConfig
from serve.engine.engine import Engine
from serve.store.files import AdapterFiles
from serve.store.host import AdapterStore
from serve.store.names import Registry

RANKS = (2, 5)


@pytest.mark.parametrize(
    ("adapters", "requests", "room"), [(150, 600, 24), pytest.param(500, 2000, 64, marks=pytest.mark.slow)]
)
def test_every_request_is_accounted_for_while_adapters_come_go_and_change(adapters, requests, room, tiny, tmp_path):
    """There is room for every fifth adapter on the host, and for ``room`` of them on the device."""
    for i in range(adapters):
        own = random_adapter(AdapterConfig(rank=RANKS[i % 2], targets=("q", "down")), tiny.config, jax.random.key(i))
        save_adapter(tmp_path / "given" / f"u{i}", own)
    store = AdapterStore(AdapterFiles(tiny, tmp_path / "kept"), Registry(tmp_path / "r.sqlite"), host_bytes=10**9)
    named = [store.register(f"u{i}", tmp_path / "given" / f"u{i}") for i in range(adapters)]
    store.close()
    registry = Registry(tmp_path / "r.sqlite")
    host_bytes = adapters // 5 * named[0].num_bytes
    store = AdapterStore(AdapterFiles(tiny, tmp_path / "kept"), registry, host_bytes=host_bytes)
    config = dataclasses.replace(TIGHT, bank_pages=room + 1, prefix_caching=False)
    engine = Engine(tiny, config, store=store)
    engine.warm_up()

    stop, problems = threading.Event(), []

    def reload():
        """Let names stand for other adapters, over and over."""
        mixed = random.Random(1)
        try:
            while not stop.is_set():
                name, other = (f"u{mixed.randrange(adapters)}" for _ in range(2))
                store.register(name, tmp_path / "given" / other, replace=True)
        except Exception as error:  # Raised where the test looks.
            problems.append(error)

    rng, rank = random.Random(0), np.random.default_rng(0)
    users = (rank.zipf(1.2, requests) - 1) % adapters
    ended, asked = collections.Counter(), {}
    thread = threading.Thread(target=reload)
    thread.start()
    try:
        while len(asked) < requests or engine.has_work:
            while len(asked) < requests and len(engine._live) < 40:
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
    assert ended["length"] + ended["stop"] + ended["abort"] == requests
    assert ended["error"] == 0
    assert ended["abort"] > requests // 20
    assert_released(engine)
    assert (engine.adapters.on_host, engine.adapters.loading, engine._live) == (set(), False, {})
    assert engine.stats.recompiles == 0
    tiers = store.tiers()
    assert tiers["host_bytes"] <= store.host_bytes
    assert tiers["leased"] == tiers["waiting"] == 0
    assert tiers["evictions"] > adapters
    assert engine.adapters.loads > room
    store.close()
    assert len({path.name for path in (tmp_path / "kept").iterdir()}) == len({one.digest for one in _names(tmp_path)})


def _names(tmp_path):
    return Registry(tmp_path / "r.sqlite").list()
