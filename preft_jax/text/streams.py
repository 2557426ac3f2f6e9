"""From token ids to text, a token at a time: incomplete characters and possible stop texts are held back."""

import bisect
from collections.abc import Sequence
from typing import Any

from preft_jax.text.detokenizer import Detokenizer, detokenizer_of


class TextStream:
    """The text of one sample as it grows: what the tokenizer decodes of its tokens, special ones left out.

    Special tokens are not shown, but stop texts that hold one are looked for where it would stand.

    Args:
        tokenizer: a transformers fast tokenizer, or None: the text stays empty.
        stop: texts that end the sample; the earliest one found cuts it.
        continues: whether it stands behind another text, as an answer behind its prompt: then a space that begins it
            stays, which the tokenizer drops at the beginning of a text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, continues: bool = False):
        self._tokens: Detokenizer | None = None if tokenizer is None else detokenizer_of(tokenizer)
        self._growing = None if self._tokens is None else self._tokens.begin(continues=continues)
        holding = [text for text in stop if self._tokens is not None and self._tokens.holds_special(text)]
        self._shown = _Searched([text for text in stop if text not in holding])
        self._full = _Searched(holding)
        self._unseen: list[tuple[int, int, int]] = []  # Special tokens in the full text, and in the shown.
        self._sent = 0
        self.stopped: str | None = None

    def push(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Add tokens; return the new text that is certain, and how many of the tokens count.

        Fewer count than were given if a stop text is complete before the last one: ``stopped`` then names it.
        """
        if self._growing is None:
            return "", len(token_ids)
        for at, token in enumerate(token_ids):
            if self._add(self._growing.push(token)) or self._add_special(token):
                return self._send(len(self._shown.text)), at + 1
        return self._send(self._certain()), len(token_ids)

    def finish(self, end: int | None = None) -> str:
        """Return the rest of the text, now that no token follows but an end token, which is not shown."""
        if self._growing is not None and self.stopped is None and not self._add(self._growing.finish()):
            self._add_special(end)
        return self._send(len(self._shown.text))

    def _add(self, text: str) -> bool:
        """Add text; return whether it completes a stop text, which is cut off then."""
        if not text:
            return False
        self._shown.add(text)
        if self._full.stops:
            self._full.add(text)
        return self._cut()

    def _add_special(self, token: int | None) -> bool:
        if not self._full.stops or self._tokens is None or token not in self._tokens.special:
            return False
        start = len(self._full.text)
        self._full.add(self._tokens.special[token])
        self._unseen.append((start, len(self._full.text), len(self._shown.text)))
        return self._cut()

    def _cut(self) -> bool:
        found = self._shown.found() + [(self._place(at), text) for at, text in self._full.found()]
        if found:
            at, self.stopped = min(found)
            self._shown.text = self._shown.text[:at]
        return bool(found)

    def _place(self, at: int) -> int:
        """Return the place in the shown text of one in the full text."""
        before = bisect.bisect_left(self._unseen, (at,)) - 1
        if before < 0:
            return at
        _, end, place = self._unseen[before]
        return place + max(0, at - end)

    def _certain(self) -> int:
        """Return the end of the text that no stop text can take back."""
        end = len(self._shown.text) - self._shown.hold
        return min(end, self._place(max(0, len(self._full.text) - self._full.hold))) if self._full.stops else end

    def _send(self, end: int) -> str:
        new = self._shown.text[self._sent : end] if end > self._sent else ""
        self._sent += len(new)
        return new


class _Searched:
    """A growing text and the stop texts that are looked for in it.

    Attributes:
        hold: characters at its end that may yet become a part of one.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        self.hold = max((len(text) - 1 for text in self.stops), default=0)
        self.text = ""
        self._new = 0

    def add(self, text: str) -> None:
        self._new = max(0, len(self.text) - self.hold)
        self.text += text

    def found(self) -> list[tuple[int, str]]:
        """Return the stop texts that what was added last completes, with where each begins."""
        return [(at, text) for text in self.stops if (at := self.text.find(text, self._new)) >= 0]
