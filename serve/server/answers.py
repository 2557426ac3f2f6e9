"""From the engine's outputs to the answers of OpenAI's API: choices, chunks, log-probabilities, usage."""

import dataclasses
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from preft_jax.text.detokenizer import Detokenizer, Places, detokenizer_of
from serve.engine.request import Output, TokenLogprobs

_LEAST = -9999.0
"""Stands for minus infinity and for no number, which JSON has not."""


class TokenTexts:
    """The text and the bytes of single tokens, as they stand in the middle of a text.

    Args:
        tokenizer: of the model; without one a token is told by its id, and has no bytes.
    """

    def __init__(self, tokenizer: Any):
        self._tokens: Detokenizer | None = None if tokenizer is None else detokenizer_of(tokenizer)

    def text(self, token: int) -> str:
        """Return a token's text; of a part of a character it is a replacement character."""
        return str(token) if self._tokens is None else self._tokens.text(token)

    def bytes(self, token: int) -> list[int]:
        """Return a token's bytes, of a part of a character, too; those of tokens that are shown join to the text."""
        return list(str(token).encode() if self._tokens is None else self._tokens.bytes(token))

    def places(self) -> Callable[[int], int]:
        """Return what tells of one token after the other where it begins in the text that they make."""
        return (lambda token: 0) if self._tokens is None else Places(self._tokens).add


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
    _places: dict[int, Callable[[int], int]] = dataclasses.field(default_factory=dict)

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
        place = self._places.setdefault(index, self.texts.places())
        return {
            "tokens": [self.texts.text(top.token_id) for top in tops],
            "token_logprobs": [_number(top.logprob) for top in tops],
            "top_logprobs": [self._top(top) for top in tops],
            "text_offset": [place(top.token_id) for top in tops],
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
