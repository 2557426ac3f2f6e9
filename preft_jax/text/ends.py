"""Which tokens end an answer: one rule for what serving stops at and what training teaches to stop at."""

import dataclasses
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import jinja2

from preft_jax.errors import ModelError

_log = logging.getLogger("preft.models")

_ANSWER = "Answerwords"
_CHAT = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": _ANSWER}]
_CHATS = (_CHAT, [{"role": "system", "content": "System"}, *_CHAT])
"""Conversations that a template is tried with; some refuse one without a system message."""


@dataclasses.dataclass(frozen=True)
class TurnEnd:
    """How a chat template ends an answer.

    Attributes:
        token: the special (or otherwise added) token that ends it.
        token_id: its id.
        tail: what the template puts behind an answer that is the last message, from the end of its content on.
    """

    token: str
    token_id: int
    tail: str

    def end_in(self, text: str, start: int) -> int | None:
        """Return where the answer that begins at ``start`` and ends ``text`` is over, its end token included."""
        if len(text) - len(self.tail) >= start and text.endswith(self.tail):
            return len(text) - len(self.tail) + self.tail.index(self.token) + len(self.token)
        at = text.rfind(self.token, start)
        return at + len(self.token) if at >= 0 else None


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the tokens that are matched in a text before it is split, with their ids."""
    return {entry.content: token for token, entry in tokenizer.added_tokens_decoder.items()}


def first_token(text: str, tokens: Sequence[str]) -> str | None:
    """Return the token that stands first in a text, the longest of those that begin there; None: there is none."""
    found = [(text.find(token), -len(token), token) for token in tokens if token and token in text]
    return min(found)[2] if found else None


_known: weakref.WeakKeyDictionary[Any, tuple[Any, TurnEnd | None]] = weakref.WeakKeyDictionary()


def turn_end(tokenizer: Any) -> TurnEnd | None:
    """Return how the tokenizer's chat template ends an answer, found by rendering one.

    None: there is no template, it refuses a question with an answer, or no added token follows the answer.

    Raises:
        jinja2.TemplateSyntaxError: if the template is none.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    if tokenizer not in _known or _known[tokenizer][0] != template:
        _known[tokenizer] = (template, _find(tokenizer))
    return _known[tokenizer][1]


def _find(tokenizer: Any) -> TurnEnd | None:
    tokens, refused = added_tokens(tokenizer), None
    for chat in _CHATS:
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
        except jinja2.TemplateSyntaxError:
            raise
        except Exception as error:
            refused = error  # Templates are programs: this one does not take such a chat.
            continue
        _, found, tail = text.rpartition(_ANSWER)
        token = first_token(tail, tuple(tokens)) if found else None
        if token is not None:
            return TurnEnd(token, tokens[token], tail)
    if refused is not None:
        _log.warning(
            "the chat template refuses a question with its answer (%s): what ends a turn is not known", refused
        )
    return None


def end_token_ids(configured: Sequence[int], tokenizer: Any, vocab_size: int, where: str) -> tuple[int, ...]:
    """Return the ids of the tokens that end an answer, those of the configuration first.

    Args:
        configured: ``eos_token_id`` of the model's configurations (``config.json`` and ``generation_config.json``, or
            a GGUF file's metadata).
        tokenizer: of the model, or None. Its ``eos_token`` ends an answer, and the token with which its chat template
            ends one: a chat fine-tune often has a base model's configuration.
        vocab_size: of the model. What is not below it cannot be generated, and is left out with a warning.
        where: the model, for errors.

    Raises:
        ModelError: if the chat template is not a template.
    """
    ids = list(configured)
    if tokenizer is not None:
        if not isinstance(template := getattr(tokenizer, "chat_template", None) or "", str | dict):
            raise ModelError(f"{where} has a chat template of type {type(template).__name__}; text is expected")
        try:
            turn = turn_end(tokenizer)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"{where} has a chat template that cannot be read (line {error.lineno}: {error.message}); restore it, "
                "or remove it to use the model without chats"
            ) from error
        ids += [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
        ids += [] if turn is None else [turn.token_id]
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        _log.warning(
            "%s names the end token %d and has a vocabulary of %d: it can never be generated, and is left out",
            where, outside[0], vocab_size,
        )  # fmt: skip
    return tuple(dict.fromkeys(token for token in ids if token not in outside))


def through_end(token_ids: Sequence[int], ends: Sequence[int]) -> int:
    """Return how many tokens of an answer there are through the first that ends it: nothing behind it is ever said."""
    return next((at + 1 for at, token in enumerate(token_ids) if token in ends), len(token_ids))
