"""From texts to token ids: a whole text, and parts of one, the only place where token ids are made of texts.

Tokenising parts alone is not tokenising the whole: SentencePiece and Metaspace put a space before every text, and
post-processors put BOS or EOS around it. Here a part that stands behind others is tokenised behind them: where no
token of the whole reaches over a cut, the parts' tokens are the whole's.
"""

from collections.abc import Sequence
from typing import Any

from preft_jax.errors import RequestError

_CONTEXT = 256
"""Characters before a part that are tokenised with it. Only what touches the cut matters."""

_ANCHORS = ("\n", "0", "a", ".", "\u00e9", " a")
"""What may stand before a part instead, if a token would reach over the cut."""

_PROBE = "a"


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return a text's tokens without those that the tokenizer puts around every text.

    Raises:
        RequestError: if the text is no valid Unicode, or the tokenizer has no token for a part of it.
    """
    return _encode(tokenizer, text, False)


def _encode(tokenizer: Any, text: str, around: bool) -> list[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=around)
    except (TypeError, UnicodeError) as error:
        raise RequestError(f"the prompt is not valid Unicode text: {error}") from error
    except Exception as error:
        raise RequestError(f"the model's tokenizer cannot turn the text into tokens: {error}") from error


def begin_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts before every text (BOS), but not those behind it (EOS)."""
    alone, around = _encode(tokenizer, _PROBE, False), _encode(tokenizer, _PROBE, True)
    for at in range(len(around) - len(alone) + 1):
        if around[at : at + len(alone)] == alone:
            return around[:at]
    return []


def with_begin_tokens(tokenizer: Any, token_ids: Sequence[int]) -> list[int]:
    """Return a prompt's tokens behind those that begin every text, unless it begins with them already."""
    begin = begin_tokens(tokenizer)
    return list(token_ids) if list(token_ids[: len(begin)]) == begin else [*begin, *token_ids]


def encode_after(tokenizer: Any, before: str, text: str) -> list[int]:
    """Return the tokens of a text that stands behind another, whose tokens are those it has alone.

    If no token of both together reaches over the cut, these are the rest of their tokens; otherwise the text is
    tokenised as it would be in the middle of some other.
    """
    if not text or not before:
        return encode_text(tokenizer, text) if text else []
    for left in (before[-_CONTEXT:], *_ANCHORS):
        head, both = encode_text(tokenizer, left), encode_text(tokenizer, left + text)
        if both[: len(head)] == head:
            return both[len(head) :]
    return encode_text(tokenizer, text)


def encode_parts(tokenizer: Any, parts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each of a text's consecutive parts; what follows a part does not change its tokens."""
    made, before = [], ""
    for part in parts:
        made.append(encode_after(tokenizer, before, part))
        before = before[-_CONTEXT:] + part
    return made
