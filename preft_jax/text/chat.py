"""From what a user sends (text, token ids or chat messages) to prompt tokens and the spans that earlier answers occupy.

An answer's span runs from after its generation header (``<|im_start|>assistant\\n``) through its end-of-turn token.
Chats are tokenised part by part (``text.encoding``), so that every span begins and ends at a token boundary: the tokens
of an earlier answer are then the ones that were generated, wherever the text alone would have been split otherwise.
Training and serving share this.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preft_jax.errors import RequestError
from preft_jax.text.answers import answer_text
from preft_jax.text.detokenizer import detokenizer_of
from preft_jax.text.encoding import encode_after, encode_parts, encode_text, with_begin_tokens
from preft_jax.text.ends import turn_end
from preft_jax.text.messages import check_messages, check_tools
from preft_jax.text.tool_chat import with_tools

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
    add_special_tokens: bool | None = None,
) -> EncodedPrompt:
    """Turn a prompt of any kind into tokens.

    Args:
        tokenizer: the model's tokenizer, or ``None`` if it has none (token ids only).
        prompt: text; token ids, taken as they are; or chat messages, see ``render_chat``.
        vocab_size: of the model; token ids are below it.
        add_generation_prompt: for chats, end with the header of the next answer.
        add_special_tokens: put the tokens before it that the tokenizer puts before every text (BOS), unless it begins
            with them. By default text gets them and a chat does not, whose template writes them. What a tokenizer puts
            behind every text (EOS) is never added: a prompt is to go on.

    Raises:
        RequestError: for an empty prompt, one of another kind, or a token id outside the vocabulary.
    """
    if isinstance(prompt, str):
        encoded = _begin(
            tokenizer, EncodedPrompt(encode_text(_require(tokenizer), prompt), ()), add_special_tokens is not False
        )
    elif isinstance(prompt, bytes) or not isinstance(prompt, Sequence | np.ndarray):
        raise RequestError(f"a prompt of type {type(prompt).__name__} is not allowed; give text, token ids or messages")
    elif len(prompt) and all(isinstance(item, Mapping) for item in prompt):
        rendered = render_chat(_require(tokenizer), prompt, add_generation_prompt=add_generation_prompt)
        encoded = _begin(tokenizer, rendered, bool(add_special_tokens))
    else:
        encoded = EncodedPrompt([_token_id(item) for item in prompt], ())
    if not encoded.token_ids:
        raise RequestError("the prompt is empty; give at least one token")
    outside = next((token for token in encoded.token_ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise RequestError(f"token id {outside} is outside the model's vocabulary; allowed: 0 to {vocab_size - 1}")
    return encoded


def _begin(tokenizer: Any, prompt: EncodedPrompt, add_special_tokens: bool) -> EncodedPrompt:
    """Put the tokens before a prompt that begin every text."""
    if not add_special_tokens:
        return prompt
    token_ids = with_begin_tokens(tokenizer, prompt.token_ids)
    more, spans = len(token_ids) - len(prompt.token_ids), prompt.unedited_spans
    moved = None if spans is None else tuple((start + more, end + more) for start, end in spans)
    return EncodedPrompt(token_ids, moved)


def _require(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise RequestError("this model has no tokenizer; give the prompt as token ids")
    return tokenizer


def _token_id(item: Any) -> int:
    if isinstance(item, bool) or not isinstance(item, int | np.integer):
        raise RequestError(
            f"the prompt holds {item!r}; a sequence of token ids holds integers only, and one of messages dicts only"
        )
    return int(item)


def render_chat(
    tokenizer: Any, messages: Any, *, tools: Any = None, add_generation_prompt: bool = True
) -> EncodedPrompt:
    """Render chat messages with the tokenizer's template and tokenise them.

    Where each answer lies is found by rendering the messages before it: their text with a generation header must begin
    the whole text. Templates for which it does not (some drop earlier answers' reasoning) are tokenised in one piece
    and have ``unedited_spans`` ``None``.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: dicts of ``role`` and ``content``, at least one; see ``check_messages``.
        tools: descriptions of tools for the template, see ``check_tools``.
        add_generation_prompt: end with the header of the next answer.

    Raises:
        RequestError: if there is no template, a message is malformed, or the template refuses the conversation or
            does not render its tools.
    """
    messages = check_messages(messages)
    tokenizer = with_tools(_require_template(tokenizer), messages, check_tools(tools))
    return _render_checked(tokenizer, messages, add_generation_prompt)


def encode_answer(tokenizer: Any, messages: Any, *, tools: Any = None) -> tuple[EncodedPrompt, list[int]]:
    """Tokenise a chat that ends with an answer: the prompt as serving does, and the answer through its end of turn.

    An answer is what a model has to generate after the prompt, see ``answers.answer_text``.

    Raises:
        RequestError: as ``render_chat``; if the last message is no answer, or nothing precedes it, or the template
            does not tell the answer from the prompt.
    """
    messages = check_messages(messages)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise RequestError("the last message must be the assistant's, and others must precede it")
    tokenizer = with_tools(_require_template(tokenizer), messages, check_tools(tools))
    prompt = _render_checked(tokenizer, messages[:-1], True)
    answer = answer_text(
        messages,
        functools.partial(_render, tokenizer),
        functools.partial(_end_of_turn, tokenizer),
        [token.content for token in tokenizer.added_tokens_decoder.values() if token.special],
    )
    end = [] if answer.ended else [_end_of_sequence(tokenizer)]
    header = _render(tokenizer, messages[:-1], True)
    return prompt, [*encode_after(tokenizer, header, answer.text), *end]


def _require_template(tokenizer: Any) -> Any:
    if not getattr(_require(tokenizer), "chat_template", None):
        raise RequestError(
            "the model's tokenizer has no chat template; give the prompt as text, or load an instruction-tuned model"
        )
    return tokenizer


def _end_of_sequence(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise RequestError(
            "the chat template ends the answer without a special token, and the tokenizer has no end of sequence; so "
            "nothing would end what is generated: name its eos_token in tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def _render_checked(tokenizer: Any, messages: list[dict[str, Any]], add_generation_prompt: bool) -> EncodedPrompt:
    text = _render(tokenizer, messages, add_generation_prompt)
    answers = _answer_extents(tokenizer, messages, text)
    if answers is None:
        return EncodedPrompt(encode_text(tokenizer, text), None)
    return _encode_parts(tokenizer, text, answers)


def _render(tokenizer: Any, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    """Return a chat as text.

    Raises:
        RequestError: if the template refuses the messages, or fails in whatever way: it is a program.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:
        raise RequestError(f"the model's chat template refuses these messages: {error}") from error


def _answer_extents(tokenizer: Any, messages: list[dict[str, Any]], text: str) -> list[Span] | None:
    """Return the character extent of each answer in ``text``, or ``None`` if the template is not prefix-stable."""
    extents = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            through = _render(tokenizer, messages[: index + 1], False)
            start = _header_end(tokenizer, messages[: index + 1], through)
        except RequestError:
            return None
        end = _end_of_turn(tokenizer, through, start) if start is not None else None
        if start is None or end is None or not text.startswith(through[:end]):
            return None
        extents.append((start, end))
    return extents


def _header_end(tokenizer: Any, messages: list[dict[str, Any]], through: str) -> int | None:
    """Return where the answer that ends ``messages``, whose text is ``through``, begins."""
    if len(messages) > 1:
        header = _render(tokenizer, messages[:-1], True)
        return len(header) if through.startswith(header) else None
    # Nothing precedes the answer, and templates do not render nothing: look for the header of the answer after it.
    header = _render(tokenizer, messages, True).removeprefix(through)
    at = through.find(header) if header else -1
    return at + len(header) if at >= 0 else None


def _end_of_turn(tokenizer: Any, text: str, start: int) -> int | None:
    """Return where the answer that ends ``text`` and begins at ``start`` is over, its end-of-turn token included."""
    known = turn_end(tokenizer)
    return None if known is None else known.end_in(text, start)


def _encode_parts(tokenizer: Any, text: str, answers: list[Span]) -> EncodedPrompt:
    """Tokenise the text between answers and the answers one by one, and return the answers' token spans."""
    cuts = [0, *(place for answer in answers for place in answer), len(text)]
    parts = encode_parts(tokenizer, [text[start:end] for start, end in itertools.pairwise(cuts)])
    token_ids = [token for part in parts for token in part]
    whole = encode_text(tokenizer, text)
    decode = functools.partial(detokenizer_of(tokenizer).decode, special=True)
    if token_ids != whole and decode(token_ids) != decode(whole):
        return EncodedPrompt(whole, None)  # A tokenizer whose texts cannot be cut without changing them.
    ends = np.cumsum([len(part) for part in parts]).tolist()
    return EncodedPrompt(token_ids, tuple(zip(ends[::2], ends[1::2], strict=False)))
