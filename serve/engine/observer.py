"""What can be watched in an engine, and where a failure of the device can be played."""

from collections.abc import Sequence as Many
from typing import Any

from serve.engine.plan import Step
from serve.engine.sequence import Sequence


class Observer:
    """Told what an engine does; every method does nothing. Give one as ``Engine(..., observer=...)``.

        class Count(Observer):
            def started(self, step, under_way):
                self.calls += 1

    What ``calling``, ``copying``, ``writing`` and ``collecting`` raise counts as a failure of the device there.
    """

    def planned(self, step: Step) -> None:
        """A prefill step was planned behind two others, and is started once the oldest is over."""

    def started(self, step: Step, under_way: Many[Step]) -> None:
        """A step was started behind those under way, oldest first."""

    def calling(self, operation: str, sequences: Many[Sequence]) -> None:
        """A program is about to be called for sequences: prefill, score, mixed, decode, decode_adapted, draw,
        copy_pages, write_prefix, put_pages, or take_pages.
        """

    def copying(self, digests: Many[str]) -> None:
        """Adapters are about to be copied to the device."""

    def writing(self, digests: Many[str]) -> None:
        """Adapters are about to be written to the bank."""

    def collecting(self, step: Step) -> None:
        """The results of a step are about to be fetched."""

    def collected(self, sequences: Many[Sequence], drawn: Any) -> Any:
        """What sequences drew is on the host (``Drawn`` of NumPy arrays); what is returned is taken for it."""
        return drawn
