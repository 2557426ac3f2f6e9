"""Rewards of samples, computed in a process of their own: one that raises, hangs or dies costs its own sample alone."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from preft_jax.errors import ConfigError

_START_SECONDS = 120.0
"""For the process to import what the reward needs."""


class Question(NamedTuple):
    """What a reward is asked: the prompt as the task has it, the completion's text, and the task's other columns."""

    prompt: Any
    completion: str
    row: dict[str, Any]


class Reward(NamedTuple):
    """A reward, or None and the reason why there is none."""

    value: float | None
    error: str | None = None


class _LostError(Exception):
    """The process is not there any more, or does not answer in time."""


class RewardProcess:
    """Runs a reward function in a process of its own; a context manager that leaves none.

    The process finds modules where this one does, its JAX runs on the CPU, and its standard input is empty.

    Args:
        spec: ``module:function``, called as ``function(prompt, completion, **row)``; it returns a number.
        timeout: seconds for one reward; the process is ended then, and another one answers the next question.
    """

    def __init__(self, spec: str, timeout: float):
        self.spec = spec
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def __enter__(self) -> "RewardProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the process, if it does not run.

        Raises:
            ConfigError: if there is no such function.
        """
        if self._process is not None:
            return
        paths = dict.fromkeys(str(Path(path or ".").resolve()) for path in sys.path)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "train.rollouts.worker", self.spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # So that it ends with all that it has started; and no terminal interrupts it.
        )
        self._rest = b""
        try:
            ready = self._read(_START_SECONDS)
        except _LostError as error:
            self.close()
            raise ConfigError(f"the process of the reward {self.spec} does not start: {error}") from error
        if "error" in ready:
            self.close()
            raise ConfigError(
                f"the reward {self.spec} cannot be loaded: {ready['error']}; give module:function, of a module that "
                "Python finds from here"
            )

    def rewards(self, questions: Sequence[Question]) -> list[Reward]:
        """Return the reward of each question.

        Raises:
            ConfigError: if the process cannot be started again.
        """
        return [self._one(question) for question in questions]

    def _one(self, question: Question) -> Reward:
        self.start()
        try:
            self._write(json.dumps(question._asdict(), default=str).encode() + b"\n")
            answer = self._read(self._timeout)
        except _LostError as error:
            self.close()
            return Reward(None, str(error))
        return Reward(answer.get("reward"), answer.get("error"))

    def _write(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError as error:
            raise _LostError(f"its process ended: {error}") from error

    def _read(self, seconds: float) -> dict[str, Any]:
        """Return the next line of the process, within so many seconds."""
        assert self._process is not None
        assert self._process.stdout is not None
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                left = until - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise _LostError(f"it took longer than {seconds:g} s")
                read = os.read(self._process.stdout.fileno(), 1 << 16)
                if not read:
                    raise _LostError("its process ended")
                self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """End the process, and what it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        process.wait()
