"""Sends a run's numbers on to TensorBoard or wandb, each job's under its name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from preft_jax.errors import ConfigError

REPORTERS = ("tensorboard", "wandb")

_FLUSH_SECONDS = 1


class Reporter(Protocol):
    """Takes scalars."""

    def report(self, job: str, step: int, values: Mapping[str, float]) -> None:
        """Send a job's values after so many of its updates."""
        ...

    def close(self, *, failed: bool) -> None:
        """Send what is left; ``failed`` says that the run ends before its end."""
        ...


def make_reporters(names: Sequence[str], directory: Path, run_name: str) -> list[Reporter]:
    """Return reporters by name.

    Raises:
        ConfigError: for a name that is not known, or a package that is not installed.
    """
    made: list[Reporter] = []
    for name in names:
        if name not in REPORTERS:
            raise ConfigError(f"--report-to has {name!r}; allowed: {', '.join(REPORTERS)}")
        made.append(_TensorBoard(directory) if name == "tensorboard" else _Wandb(directory, run_name))
    return made


class _TensorBoard:
    def __init__(self, directory: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"--report-to tensorboard needs tensorboardX ({error}); pip install 'preft-jax[train]'"
            ) from error
        # Its flush does not wait for what its thread has not written yet; the thread's own does not need to.
        self._writer = SummaryWriter(str(directory / "tensorboard"), flush_secs=_FLUSH_SECONDS)

    def report(self, job: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{job}/{name}", value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, directory: Path, run_name: str):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(f"--report-to wandb needs wandb ({error}); pip install wandb") from error
        self._run: Any = wandb.init(project="preft-jax", name=run_name, dir=str(directory))
        self._jobs: set[str] = set()

    def report(self, job: str, step: int, values: Mapping[str, float]) -> None:
        # Jobs have clocks of their own, and wandb's must never go back.
        clock = f"{job}/step"
        if job not in self._jobs:
            self._jobs.add(job)
            self._run.define_metric(f"{job}/*", step_metric=clock)
        self._run.log({f"{job}/{name}": value for name, value in values.items()} | {clock: step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
