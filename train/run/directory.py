"""A run's directory: what lies where in it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preft_jax.errors import ConfigError
from train.run.kept import CHECKPOINTS, OPTIONS_FILE, write_options

_METRICS = "metrics.jsonl"
_PICTURE = "loss.png"
_RESERVED = (
    "adapter", CHECKPOINTS, _METRICS, _PICTURE, OPTIONS_FILE, "tensorboard", "wandb", "reward.png", "results.json",
    "transcripts.txt",
)  # fmt: skip


class RunDirectory:
    """The directory of one run.

    Args:
        path: of the directory.
        names: of the jobs.
        named: whether each job has a directory of its name in it.
        picture: name of the picture that the run draws.

    Raises:
        ConfigError: if a job has a name that the run needs for itself.
    """

    def __init__(self, path: Path, names: Sequence[str], *, named: bool, picture: str = _PICTURE):
        taken = next((name for name in names if named and name in _RESERVED), None)
        if taken is not None:
            raise ConfigError(f"a job has the name {taken!r}, which the run uses itself; give it another")
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self.metrics = path / _METRICS
        self.picture = path / picture
        self._names = names
        self._named = named

    def adapter(self, name: str) -> Path:
        """Return where a job's adapter goes."""
        return self.path / (name if self._named else "") / "adapter"

    def prepare(self, *, resume: bool, overwrite: bool) -> None:
        """Make the directory; what another run has left there is deleted if it is to be overwritten.

        Raises:
            ConfigError: if it holds another run that is neither resumed nor overwritten, or cannot be made.
        """
        if not resume and ((self.path / OPTIONS_FILE).exists() or any(self.checkpoints.glob("[0-9]*"))):
            if not overwrite:
                raise ConfigError(
                    f"{self.path} holds a run; go on with --resume, begin anew with --overwrite-output-dir, or choose "
                    "another --output-dir"
                )
            for old in (self.checkpoints, *map(self.adapter, self._names)):
                shutil.rmtree(old, ignore_errors=True)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error}; choose another --output-dir") from error

    def write_options(self, given: Mapping[str, Any], run: str) -> None:
        """Write the options down: a resumed run inherits them."""
        write_options(self.path, given, run)
