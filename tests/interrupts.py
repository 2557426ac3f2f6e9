"""A KeyboardInterrupt at a line of one's choice."""

import sys
from pathlib import Path

FOLDERS = tuple(str(Path(__file__).parent.parent / name) for name in ("serve", "preft_jax", "train"))


class Interrupt:
    """Raises a KeyboardInterrupt at the n-th line of the project's own code, on this thread.

    Without a number it raises none, and ``places`` are the lines that were reached, in their order.
    """

    def __init__(self, at=None):
        self.at, self.raised = at, None
        self.places = []
        self._lines = 0

    def __enter__(self):
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _call(self, frame, event, _):
        return self._line if frame.f_code.co_filename.startswith(FOLDERS) else None

    def _line(self, frame, event, _):
        if event != "line" or self.raised is not None:
            return self._line
        if self.at is None:
            self.places.append((frame.f_code.co_filename, frame.f_lineno))
        elif self._lines == self.at:
            self.raised = (frame.f_code.co_filename, frame.f_lineno)
            raise KeyboardInterrupt
        self._lines += 1
        return self._line


def moments(places, rng):
    """Return when to interrupt, so that each line of the code has its turn: the first time that it is reached, and once
    more if there are others."""
    times = {}
    for at, place in enumerate(places):
        times.setdefault(place, []).append(at)
    return sorted({at for own in times.values() for at in (own[0], int(rng.choice(own)))})
