"""Compiled programs by name: each is compiled once, when it is first asked for or with all others."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from preft_jax.device.compiles import expected_compiles


class _Compiled(NamedTuple):
    """A compiled program, and the seconds that lowering and compiling took."""

    program: Any
    seconds: float


_shared: dict[Any, dict[str, _Compiled]] = {}
"""Compiled programs by everything that their shapes depend on, then by name."""


class Programs(Mapping[str, Any]):
    """Programs by name. Looking one up compiles it, unless that was done.

        programs = Programs({"add": lambda: jax.jit(add).trace(a, b)}, key="add")
        programs["add"](a, b)

    Args:
        traces: for each name a function that traces the program (``jax.jit(...).trace(...)``).
        key: hashable; programs of one key are compiled once in a process. They must not differ.
        options: of the compiler, for all of them.
    """

    def __init__(
        self, traces: Mapping[str, Callable[[], Any]], *, key: Any, options: Mapping[str, Any] | None = None
    ) -> None:
        self._traces = dict(traces)
        self._options = options
        self._compiled = _shared.setdefault(key, {})
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Any:
        done = self._compiled.get(name)
        if done is None:
            with self._lock:
                done = self._compiled.get(name) or self._compile(name, self.trace(name))
        return done.program

    def __iter__(self) -> Iterator[str]:
        return iter(self._traces)

    def __len__(self) -> int:
        return len(self._traces)

    def __contains__(self, name: object) -> bool:
        return name in self._traces

    @property
    def missing(self) -> list[str]:
        """Names of the programs that are not compiled yet."""
        return [name for name in self._traces if name not in self._compiled]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each compiled program took to lower and compile."""
        return {name: round(done.seconds, 3) for name, done in self._compiled.items() if name in self._traces}

    def compile_missing(self) -> None:
        """Compile the programs that are not compiled yet, side by side, and each while the next ones are traced.

        Lowering compiles their kernels, and so it is not left to the thread that traces.
        """
        with ThreadPoolExecutor() as pool:
            compiling = [pool.submit(self._compile, name, self.trace(name)) for name in self.missing]
        for one in compiling:
            one.result()

    def trace(self, name: str) -> Any:
        """Trace a program anew."""
        with expected_compiles():
            return self._traces[name]()

    def _compile(self, name: str, traced: Any) -> _Compiled:
        start = time.perf_counter()
        with expected_compiles():
            program = traced.lower().compile(self._options)
        done = self._compiled[name] = _Compiled(program, time.perf_counter() - start)
        return done
