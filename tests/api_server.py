"""A real server in a thread, and an engine whose steps a test can hold."""

import contextlib
import socket
import threading
import time

import httpx
import jax
import openai
import uvicorn

import preft_jax
from preft_jax.shapes import BANK_SITES
from serve.api import make_server
from serve.engine.async_engine import AsyncEngine
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.server.auth import Keys, RuntimeLoading
from serve.server.serving import Serving
from serve.store.files import AdapterFiles
from serve.store.host import AdapterStore
from serve.store.names import Registry

CONFIG = EngineConfig(
    max_num_seqs=4, max_model_len=128, page_size=8, prefill_tokens=64, prefill_seqs=4, tile=32, max_rank=16,
    bank_pages=9, bank_sites=BANK_SITES, decode_steps=4,
)  # fmt: skip
ALICE, BOB, NOBODY, ADMIN = "alice-key-1", "bob-key-22", "nobodys-key", "admin-key-4444"
USERS = {ALICE: "alice", BOB: "bob", NOBODY: None}


class Gate:
    """Holds an engine's steps while it is shut; ``let`` lets some of them through."""

    def __init__(self, engine):
        self._step = engine.step
        self._free = threading.Event()
        self._free.set()
        self._some = threading.Semaphore(0)
        self.waiting = threading.Event()
        engine.step = self.step

    def step(self):
        while not self._free.is_set():
            self.waiting.set()
            if self._some.acquire(timeout=0.01):
                break
        self.waiting.clear()
        return self._step()

    def shut(self):
        self._some = threading.Semaphore(0)
        self._free.clear()

    def open(self):
        self._free.set()

    def let(self, steps=1):
        for _ in range(steps):
            self._some.release()


def adapter_directory(root, name, model, seed, strength=0.7):
    adapter = preft_jax.random_adapter(
        preft_jax.AdapterConfig(rank=8, alpha=12.0), model.config, jax.random.key(seed), strength=strength
    )
    preft_jax.save_adapter(root / name, adapter)
    return preft_jax.load_adapter(root / name, model)


def make_serving(model, root, **options):
    store = AdapterStore(AdapterFiles(model), Registry(), host_bytes=2**28)
    engine = Engine(model, CONFIG, store=store)
    keys = Keys(USERS, ADMIN)
    fields = {"max_model_len": CONFIG.max_model_len, "max_body_bytes": 2**16, "loading": RuntimeLoading([root])}
    return Serving(
        model=model, names=("tiny", "base"), engine=AsyncEngine(engine), adapters=store, keys=keys, **fields | options
    )


@contextlib.contextmanager
def running(serving, **limits):
    """Serve on a free port; yields the server's address."""
    server = make_server(serving, **{"request_seconds": 30, "read_seconds": 30, "drain_seconds": 0} | limits)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=uvicorn.Server.run, args=(server, [listener]))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def client(url, key):
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60, http_client=httpx.Client(trust_env=False)
    )


def until(holds):
    """Wait for what comes soon, or never."""
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


def is_idle(serving):
    engine = serving.engine.engine
    return not engine.has_work and engine.pages.num_used == 0 and serving.engine.num_open == 0


def admin(url):
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60, trust_env=False)
