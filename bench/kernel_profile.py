"""Where a program's time goes on a GPU: seconds of each kernel, from JAX's profiler."""

import gzip
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from preft_jax.errors import ConfigError

KINDS = {
    "attention": ("attend_kernel", "combine_kernel"),
    "norms": ("norm_kernel", "norm_shrink_kernel", "norm_edit_part_kernel", "norm_shrink_part_kernel"),
    "rotation and cache": ("rope_kv_kernel",),
    "activation": ("silu_mul",),
    "matrix products": ("nvjet", "cutlass", "gemm", "cublas", "splitK", "gemv"),
}
"""Kinds of kernels by what their names hold; what is left is sampling and small things."""


def kind_of(name: str) -> str:
    """Return the kind of a kernel."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "the rest")


class KernelTime(NamedTuple):
    """A kernel's calls and seconds, together."""

    name: str
    calls: int
    seconds: float


def check_profiling(kernels: int) -> None:
    """Raise ``ConfigError`` if kernels are to be shown and there is no GPU to run them."""
    if kernels and jax.default_backend() != "gpu":
        raise ConfigError(f"--profile is {kernels} and needs a GPU; the default backend is {jax.default_backend()!r}")


def profile(run: Callable[[], Any]) -> tuple[list[KernelTime], float]:
    """Run once under the profiler; of several devices, the first one's kernels count.

    Returns:
        Kernels, the longest first, and the seconds between the first kernel's start and the last one's end.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event["name"] == "thread_name"
    }
    streams = {where for where, name in threads.items() if name.startswith("Stream")}
    own = min((pid for pid, _ in streams), default=None)
    found: dict[str, tuple[int, float]] = {}
    first, last = float("inf"), 0.0
    for event in events:
        if event.get("ph") != "X" or event["pid"] != own or (event["pid"], event["tid"]) not in streams:
            continue
        name = re.sub(r"_\d+$", "", event["name"])
        calls, seconds = found.get(name, (0, 0.0))
        found[name] = calls + 1, seconds + event["dur"] / 1e6
        first, last = min(first, event["ts"]), max(last, event["ts"] + event["dur"])
    times = sorted((KernelTime(name, *value) for name, value in found.items()), key=lambda one: -one.seconds)
    return times, max(0.0, (last - first) / 1e6)


def breakdown(times: Sequence[KernelTime], span: float, runs: int) -> dict[str, Any]:
    """Return, for one of so many runs, milliseconds by kind of kernel and without any, and the number of kernels."""
    kinds: dict[str, float] = {}
    for one in times:
        kinds[kind_of(one.name)] = kinds.get(kind_of(one.name), 0.0) + one.seconds
    return {
        "kinds_ms": {kind: round(1e3 * seconds / runs, 3) for kind, seconds in kinds.items()},
        "idle_ms": round(1e3 * (span - sum(kinds.values())) / runs, 3),
        "kernels": round(sum(one.calls for one in times) / runs),
    }


def print_kernels(times: Sequence[KernelTime], runs: int, console: Console) -> None:
    """Print kernels, a line each."""
    for one in times:
        line = f"  {1e6 * one.seconds / runs:9.1f} us in {one.calls / runs:6.1f} calls: {one.name[:120]}"
        console.print(line, soft_wrap=True, highlight=False)
