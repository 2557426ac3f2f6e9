"""The text of an answer as a model has to generate it, told from the rendering of its chat.

For most templates that is what follows the prompt and its generation header, through the end of turn. Of others:

- Reasoning. Some templates cut ``<think>...</think>`` from every answer, the last one too, and some end the generation
  header with ``<think>`` (DeepSeek-R1-Distill does both). The answer is then the message's own text after that header;
  where it has no reasoning, the thought that the header opens is closed at once.
- No special token ends the answer. It is then the text alone, and the end of sequence has to follow it.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from preft_jax.errors import RequestError

_PLACE = "\u2402answer\u2403"
"""Stands for an answer in a rendering that is searched for it."""

_CLOSED = "</think>"

_UNKNOWN = (
    "the chat template renders the prompt differently once its answer follows it, so the answer's tokens cannot be "
    "told; give 'prompt' and 'completion' as text"
)


class AnswerText(NamedTuple):
    """An answer's text; ``ended``: whether the special token that ends a turn closes it."""

    text: str
    ended: bool


def answer_text(
    messages: Sequence[dict[str, Any]],
    render: Callable[[list[dict[str, Any]], bool], str],
    end_of_turn: Callable[[str, int], int | None],
    special_tokens: Sequence[str],
) -> AnswerText:
    """Return the text of the answer that ends a chat.

    Args:
        messages: as ``check_messages`` returns them; the last is the assistant's.
        render: from messages, and whether the header of the next answer is to follow, to text.
        end_of_turn: from a text and where an answer begins in it to where the special token ends that closes it, or
            None if there is none, or text follows it.
        special_tokens: of the tokenizer.

    Raises:
        RequestError: if the template does not tell the answer from the prompt.
    """
    header, through = render(list(messages[:-1]), True), render(list(messages), False)
    content, rendered = messages[-1]["content"], through[len(header) :]
    cut = _CLOSED in content and _squeezed(content) not in _squeezed(rendered)
    if through.startswith(header) and not cut:
        end = end_of_turn(through, len(header))
        if end is not None:
            return AnswerText(through[len(header) : end], True)
        _, after = _around(messages, render)
        blank = len(after) - len(after.rstrip())
        return AnswerText(rendered[: len(rendered) - blank], _ended(after, None, special_tokens))
    before, after = _around(messages, render)
    if not header.startswith(before) or "tool_calls" in messages[-1]:
        raise RequestError(_UNKNOWN)
    end = end_of_turn(before + after, len(before))
    after, ended = after.rstrip() if end is None else after[: end - len(before)], _ended(after, end, special_tokens)
    return AnswerText(_after_opened(content, header[len(before) :]) + after, ended)


def _around(messages: Sequence[dict[str, Any]], render: Callable[[list[dict[str, Any]], bool], str]) -> tuple[str, str]:
    """Return the rendered text before and after the content of the last message."""
    parts = render([*messages[:-1], {**messages[-1], "content": _PLACE}], False).split(_PLACE)
    if len(parts) != 2:
        raise RequestError(_UNKNOWN)
    return parts[0], parts[1]


def _ended(after: str, end: int | None, special_tokens: Sequence[str]) -> bool:
    if end is None and any(token in after for token in special_tokens):
        raise RequestError(
            "the chat template writes text behind the special token that ends an answer, so its end cannot be told; "
            "give 'prompt' and 'completion' as text"
        )
    return end is not None


def _after_opened(content: str, opened: str) -> str:
    """Return a message's text as it follows a generation header that ends with ``opened``, such as ``<think>``."""
    if not opened.strip():
        return content
    tag = re.fullmatch(r"\s*<([\w|]+)>\s*", opened)
    if tag is None:
        raise RequestError(_UNKNOWN)
    name, own = tag[1], content.lstrip()
    if own.startswith(f"<{name}>"):
        own = own.removeprefix(f"<{name}>")
        return own.removeprefix("\n") if opened.endswith("\n") else own
    return content if f"</{name}>" in content else f"\n</{name}>\n\n{content}"


def _squeezed(text: str) -> str:
    return "".join(text.split())
