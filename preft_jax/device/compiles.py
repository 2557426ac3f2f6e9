"""Counts compilations, which proves that nothing recompiles after warm-up."""

import contextlib
import contextvars
import logging
import threading
from collections.abc import Iterator

import jax

_log = logging.getLogger(__name__)

_expected = contextvars.ContextVar("expected", default=False)


@contextlib.contextmanager
def expected_compiles() -> Iterator[None]:
    """Within, this thread compiles what is compiled once by plan: no ``CompileCounter`` counts it."""
    token = _expected.set(True)
    try:
        yield
    finally:
        _expected.reset(token)


class CompileCounter:
    """Counts what JAX compiles while it is entered, but for ``expected_compiles``; the log names it.

    Args:
        own_thread: whether only what the thread compiles counts that enters it.
    """

    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self, *, own_thread: bool = False) -> None:
        self.count = 0
        self._own_thread = own_thread
        self._thread: int | None = None

    def successor(self) -> "CompileCounter":
        """Return one that goes on counting, for a counter that may have been cut off while it was entered."""
        new = CompileCounter(own_thread=self._own_thread)
        new.count = self.count
        return new

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        counts = not self._own_thread or threading.get_ident() == self._thread
        if event == self._EVENT and counts and not _expected.get():
            self.count += 1
            _log.warning("compiled while serving, in %.2f s: %s", duration_secs, kwargs.get("fun_name", "a program"))

    def __enter__(self) -> "CompileCounter":
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
