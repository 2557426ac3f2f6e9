"""A run's options as they are kept in its directory: ``options.json``, written whole, with a checksum.

    {"model": "tiny", ..., "run": "5d0c...", "sha256": "9a31..."}

``run`` is drawn when a run begins, and its checkpoints have it too. The options lie in each checkpoint besides: where
the file is damaged, they are taken from the newest one.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from preft_jax.errors import ConfigError
from preft_jax.io.safetensors_io import write_file
from train.checkpoint import CheckpointError, latest_in

OPTIONS_FILE = "options.json"
CHECKPOINTS = "checkpoints"

_LONGEST = 2**28


class Kept(NamedTuple):
    """What a run was begun with.

    Attributes:
        given: every option's value as it was given, by name; ``jobs`` has those of each job.
        run: what its checkpoints are known by.
        said: what people are told of it.
    """

    given: dict[str, Any]
    run: str
    said: tuple[str, ...] = ()


def new_run() -> str:
    """Return what a new run's checkpoints are known by."""
    return secrets.token_hex(8)


def write_options(directory: Path, given: Mapping[str, Any], run: str) -> None:
    """Write a run's options down.

    Raises:
        ConfigError: if that is impossible; what was there is then still there.
    """
    content = {**given, "run": run}
    text = json.dumps(content | {"sha256": _checksum(content)}, indent=2) + "\n"
    write_file(directory / OPTIONS_FILE, text.encode(), error=ConfigError)


def read_options(directory: Path) -> Kept:
    """Return the options that a run was begun with, from its newest checkpoint if their file is not whole.

    Raises:
        ConfigError: if there has been none, or neither is whole.
    """
    try:
        content = _read(directory / OPTIONS_FILE)
        run = content.pop("run")
    except (OSError, ValueError, LookupError) as error:
        reason = error
    else:
        return Kept(content, run)
    try:
        found = _from_checkpoint(directory / CHECKPOINTS)
    except CheckpointError as error:
        raise ConfigError(f"{directory / OPTIONS_FILE} is not whole ({reason}), and {error}") from error
    if found is None:
        raise ConfigError(f"there is no run in {directory} to resume ({reason}); leave out --resume") from reason
    return found._replace(said=(f"{OPTIONS_FILE} is not whole ({reason}): {found.said[0]}",))


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        content = json.loads(file.read(_LONGEST))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    if content.pop("sha256", None) != _checksum(content):
        raise ValueError("it does not hold what the run wrote; give other options on the command line")
    return content


def _from_checkpoint(directory: Path) -> Kept | None:
    found = latest_in(directory)
    if found is None:
        return None
    return Kept(
        found.meta["options"], found.meta["run"], (f"the options of the checkpoint of step {found.step} count",)
    )


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
