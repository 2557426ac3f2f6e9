"""What benchmarks of the engine share: random adapters that cost no time to make, warm engines, and how one is loaded.

Contenders with engines of their own take turns with the device's memory: an engine sleeps while it is not its turn.
"""

import argparse
import dataclasses
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from rich.console import Console

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig, adapter_shapes
from preft_jax.adapters.pages import PackedSite
from preft_jax.config import ModelConfig
from preft_jax.device.mesh import SINGLE, Placement
from preft_jax.errors import ConfigError
from preft_jax.loading import Model
from preft_jax.sampling.parameters import SamplingParams
from preft_jax.shapes import KV_DTYPES, RANK_PAGE
from preft_jax.text.chat import EncodedPrompt
from serve.bench.load import EngineTarget, LoadRequest
from serve.bench.metrics import LoadResult
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.request import Output, Request
from serve.store.host_copy import Known, pack, pin

COUNTED = ("most_running", "preemptions", "adapter_loads", "adapter_waits", "recompiles")
"""Of what ``load`` counts, that which the figures of each contender have."""


class Adapters:
    """Random adapters that cost no time to make: each is a window of one random buffer, and named by its number.

    Args:
        model: sizes of the model.
        kind: of the adapters.
        rank: of all of them.
        dtype: of their rank pages in host memory, one of ``KV_DTYPES``.
        count: of adapters.
        placement: of the model.
        copies: different adapters in host memory; others are copied from where these lie. None: all of them.
    """

    def __init__(
        self, model: ModelConfig, kind: str, rank: int, dtype: str, count: int, *, placement: Placement = SINGLE,
        copies: int | None = None,
    ):  # fmt: skip
        if rank % RANK_PAGE:
            raise ConfigError(f"--rank is {rank}; give a multiple of {RANK_PAGE}")
        self._model = model
        self._pages = rank // RANK_PAGE
        self._config = AdapterConfig(kind=kind, rank=rank)
        longest = max(self._size(*model.site_shape(site)) for site in self._config.targets)
        noise = np.random.default_rng(0).standard_normal(longest + 64 * count, np.float32)
        size = 64.0 if dtype == "fp8" else 0.02
        self._noise = np.clip(noise * size, -448, 448).astype(KV_DTYPES[dtype])
        self._scale = np.float32(0.02 / size) if dtype == "fp8" else None
        self._placement, self._copies = placement, copies or count
        self._pinned: dict[int, Known] = {}

    def _size(self, *widths: int) -> int:
        return self._model.num_hidden_layers * self._pages * RANK_PAGE * max(widths)

    @property
    def sites(self) -> tuple[str, ...]:
        """What the adapters edit."""
        return self._config.targets

    def make(self, number: int, positions: str) -> Adapter:
        """Return an adapter whose parameters are not to be looked at: only its rank pages are real."""
        config = dataclasses.replace(self._config, positions=positions)
        shapes = adapter_shapes(config, self._model)
        leaves = jax.tree.map(
            lambda s: np.broadcast_to(np.float32(0), s), shapes, is_leaf=lambda s: isinstance(s, tuple)
        )
        adapter = Adapter(config, leaves)
        adapter.__dict__["digest"] = f"{positions}-{number}"
        return adapter

    def known(self, number: int) -> Known:
        """Return an adapter as it lies in host memory."""
        return pin(pack(self._packed(number)), self._placement)

    def _packed(self, number: int) -> dict[str, PackedSite]:
        layers, sites = self._model.num_hidden_layers, {}
        c = np.zeros((layers, self._pages, RANK_PAGE), np.float32)
        scale = None if self._scale is None else np.full_like(c, self._scale)
        for site in self._config.targets:
            d, f = self._model.site_shape(site)
            a = self._noise[64 * number :][: self._size(d)].reshape(layers, self._pages, d, RANK_PAGE)
            b = self._noise[64 * number :][: self._size(f)].reshape(layers, self._pages, RANK_PAGE, f)
            sites[site] = PackedSite(a, c, b, (0,) * self._pages, None if scale is None else (scale, scale))
        return sites

    def put(self, engine: Engine, count: int, mode: str, used: Collection[int] | None = None) -> list[Adapter]:
        """Make the first ``count`` and return them, and known to an engine of a mode those that are used (None: all).

        Engines share them in host memory.
        """
        own = [self.make(i, "all" if mode == "all-token" else "prompt") for i in range(count)]
        numbers = sorted(range(count) if used is None else set(range(count)).intersection(used))
        missing = sorted({i % self._copies for i in numbers} - set(self._pinned))
        with ThreadPoolExecutor() as pool:
            self._pinned |= dict(zip(missing, pool.map(self.known, missing), strict=True))
        for i in numbers:
            engine.adapters.put(own[i].digest, self._pinned[i % self._copies])
        return own


class WatchedEngine(Engine):
    """An engine that remembers how many sequences ran at a time."""

    most_running = 0

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.runner.num_kv_pages * (self.config.page_size or 1)

    def step(self) -> list[Output]:
        """See ``Engine``."""
        outputs = super().step()
        self.most_running = max(self.most_running, self.scheduler.num_running)
        return outputs


def engine_config(
    args: argparse.Namespace,
    mode: str,
    bank_adapters: int,
    sites: tuple[str, ...],
    *,
    max_model_len: int,
    prefill_seqs: int,
) -> EngineConfig:
    """Return the sizes of a mode's engine, those of the options and those that the requests need.

    ``sites``: those that adapters edit.
    """
    return EngineConfig(
        max_num_seqs=args.max_num_seqs,
        max_model_len=max_model_len,
        prefill_tokens=args.prefill_tokens,
        prefill_seqs=max(1, min(prefill_seqs, args.max_num_seqs)),
        chunk_tokens=min(args.prefill_tokens, 2048),
        max_rank=args.rank,
        bank_pages=1 if mode == "base" else 1 + bank_adapters * args.rank // RANK_PAGE,
        bank_sites=sites,
        all_token=mode == "all-token",
        decode_steps=getattr(args, "decode_steps", EngineConfig.decode_steps),
        mixed_tokens=getattr(args, "mixed_tokens", 0) if mode != "all-token" else 0,
        kv_dtype=args.kv_cache_dtype,
        adapter_dtype=getattr(args, "adapter_dtype", None),
        memory_utilization=args.memory_utilization,
        prefix_caching=False,
    )


def ready(
    model: Model, config: EngineConfig, mode: str, console: Console, *, held: int = 0
) -> tuple[WatchedEngine, float]:
    """Return a warm engine, and in how many seconds it was made; it is to be put to sleep until its turn.

    An engine for all-token adapters, which leave less memory to the KV cache, gets no more rows than the cache holds
    with ``held`` tokens in each, the mean of what is to be served: programs of more rows would only be slower.
    """
    start = time.perf_counter()
    engine = WatchedEngine(model, config)
    while config.all_token and config.max_num_seqs > 1 and engine.kv_tokens < config.max_num_seqs * held:
        config = dataclasses.replace(config, max_num_seqs=config.max_num_seqs // 2)
        engine.runner.release()
        engine = WatchedEngine(model, config)
    engine.warm_up()
    seconds = time.perf_counter() - start
    sizes = f"{engine.config.max_num_seqs} rows, {engine.kv_tokens} KV tokens"
    console.print(f"{mode}: ready in {seconds:.0f} s, {sizes}", soft_wrap=True)
    console.print(engine.runner.programs.seconds, soft_wrap=True)
    return engine, seconds


def load(
    engine: WatchedEngine, requests: Sequence[LoadRequest], adapters: Sequence[Adapter], most: int | None = None
) -> tuple[LoadResult, dict[str, float]]:
    """Serve requests greedily and in full length; return their records, and what the engine counted meanwhile.

    Args:
        engine: what serves them.
        requests: with the numbers of their adapters.
        adapters: by number.
        most: requests in the engine at a time; None takes what has arrived.

    Raises:
        ConfigError: if a request did not complete.
    """

    def make(request: LoadRequest) -> Request:
        return Request(
            prompt=EncodedPrompt(request.prompt, ()),
            adapter=None if request.user is None else adapters[request.user],
            sampling=SamplingParams(temperature=0.0, ignore_eos=True),
            max_tokens=request.max_tokens,
        )

    target = EngineTarget(engine, make, max_concurrency=most)
    before, engine.most_running = target.counters(), 0
    result = target.run(requests)
    after = target.counters()
    failed = next((record for record in result.records if record.status != "completed"), None)
    if failed is not None:
        raise ConfigError(f"a request {failed.status}: {failed.error}")
    return result, {name: after[name] - before[name] for name in after} | {"most_running": engine.most_running}
