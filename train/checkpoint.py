"""Checkpoints of a run: adapters, optimizer states, clocks and options, written whole or not at all.

Orbax writes each into a directory of its own that gets its name once it is complete, and deletes the oldest. A SHA-256
over every array is kept with it, and one over all the rest, so that a damaged one is known before training goes on
from it. Random numbers need no state: they follow from the seed, the micro-batch and the row.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from preft_jax.errors import PreftError
from train.step import Slots

_VERSION = 2

_log = logging.getLogger("preft.train")


class CheckpointError(PreftError):
    """A checkpoint that cannot be written or read."""


class Checkpoint(NamedTuple):
    """What a run needs to go on: ``meta`` is plain data, ``states`` has the jobs' arrays by name."""

    step: int
    meta: dict[str, Any]
    leaves: dict[str, list[np.ndarray]]

    def state(self, name: str, like: Slots) -> Slots:
        """Return a job's state in the structure of a new one's.

        Raises:
            CheckpointError: if it has another shape.
        """
        leaves, (expected, tree) = self.leaves[name], jax.tree.flatten(like)
        given = [(leaf.shape, leaf.dtype) for leaf in leaves]
        if given != [(np.shape(leaf), np.asarray(leaf).dtype) for leaf in expected]:
            raise CheckpointError(
                f"the checkpoint's adapter {name!r} has another shape than the one that is asked for; resume with the "
                "options that it was begun with, or choose another --output-dir"
            )
        return jax.tree.unflatten(tree, leaves)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: of all of them; made if it is not there.
        keep: how many stay.

    Raises:
        CheckpointError: if the directory cannot be made.
    """

    def __init__(self, directory: Path, keep: int = 2):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{directory} cannot be made: {error}; choose another --output-dir") from error
        self._directory = directory.resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, meta: Mapping[str, Any], states: Mapping[str, Slots]) -> None:
        """Write a checkpoint; the ones before stay as they are if that fails.

        Raises:
            CheckpointError: if it cannot be written.
        """
        leaves = {name: [np.asarray(leaf) for leaf in jax.tree.leaves(state)] for name, state in states.items()}
        arrays = {f"{name}/{i}": leaf for name, some in leaves.items() for i, leaf in enumerate(some)}
        arrays["nothing"] = np.zeros(1, np.int32)  # Orbax does not write nothing at all.
        known = {
            "version": _VERSION,
            "step": step,
            "counts": {name: len(some) for name, some in leaves.items()},
            "sha256": {name: _digest(some) for name, some in leaves.items()},
            "run": dict(meta),
        }
        known["checksum"] = _checksum(known)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(known)),
                force=True,
            )
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be written to {self._directory}: {error}; the one of step "
                f"{max(self.steps, default='-')} is whole. Make room, then go on with --resume"
            ) from error

    def latest(self) -> Checkpoint | None:
        """Read the newest checkpoint that is whole; None without any.

        Damaged ones that are newer are reported and deleted, so that their steps can be written again.

        Raises:
            CheckpointError: if there are some, all of them damaged.
        """
        reasons = []
        for step in reversed(self.steps):
            try:
                found = self._read(step)
            except Exception as error:
                reasons.append(f"the checkpoint of step {step} is damaged ({_short(error)})")
                _log.warning("%s", reasons[-1])
                continue
            if reasons:
                # Otherwise the run would stop when it comes to write it again.
                _log.warning("going on from step %d; the damaged ones are deleted", step)
                for damaged in [other for other in self.steps if other > step]:
                    self._manager.delete(damaged)
            return found
        if reasons:
            raise CheckpointError(
                f"no checkpoint in {self._directory} can be read: {'; '.join(reasons)}. Choose another --output-dir, "
                "or start anew with --overwrite-output-dir"
            )
        return None

    def _read(self, step: int) -> Checkpoint:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        checksum = meta.pop("checksum", None)
        if meta["version"] != _VERSION:
            raise CheckpointError(f"it is of version {meta['version']}, this program writes {_VERSION}")
        if checksum != _checksum(meta):
            raise CheckpointError("what it says of the run is not what was written")
        if meta["step"] != step:
            raise CheckpointError(f"it is the one of step {meta['step']}")
        arrays = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
        leaves = {
            name: [np.asarray(arrays[f"{name}/{i}"]) for i in range(count)] for name, count in meta["counts"].items()
        }
        for name, some in leaves.items():
            if _digest(some) != meta["sha256"][name]:
                raise CheckpointError(f"the arrays of {name!r} are not the ones that were written")
        return Checkpoint(step, meta["run"], leaves)

    def close(self) -> None:
        """Let go of the directory."""
        self._manager.close()


def latest_in(directory: Path) -> Checkpoint | None:
    """Read the newest whole checkpoint of a directory, which may not be there; see ``Checkpoints.latest``."""
    if not directory.is_dir():
        return None
    checkpoints = Checkpoints(directory)
    try:
        return checkpoints.latest()
    finally:
        checkpoints.close()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def _checksum(known: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _digest(leaves: list[np.ndarray]) -> str:
    sha = hashlib.sha256()
    for leaf in leaves:
        sha.update(f"{leaf.shape} {leaf.dtype} ".encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()
