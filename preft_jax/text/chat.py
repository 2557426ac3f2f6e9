"""From what a user sends (text, token ids or chat messages) to prompt tokens and the spans that earlier answers occupy.

An answer's span runs from after its generation header (``<|im_start|>assistant\\n``) through its end-of-turn token.
Chats are tokenised piece by piece, so that every span begins and ends at a token boundary: the tokens of an earlier
answer are then the ones that were generated, wherever the text alone would have been split otherwise. Training and
serving share this.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from preft_jax.errors import RequestError, did_you_mean, reject_unknown, shown

ROLES = ("system", "user", "assistant")

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as tokens.

    Attributes:
        token_ids: the tokens, at least one.
        unedited_spans: half-open token spans of earlier answers, for adapters that skip them; empty if there are none,
            and ``None`` if the chat template does not say where they are because it rewrites earlier turns.
    """

    token_ids: list[int]
    unedited_spans: tuple[Span, ...] | None


def encode_prompt(
    tokenizer: Any,
    prompt: str | Sequence[int] | Sequence[Mapping[str, Any]],
    *,
    vocab_size: int,
    add_generation_prompt: bool = True,
) -> EncodedPrompt:
    """Turn a prompt of any kind into tokens.

    Args:
        tokenizer: the model's tokenizer, or ``None`` if it has none (token ids only).
        prompt: text, which gets the tokens that the tokenizer adds to every text (BOS); token ids, taken as they are;
            or chat messages, see ``render_chat``.
        vocab_size: of the model; token ids are below it.
        add_generation_prompt: for chats, end with the header of the next answer.

    Raises:
        RequestError: for an empty prompt, one of another kind, or a token id outside the vocabulary.
    """
    if hasattr(prompt, "__array__"):  # Of NumPy, JAX or torch.
        prompt = _listed(np.asarray(prompt))
    if isinstance(prompt, str):
        encoded = EncodedPrompt(encode_text(_require(tokenizer), prompt, add_special_tokens=True), ())
    elif isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise RequestError(f"a prompt of type {type(prompt).__name__} is not allowed; give text, token ids or messages")
    elif len(prompt) and all(isinstance(item, Mapping) for item in prompt):
        encoded = render_chat(_require(tokenizer), prompt, add_generation_prompt=add_generation_prompt)
    else:
        encoded = EncodedPrompt([_token_id(item) for item in prompt], ())
    if not encoded.token_ids:
        raise RequestError("the prompt is empty; give at least one token")
    outside = next((token for token in encoded.token_ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise RequestError(f"token id {outside} is outside the model's vocabulary; allowed: 0 to {vocab_size - 1}")
    return encoded


def _listed(array: np.ndarray) -> list[Any]:
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise RequestError(
            f"a prompt is an array of {array.dtype} of the shape {list(array.shape)}; token ids are integers [P]"
        )
    return array.tolist()


def _require(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise RequestError("this model has no tokenizer; give the prompt as token ids")
    return tokenizer


def _token_id(item: Any) -> int:
    if isinstance(item, bool) or not isinstance(item, int | np.integer):
        raise RequestError(
            f"the prompt holds {shown(item)}; a sequence of token ids holds integers only, one of messages dicts only"
        )
    return int(item)


def encode_text(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    """Return a text's tokens, with or without those that the tokenizer adds to every text.

    Raises:
        RequestError: if the text is no valid Unicode.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except (TypeError, UnicodeError) as error:
        raise RequestError(f"the prompt is not valid Unicode text: {error}") from error


def check_messages(messages: Any) -> list[dict[str, str]]:
    """Return chat messages as plain dicts of ``role`` and ``content``.

    Raises:
        RequestError: naming the message and the field, if there are no messages, or one lacks a field, has an unknown
            one, a role that is not in ``ROLES``, or content that is not text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(
            f"messages is {shown(messages)}; give a list of at least one {{'role': ..., 'content': ...}}"
        )
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{where} is {shown(message)}; give a dict with 'role' and 'content'")
        reject_unknown(map(str, message), ("role", "content"), what=f"field of {where}", error=RequestError)
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise RequestError(f"{where}[{field!r}] is {shown(message.get(field))}; give a string")
        role = message["role"]
        if role not in ROLES:
            raise RequestError(
                f"{where} has the unknown role {shown(role)}{did_you_mean(role, ROLES)}; allowed: {', '.join(ROLES)}"
            )
        checked.append({"role": role, "content": message["content"]})
    return checked


def render_chat(tokenizer: Any, messages: Any, *, add_generation_prompt: bool = True) -> EncodedPrompt:
    """Render chat messages with the tokenizer's template and tokenise them.

    Where each answer lies is found by rendering the messages before it: their text with a generation header must begin
    the whole text. Templates for which it does not (some drop earlier answers' reasoning) are tokenised in one piece
    and have ``unedited_spans`` ``None``.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: dicts of ``role`` (``system``, ``user``, ``assistant``) and ``content``, at least one.
        add_generation_prompt: end with the header of the next answer.

    Raises:
        RequestError: if there is no template, a message is malformed, or the template refuses the conversation.
    """
    messages = check_messages(messages)
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            "the model's tokenizer has no chat template; give the prompt as text, or load an instruction-tuned model"
        )
    try:
        text = _render(tokenizer, messages, add_generation_prompt)
    except (jinja2.TemplateError, ValueError) as error:
        raise RequestError(f"the model's chat template refuses these messages: {error}") from error
    answers = _answer_extents(tokenizer, messages, text)
    if answers is None:
        return EncodedPrompt(encode_text(tokenizer, text, add_special_tokens=False), None)
    return _encode_pieces(tokenizer, text, answers)


def encode_answer(tokenizer: Any, messages: Any) -> tuple[EncodedPrompt, list[int]]:
    """Tokenise a chat that ends with an answer: the prompt as serving does, and the answer through its end of turn.

    Raises:
        RequestError: as ``render_chat``; if the last message is no answer, or nothing precedes it, or the template
            renders a prompt differently once the answer follows it.
    """
    messages = check_messages(messages)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise RequestError("the last message must be the assistant's, and others must precede it")
    prompt = render_chat(tokenizer, messages[:-1])
    header = _render(tokenizer, messages[:-1], True)
    try:
        through = _render(tokenizer, messages, False)
    except (jinja2.TemplateError, ValueError) as error:
        raise RequestError(f"the model's chat template refuses these messages: {error}") from error
    end = _end_of_turn(tokenizer, through, len(header))
    if not through.startswith(header) or end is None:
        raise RequestError(
            "the chat template renders the prompt differently once its answer follows it, or ends the answer without a "
            "special token, so the answer's tokens cannot be told; give 'prompt' and 'completion' as text"
        )
    return prompt, encode_text(tokenizer, through[len(header) : end], add_special_tokens=False)


def _render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def _answer_extents(tokenizer: Any, messages: list[dict[str, str]], text: str) -> list[Span] | None:
    """Return the character extent of each answer in ``text``, or ``None`` if the template is not prefix-stable."""
    extents = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            through = _render(tokenizer, messages[: index + 1], False)
            start = _header_end(tokenizer, messages[: index + 1], through)
        except (jinja2.TemplateError, ValueError):
            return None
        end = _end_of_turn(tokenizer, through, start) if start is not None else None
        if start is None or end is None or not text.startswith(through):
            return None
        extents.append((start, end))
    return extents


def _header_end(tokenizer: Any, messages: list[dict[str, str]], through: str) -> int | None:
    """Return where the answer that ends ``messages``, whose text is ``through``, begins."""
    if len(messages) > 1:
        header = _render(tokenizer, messages[:-1], True)
        return len(header) if through.startswith(header) else None
    # Nothing precedes the answer, and templates do not render nothing: look for the header of the answer after it.
    header = _render(tokenizer, messages, True).removeprefix(through)
    at = through.find(header) if header else -1
    return at + len(header) if at >= 0 else None


def _end_of_turn(tokenizer: Any, text: str, start: int) -> int | None:
    """Return where the last special token of ``text[start:]`` ends; only space may follow it."""
    ends = [text.rfind(token, start) + len(token) for token in _special_tokens(tokenizer) if token in text[start:]]
    end = max(ends, default=None)
    return end if end is not None and not text[end:].strip() else None


def _special_tokens(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _encode_pieces(tokenizer: Any, text: str, answers: list[Span]) -> EncodedPrompt:
    """Tokenise the text between answers and the answers one by one, and return the answers' token spans."""
    token_ids: list[int] = []
    spans: list[Span] = []
    done = 0
    for start, end in answers:
        token_ids += encode_text(tokenizer, text[done:start], add_special_tokens=False)
        first = len(token_ids)
        token_ids += encode_text(tokenizer, text[start:end], add_special_tokens=False)
        spans.append((first, len(token_ids)))
        done = end
    token_ids += encode_text(tokenizer, text[done:], add_special_tokens=False)
    whole = encode_text(tokenizer, text, add_special_tokens=False)
    if token_ids != whole and _decode(tokenizer, token_ids) != _decode(tokenizer, whole):
        # A tokenizer that marks the beginning of a text (SentencePiece's space) would mark the beginning of each piece.
        return EncodedPrompt(whole, None)
    return EncodedPrompt(token_ids, tuple(spans))


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
