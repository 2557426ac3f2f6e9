"""What ``/metrics`` tells, in Prometheus' format: vLLM's names where it has them, ours begin with ``preft_``."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

from serve.engine.async_engine import AsyncEngine

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

_STORE_COUNTERS = ("hits", "loads", "failed_loads", "evictions", "loaded_bytes", "load_seconds")


def engine_figures(engine: AsyncEngine) -> dict[str, Any]:
    """Return an engine's figures now. Its thread goes on meanwhile: they may be of two neighbouring steps."""
    inner = engine.engine
    return {
        "ready": engine.accepts,
        "running": inner.scheduler.num_running,
        "waiting": engine.num_waiting,
        "kv_pages": inner.pages.num_pages,
        "kv_pages_used": inner.pages.num_used,
        **dataclasses.asdict(inner.stats),
    }


def bank_figures(engine: AsyncEngine) -> dict[str, int]:
    """Return what lies in the engine's bank of rank pages."""
    bank = engine.engine.adapters
    return {f"device_{name}": value for name, value in bank.figures().items()} | {"device_loads": bank.loads}


class ServerMetrics:
    """One server's metrics, in a registry of their own.

    Args:
        model: the base model's name, the label ``model_name``.
        engine: whose counters are read when someone asks.
        tiers: gives the adapter store's figures (``AdapterStore.tiers``), or None.
    """

    def __init__(self, model: str, engine: AsyncEngine, tiers: Callable[[], Mapping[str, float]] | None = None):
        self.registry = CollectorRegistry()
        self._model = model

        def histogram(name: str, told: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, told, ["model_name"], buckets=buckets, registry=self.registry).labels(model)

        self._first_token = histogram("vllm:time_to_first_token_seconds", "To a request's first token", _FIRST_TOKEN)
        self._per_token = histogram(
            "vllm:time_per_output_token_seconds", "Mean of a sample's seconds between tokens", _PER_TOKEN
        )
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From a request to a sample's end", _WHOLE)
        self._prompt = histogram("vllm:request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self._generated = histogram("vllm:request_generation_tokens", "Tokens of a sample", _TOKENS)
        self._success = Counter(
            "vllm:request_success", "Samples by why they ended", ["model_name", "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        self._answers = Counter(
            "preft_http_responses", "Answers by route and status", ["route", "status"], registry=self.registry
        )
        self.registry.register(_EngineCollector(model, engine, tiers))
        ProcessCollector(registry=self.registry)

    def answered(self, route: str, status: int) -> None:
        """Count an answer; routes are the app's own paths, so there are few."""
        self._answers.labels(route, str(status)).inc()

    def prompt(self, tokens: int) -> None:
        """Note a prompt that the engine took."""
        self._prompt.observe(tokens)

    def first_token(self, seconds: float) -> None:
        """Note when a request's first token came."""
        self._first_token.observe(seconds)

    def ended(self, reason: str, tokens: int, seconds: float, since_first: float) -> None:
        """Note a sample's end: its tokens, seconds since its request, and since its first output."""
        self._success.labels(self._model, reason).inc()
        self._whole.observe(seconds)
        self._generated.observe(tokens)
        if tokens > 1:
            self._per_token.observe(since_first / (tokens - 1))

    def gave_up(self, reason: str, samples: int) -> None:
        """Count samples whose end nobody saw; they have no times, as it was the client's choice or the engine's end."""
        if samples:
            self._success.labels(self._model, reason).inc(samples)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector:
    """Reads the engine's and the store's figures when asked, rather than at every step."""

    def __init__(self, model: str, engine: AsyncEngine, tiers: Callable[[], Mapping[str, float]] | None):
        self._model = model
        self._engine = engine
        self._tiers = tiers

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        now = engine_figures(self._engine)

        def gauge(name: str, told: str, value: float) -> Metric:
            metric = GaugeMetricFamily(name, told, labels=["model_name"])
            metric.add_metric([self._model], value)
            return metric

        def counter(name: str, told: str, value: float) -> Metric:
            metric = CounterMetricFamily(name, told, labels=["model_name"])
            metric.add_metric([self._model], value)
            return metric

        yield gauge("vllm:num_requests_running", "Samples with KV pages", now["running"])
        yield gauge("vllm:num_requests_waiting", "Requests that wait for a first token", now["waiting"])
        yield gauge(
            "vllm:kv_cache_usage_perc", "Used part of the KV cache, 0 to 1", now["kv_pages_used"] / now["kv_pages"]
        )
        yield self._adapters_in_use()
        prompt = now["prompt_tokens"] + now["prefix_hit_tokens"]
        yield counter("vllm:prompt_tokens", "Prompt tokens, cached ones included", prompt)
        yield counter("vllm:generation_tokens", "Generated tokens", now["generated_tokens"])
        yield counter("vllm:num_preemptions", "Samples that had to give up their KV", now["preemptions"])
        yield counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", prompt)
        yield counter("vllm:prefix_cache_hits", "Prompt tokens found there", now["prefix_hit_tokens"])
        yield gauge("preft_engine_ready", "1 once everything is compiled", now["ready"])
        yield counter("preft_recompiles", "Compilations after warm-up", now["recompiles"])
        yield counter("preft_device_failures", "Device calls that failed", now["device_failures"])
        yield counter("preft_prefill_seconds", "Seconds of prefill calls", now["prefill_seconds"])
        yield counter("preft_decode_seconds", "Seconds of decode calls", now["decode_seconds"])
        yield counter("preft_adapter_waits", "Adapters that a prefill had to wait for", now["adapter_waits"])
        yield counter("preft_unmarked_prompts", "Prompts without their adapter's marker", now["unmarked_prompts"])
        for name, value in bank_figures(self._engine).items():
            kind = counter if name == "device_loads" else gauge
            yield kind(f"preft_adapter_{name}", "Of the bank of rank pages", value)
        for name, value in (self._tiers() if self._tiers is not None else {}).items():
            kind = counter if name in _STORE_COUNTERS else gauge
            yield kind(f"preft_adapter_store_{name}", "See AdapterStore.tiers", value)

    def _adapters_in_use(self) -> Metric:
        """Return which adapters requests have, as routers ask vLLM: the value is the time, and the labels tell."""
        running, waiting = map(",".join, self._engine.adapters)
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        metric = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters of requests, by the time of asking", labels=labels
        )
        metric.add_metric([str(bank_figures(self._engine)["device_pages"]), running, waiting], time.time())
        return metric
