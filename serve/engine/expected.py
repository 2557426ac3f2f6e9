"""KV pages that prompts under way are about to fill: who needs them waits for them and does not compute them too.

Prompts over one context come together: the first is prefilled, and the others find its pages. No JAX.
"""

from serve.engine.pages import PageManager
from serve.engine.sequence import Sequence, Status


class Expected:
    """Which prompt under way will fill the page of a key, and who waits for it.

    Args:
        pages: the book of those that are full already.
    """

    def __init__(self, pages: PageManager) -> None:
        self._pages = pages
        self._of: dict[bytes, tuple[Sequence, int]] = {}

    def __len__(self) -> int:
        return len(self._of)

    def add(self, sequence: Sequence) -> None:
        """Note that a sequence has pages and computes its tokens from now on."""
        for at, key in enumerate(_keys(sequence)):
            if at >= sequence.registered:
                self._of.setdefault(key, (sequence, at))

    def remove(self, sequence: Sequence) -> None:
        """Note that a sequence computes no more pages that others could wait for."""
        for key in _keys(sequence) if sequence.pages else ():
            if self._of.get(key, (None, 0))[0] is sequence:
                del self._of[key]

    def clear(self) -> None:
        """Note that nobody computes anything."""
        self._of.clear()

    def holds_up(self, sequence: Sequence) -> bool:
        """Whether a sequence of the queue waits: half or more of what it would compute is expected of another one."""
        if sequence.awaits is not None and _is_coming(*sequence.awaits):
            return True
        sequence.awaits = None
        if not self._of or sequence.score or sequence.given:
            return False
        keys = _keys(sequence)
        end = found = len(self._pages.match(keys))
        while end < len(keys) and keys[end] in self._of and _is_coming(*self._of[keys[end]]):
            end += 1
        size = self._pages.page_size
        if end == found or 2 * (end - found) * size < len(sequence.tokens) - found * size:
            return False
        sequence.awaits = self._of[keys[end - 1]]
        return True


def _keys(sequence: Sequence) -> list[bytes]:
    """Return the keys of the pages that others can find: the last token is always computed."""
    return sequence.page_keys(len(sequence.tokens) - 1)


def _is_coming(leader: Sequence, at: int) -> bool:
    return leader.registered <= at and leader.status in (Status.PREFILLING, Status.RUNNING)
