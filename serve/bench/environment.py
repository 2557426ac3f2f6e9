"""Date, versions, device and commit of a benchmark's run."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax


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
