"""Latency and throughput figures of a benchmark, under vLLM's names, and what machine they were taken on.

Definitions, for a request whose tokens reach the host at times t1 ... tn after its arrival at time 0:

TTFT   time to first token, t1
TPOT   time per output token after the first, (tn - t1) / (n - 1)
ITL    inter-token latency, each t(i+1) - t(i); tokens of one device call arrive together
E2EL   end-to-end latency, tn
"""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

SCHEMA = "preft-jax/serve-bench/1"


class RequestRecord(NamedTuple):
    """One finished request: prompt tokens, and the seconds after its arrival at which each token was there."""

    prompt_len: int
    token_times: Sequence[float]


def _summary(name: str, seconds: Sequence[float]) -> dict[str, float]:
    ms = np.asarray(seconds if len(seconds) else [0.0]) * 1e3
    figures = {f"mean_{name}_ms": ms.mean(), f"median_{name}_ms": np.median(ms), f"std_{name}_ms": ms.std()}
    figures[f"p99_{name}_ms"] = np.percentile(ms, 99)
    return {key: round(float(value), 3) for key, value in figures.items()}


def summarize(records: Sequence[RequestRecord], duration: float) -> dict[str, float]:
    """Return vLLM's flat benchmark keys for finished requests that took ``duration`` seconds together."""
    output = sum(len(record.token_times) for record in records)
    prompt = sum(record.prompt_len for record in records)
    figures: dict[str, float] = {
        "completed": len(records),
        "duration": round(duration, 3),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": round(len(records) / duration, 3),
        "output_throughput": round(output / duration, 3),
        "total_token_throughput": round((prompt + output) / duration, 3),
    }
    times = [record.token_times for record in records]
    figures |= _summary("ttft", [t[0] for t in times])
    figures |= _summary("tpot", [(t[-1] - t[0]) / (len(t) - 1) for t in times if len(t) > 1])
    figures |= _summary("itl", [gap for t in times for gap in np.diff(t)])
    figures |= _summary("e2el", [t[-1] for t in times])
    return figures


def _t95(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t; beyond ten degrees of freedom an approximation good to 1%."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.5 / freedom


def paired_ratio(base_seconds: Sequence[float], other_seconds: Sequence[float]) -> dict[str, float]:
    """Return how fast the other mode is relative to base, from batches timed in turn with equal work.

    ``mean`` is the geometric mean of the batches' ratios, base over other (1 is the base's speed, less is slower);
    ``low`` and ``high`` bound it with 95% confidence (Student's t on the log ratios), absent below three batches.
    """
    base, other = np.asarray(base_seconds), np.asarray(other_seconds)
    logs = np.log(base / other)
    figures = {"mean": round(float(np.exp(logs.mean())), 4)}
    if len(base) >= 3:
        half = _t95(len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
        figures |= {
            "low": round(float(np.exp(logs.mean() - half)), 4),
            "high": round(float(np.exp(logs.mean() + half)), 4),
        }
    return figures


def environment() -> dict[str, Any]:
    """Return date, versions, device and commit of this run."""
    names = ("preft-jax", "jax", "jaxlib", "flax", "numpy", "transformers")
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in names},
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()}
        | ({"processor": _processor()} if device.platform == "cpu" else {}),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str | None:
    """Return the commit of the checkout that this file lies in, marked ``-dirty`` if it has changes.

    ``PREFT_COMMIT`` names it where the files were copied without their history; without either it is None.
    """
    if "PREFT_COMMIT" in os.environ:
        return os.environ["PREFT_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class CompileCounter:
    """Counts what JAX compiles while it is entered."""

    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.count = 0

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == self._EVENT

    def __enter__(self) -> "CompileCounter":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
