"""Programs that can be compiled before they are called, for shapes that a rehearsal finds.

    double = Program(lambda x: 2 * x, name="double")
    with Rehearsal() as rehearsal:  # any thread
        double(jax.ShapeDtypeStruct((3,), jnp.float32))  # gives shapes, computes nothing
    rehearsal.compile()
    double(jnp.ones(3))  # calls what was compiled

A rehearsal runs the code that will call the programs, with shapes in place of arrays. So nobody has to list the shapes.
"""

import contextvars
import os
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from preft_jax.device.compiles import expected_compiles

_rehearsal: "contextvars.ContextVar[Rehearsal | None]" = contextvars.ContextVar("rehearsal", default=None)


class _Compiled(NamedTuple):
    """An executable, and the shapes of what it returns."""

    call: Any
    out: Any


class Program:
    """A jitted function. It calls what was compiled ahead for the shapes of its arguments, and else compiles as ever.

    Arrays that lie on several devices take the second way always.

    Args:
        function: to be jitted.
        name: of the program.
        static: names of arguments that are not arrays; they are given by keyword.
        donate: names of arguments whose memory may be used for results.
        options: others of ``jax.jit``.
    """

    def __init__(
        self, function: Callable[..., Any], *, name: str, static: Sequence[str] = (), donate: Sequence[str] = (),
        **options: Any,
    ):  # fmt: skip
        self.name = name
        self._jitted: Any = jax.jit(function, static_argnames=static, donate_argnames=donate, **options)
        self._compiled: dict[Hashable, _Compiled] = {}

    @property
    def num_compiled(self) -> int:
        """Shapes for which it was compiled, ahead or not."""
        return len(self._compiled) + self._jitted._cache_size()

    def __call__(self, *args: Any, **static: Any) -> Any:
        """Call it with arrays; in a rehearsal, with shapes or arrays, which returns shapes."""
        leaves, tree = jax.tree.flatten(args)
        key = tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves), tuple(sorted(static.items()))
        rehearsal = _rehearsal.get()
        if rehearsal is not None:
            return rehearsal.note(self, key, args, static)
        done = self._compiled.get(key)
        if done is None or is_spread(leaves):
            return self._jitted(*args, **static)
        return done.call(*args)


class Rehearsal:
    """Within, programs are noted with the shapes that they are called with, in this thread.

    Attributes:
        seconds: that ``compile`` took for each shape, by names of programs.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._traced: dict[tuple[Program, Hashable], Any] = {}
        self._stopped = threading.Event()
        self._token: Any = None

    def __enter__(self) -> "Rehearsal":
        self._token = _rehearsal.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _rehearsal.reset(self._token)

    @property
    def missing(self) -> list[str]:
        """Names of the noted programs that are not compiled for their shapes."""
        return [program.name for program, key in self._traced if key not in program._compiled]

    def note(self, program: Program, key: Hashable, args: Any, static: dict[str, Any]) -> Any:
        """Trace a program, unless that was done, and return the shapes of its results."""
        done = program._compiled.get(key)
        if done is not None:
            return done.out
        if (program, key) not in self._traced:
            with expected_compiles():
                self._traced[program, key] = program._jitted.trace(*args, **static)
        return shapes_of(self._traced[program, key].out_info)

    def compile(self) -> None:
        """Compile what is missing, some programs side by side; raises what the first that failed was stopped by."""
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4), "compile") as pool:
            list(pool.map(self._compile, list(self._traced)))

    def stop(self) -> None:
        """Let ``compile`` begin with no other program; any thread may call it."""
        self._stopped.set()

    def _compile(self, which: tuple[Program, Hashable]) -> None:
        program, key = which
        if self._stopped.is_set():
            raise InterruptedError("compiling was stopped")
        if key in program._compiled:
            return
        start, traced = time.perf_counter(), self._traced[which]
        with expected_compiles():
            call = traced.lower().compile()
        program._compiled[key] = _Compiled(call, shapes_of(traced.out_info))
        self.seconds.setdefault(program.name, []).append(round(time.perf_counter() - start, 3))


def shapes_of(tree: Any) -> Any:
    """Return a tree of arrays as shapes."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def is_spread(leaves: Sequence[Any]) -> bool:
    """Whether an array lies on several devices."""
    return any(isinstance(leaf, jax.Array) and leaf.sharding.num_devices > 1 for leaf in leaves)
