"""From the engine's outputs to the answers of OpenAI's API: choices, chunks, log-probabilities, usage."""

import dataclasses
import functools
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from serve.engine.request import Output, TokenLogprobs

_LEAST = -9999.0
"""Stands for minus infinity and for no number, which JSON has not."""


def _byte_letters() -> dict[str, int]:
    """Return the byte that each letter stands for in the vocabulary of a byte-level tokenizer (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenTexts:
    """The text and the bytes of single tokens."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._letters = _byte_letters()
        self.text = functools.lru_cache(maxsize=100_000)(self._text)

    def _text(self, token: int) -> str:
        """Return a token's text; of a part of a character it is a replacement character."""
        if self._tokenizer is None:
            return str(token)
        return self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def bytes(self, token: int) -> list[int]:
        """Return a token's bytes, of a part of a character, too."""
        text = self.text(token)
        if "\ufffd" in text and self._tokenizer is not None:
            letters = self._tokenizer.convert_ids_to_tokens(token) or ""
            if letters and all(letter in self._letters for letter in letters):
                return [self._letters[letter] for letter in letters]
        return list(text.encode())


def _number(logprob: float) -> float:
    return max(logprob, _LEAST) if logprob == logprob else _LEAST


@dataclasses.dataclass
class Sample:
    """One sample, put together from its outputs."""

    text: list[str] = dataclasses.field(default_factory=list)
    tops: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: Any = None

    def add(self, output: Output) -> None:
        """Add what a step gave."""
        self.text.append(output.text)
        self.tops += output.top_logprobs or []
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason


class Shape(Protocol):
    """How one endpoint tells its answers."""

    id: str

    def head(self, *, stream: bool) -> dict[str, Any]:
        """Return an answer without its choices."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return a stream's first choice of a sample, if it has one before any output."""
        ...

    def piece(self, index: int, output: Output) -> dict[str, Any]:
        """Return a choice of a stream."""
        ...

    def whole(self, index: int, sample: Sample) -> dict[str, Any]:
        """Return a choice of a whole answer."""
        ...


@dataclasses.dataclass
class _Shape:
    """What both endpoints have in common.

    Attributes:
        model: the name that was asked for.
        created: seconds since 1970.
        texts: of tokens.
        logprobs: how many most likely tokens are told, or None.
        prefix: of the answer's id.
    """

    model: str
    created: int
    texts: TokenTexts
    logprobs: int | None
    prefix: str = ""

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def opening(self, index: int) -> dict[str, Any] | None:
        """See ``Shape``."""
        return None


@dataclasses.dataclass
class CompletionShape(_Shape):
    """``/v1/completions``."""

    prefix: str = "cmpl"
    _offsets: dict[int, int] = dataclasses.field(default_factory=dict)

    def head(self, *, stream: bool) -> dict[str, Any]:
        """See ``Shape``."""
        return self._head("text_completion")

    def piece(self, index: int, output: Output) -> dict[str, Any]:
        """See ``Shape``."""
        return self._choice(index, output.text, output.top_logprobs or [], output)

    def whole(self, index: int, sample: Sample) -> dict[str, Any]:
        """See ``Shape``."""
        return self._choice(index, "".join(sample.text), sample.tops, sample)

    def _choice(self, index: int, text: str, tops: Sequence[TokenLogprobs], end: Output | Sample) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": None if self.logprobs is None else self._logprobs(index, tops),
            "finish_reason": end.finish_reason,
            "stop_reason": end.stop_reason,
        }

    def _logprobs(self, index: int, tops: Sequence[TokenLogprobs]) -> dict[str, Any]:
        tokens = [self.texts.text(top.token_id) for top in tops]
        offsets, at = [], self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(at)
            at += len(token)
        self._offsets[index] = at
        return {
            "tokens": tokens,
            "token_logprobs": [_number(top.logprob) for top in tops],
            "top_logprobs": [self._top(top) for top in tops],
            "text_offset": offsets,
        }

    def _top(self, top: TokenLogprobs) -> dict[str, float]:
        """Return the most likely tokens by text, with the drawn one; the likelier one of two with the same text."""
        found: dict[str, float] = {}
        for token, logprob in [*top.top.items(), (top.token_id, top.logprob)]:
            found.setdefault(self.texts.text(token), _number(logprob))
        return found


@dataclasses.dataclass
class ChatShape(_Shape):
    """``/v1/chat/completions``."""

    prefix: str = "chatcmpl"

    def head(self, *, stream: bool) -> dict[str, Any]:
        """See ``Shape``."""
        return self._head("chat.completion.chunk" if stream else "chat.completion")

    def opening(self, index: int) -> dict[str, Any] | None:
        """See ``Shape``: a chat says first who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, output: Output) -> dict[str, Any]:
        """See ``Shape``."""
        delta = {"content": output.text}
        return {"index": index, "delta": delta, **self._rest(output.top_logprobs or [], output)}

    def whole(self, index: int, sample: Sample) -> dict[str, Any]:
        """See ``Shape``."""
        message = {"role": "assistant", "content": "".join(sample.text), "refusal": None}
        return {"index": index, "message": message, **self._rest(sample.tops, sample)}

    def _rest(self, tops: Sequence[TokenLogprobs], end: Output | Sample) -> dict[str, Any]:
        content = None
        if self.logprobs is not None:
            content = {"content": [self._entry(top) for top in tops], "refusal": None}
        return {"logprobs": content, "finish_reason": end.finish_reason, "stop_reason": end.stop_reason}

    def _entry(self, top: TokenLogprobs) -> dict[str, Any]:
        likely = [self._token(token, logprob) for token, logprob in top.top.items()]
        return {**self._token(top.token_id, top.logprob), "top_logprobs": likely}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.texts.text(token), "logprob": _number(logprob), "bytes": self.texts.bytes(token)}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the usage of an answer; a prompt counts once, however many samples it has."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
