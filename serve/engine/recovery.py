"""After a device call that failed: who runs apart from others, and who cannot be served. Plain Python, no JAX."""

import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence as Many

from serve.engine.plan import Step
from serve.engine.sequence import Sequence, Status

STRIKES = 2
"""Failures of a sequence's call alone after which it is given up."""


def format_error(error: BaseException | None) -> str:
    """Return what a request is told of a failure of the device."""
    return f"the device failed: {type(error).__name__}: {error}"


@dataclasses.dataclass
class Recovery:
    """Isolates the sequence that a call fails for: those of a failed call run apart from others, in halves.

    ``apart`` says whether somebody does; then one call at a time is under way.
    """

    apart: bool = False
    _cohorts: int = 0

    def isolate(self, steps: Many[Step]) -> Sequence | None:
        """After one of these steps failed: split their sequences; return the one that is to be given up, if any."""
        # In a call of its own, a row of a mixed call that failed must decode.
        kind = "decode" if steps[-1].kind == "mixed" else steps[-1].kind
        members = [s for step in steps for s in step.sequences if s.status is not Status.FINISHED]
        members = list(dict.fromkeys(members))
        if len(members) == 1:
            members[0].strikes += 1
            if members[0].strikes == STRIKES:
                return members[0]
        for part in (members[: len(members) // 2], members[len(members) // 2 :]):
            self._cohorts += 1
            for sequence in part:
                sequence.cohort = (kind, self._cohorts)
        self.apart = True
        return None

    def trust(self, step: Step, live: Iterable[Sequence]) -> None:
        """Let sequences whose call succeeded run with others again; of a prompt, its last chunk must have."""
        done = [chunk.sequence for chunk in step.chunks if chunk.samples] + [row.sequence for row in step.rows]
        for sequence in done:
            if sequence.cohort is not None and sequence.cohort[0] == step.kind:
                sequence.cohort, sequence.strikes = None, 0
        self.apart = self.apart and any(sequence.cohort is not None for sequence in live)
