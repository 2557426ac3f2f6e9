"""From token ids to text, a token at a time: incomplete characters and possible stop texts are held back."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one sample as it grows.

    Args:
        tokenizer: a transformers fast tokenizer, or None: the text stays empty.
        stop: texts that end the sample; the earliest one found cuts it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._hold = max((len(text) - 1 for text in self._stop), default=0)
        self._text = ""
        self._sent = 0
        self.stopped: str | None = None

    def push(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Add tokens; return the new text that is certain, and how many of the tokens count.

        Fewer count than were given if a stop text is complete before the last one: ``stopped`` then names it.
        """
        if self._tokenizer is None:
            return "", len(token_ids)
        for at, token in enumerate(token_ids):
            piece = self._stream.step(self._tokenizer.backend_tokenizer, token)
            if piece:
                searched = max(0, len(self._text) - self._hold)
                self._text += piece
                if self._cut(searched):
                    return self._send(len(self._text)), at + 1
        return self._send(len(self._text) - self._hold), len(token_ids)

    def finish(self, token_ids: Sequence[int]) -> str:
        """Return the rest of the text, now that ``token_ids`` (all but an end token) are all there is."""
        if self._tokenizer is None:
            return ""
        if self.stopped is None:
            whole = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
            if whole.startswith(self._text[: self._sent]):
                self._text = whole
                self._cut(0)
        return self._send(len(self._text))

    def _cut(self, start: int) -> bool:
        found = [(at, text) for text in self._stop if (at := self._text.find(text, start)) >= 0]
        if found:
            at, self.stopped = min(found)
            self._text = self._text[:at]
        return bool(found)

    def _send(self, end: int) -> str:
        new = self._text[self._sent : end] if end > self._sent else ""
        self._sent += len(new)
        return new
