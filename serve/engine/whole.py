"""What happens when something ends a call of the engine in its middle: a ``KeyboardInterrupt``, or a fault of its own.

The engine's host state is then anything. It is not repaired but made anew, by the next call: the unfinished requests
end with ``"abort"``, which says why, and new ones are served as ever.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, Protocol

from serve.engine.request import Output

INTERRUPTED = "the engine was interrupted in the middle of its work and began anew; send the request again"

Sample = tuple[int, int]
"""A request's id and a sample's index."""


class Ledger:
    """Which samples the caller knows as unfinished, by what was returned to it and nothing else.

    Attributes:
        is_whole: whether the last call of the engine came to its end.
        inside: whether a call is under way; those that it makes of the engine's own are parts of it.
    """

    def __init__(self) -> None:
        self.is_whole = True
        self.inside = False
        self._unended: dict[Sample, None] = {}
        self._given: list[Output] = []

    def opened(self, samples: Iterable[Sample]) -> None:
        """Note samples that the caller learns of by this call's end."""
        self._unended |= dict.fromkeys(samples)

    def withdrawn(self, first: int) -> None:
        """Note that the caller never learns of requests from an id on."""
        self._unended = {sample: None for sample in self._unended if sample[0] < first}

    def gives(self, outputs: list[Output]) -> None:
        """Note what this call returns, if it comes to its end."""
        self._given = outputs

    def told(self) -> None:
        """Note that the caller has what the last call returned."""
        for output in self._given:
            if output.finish_reason is not None:
                self._unended.pop((output.request_id, output.index), None)
        self._given = []

    def aborted(self) -> list[Output]:
        """Return the last outputs of all that the caller knows as unfinished; it is given nothing else."""
        self._given = []
        return [
            Output(request_id=request_id, index=index, finish_reason="abort", error=INTERRUPTED)
            for request_id, index in self._unended
        ]


class HasLedger(Protocol):
    """An engine."""

    _ledger: Ledger
    _next_id: int

    def _begin_anew(self) -> None: ...


def whole[E: HasLedger, **P, R](
    method: Callable[Concatenate[E, P], R], *, survives: bool = True
) -> Callable[Concatenate[E, P], R]:
    """Let a method begin anew after a call that was cut off, and note whether it comes to its own end.

    Args:
        method: of the engine.
        survives: whether an ``Exception`` (a request that is refused, say) leaves the engine as it was.
    """

    @functools.wraps(method)
    def call(engine: E, *args: P.args, **kwargs: P.kwargs) -> R:
        ledger = engine._ledger
        if ledger.inside:
            return method(engine, *args, **kwargs)
        if not ledger.is_whole:
            engine._begin_anew()
        ledger.told()
        first = engine._next_id
        try:
            ledger.is_whole = False
            ledger.inside = True
            result = method(engine, *args, **kwargs)
            ledger.is_whole = True
            ledger.inside = False
            return result
        except BaseException as error:
            ledger.inside = False
            ledger.is_whole = survives and isinstance(error, Exception)
            if not ledger.is_whole:
                ledger.withdrawn(first)
            raise

    return call


def whole_step[E: HasLedger, **P](
    method: Callable[Concatenate[E, P], list[Output]],
) -> Callable[Concatenate[E, P], list[Output]]:
    """``whole`` of the method that returns outputs: what goes wrong there leaves the engine's state unknown."""

    @functools.wraps(method)
    def step(engine: E, *args: Any, **kwargs: Any) -> list[Output]:
        outputs = method(engine, *args, **kwargs)
        engine._ledger.gives(outputs)
        return outputs

    return whole(step, survives=False)
