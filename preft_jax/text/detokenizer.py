"""From token ids to text and bytes: what one token is, and a text that grows token by token to what the whole is.

The text of a sequence is what the tokenizer decodes of it, special tokens left out. It cannot be put together from the
texts of single tokens: a character may take several byte-level tokens, a run of ``<0xE4>`` pieces is valid as a whole
or not at all, and a SentencePiece decoder drops the space that begins a text. So what is not certain yet is held back.
"""

import codecs
import functools
import json
import re
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_LETTERS = ("a", "e", "A", "0", ".", "▁a", "the", "▁the")
"""Tokens that may stand before others so that these are decoded as in the middle of a text."""

_CACHED_TOKENS = 300_000


def byte_letters() -> dict[str, int]:
    """Return the byte that each letter stands for in the vocabulary of a byte-level tokenizer (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_LETTERS = byte_letters()


class GrowingText(Protocol):
    """The text of tokens that come one by one."""

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now and was not before."""
        ...

    def finish(self) -> str:
        """Return the rest, now that no token follows."""
        ...


class Detokenizer:
    """What the tokens of one tokenizer stand for. Make it with ``detokenizer_of``, which keeps it.

    Args:
        tokenizer: a transformers fast tokenizer.

    Attributes:
        special: special tokens, which have no place in the text of an answer: token id -> how it is written.
    """

    def __init__(self, tokenizer: Any):
        self._backend = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self.special = {token: entry.content for token, entry in added.items() if entry.special}
        self._anchor = self._find_anchor()
        self.kind = self._kind()
        self.bytes = functools.lru_cache(maxsize=_CACHED_TOKENS)(self._bytes)
        self.piece = functools.lru_cache(maxsize=_CACHED_TOKENS)(self._piece)
        self.holds_special = functools.lru_cache(maxsize=1_000)(self._holds_special)

    def begin(self, *, continues: bool) -> GrowingText:
        """Return a new text; one that ``continues`` another keeps the space that a decoder drops where texts begin."""
        if self.kind == "bytes":
            return _BytesText(self)
        return _PiecesText(self, continues) if self.kind == "pieces" else _OtherText(self, continues)

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of a whole sequence, with special tokens or without."""
        return self._backend.decode(token_ids, skip_special_tokens=not special)

    def decode_after(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text that a sequence has behind another, with special tokens or without."""
        anchor, shown = self._anchor or ([], "")
        return self._backend.decode([*anchor, *token_ids], skip_special_tokens=not special)[len(shown) :]

    def text(self, token: int) -> str:
        """Return one token's text, special tokens as they are written; a part of a character is U+FFFD."""
        return self.bytes(token).decode(errors="replace")

    def visible(self, token: int) -> bool:
        """Return whether a token has a place in a text."""
        return token not in self.special and self._backend.id_to_token(token) is not None

    def _holds_special(self, text: str) -> bool:
        """Return whether a text is or holds a special token."""
        return any(one in text for one in set(self.special.values()))

    def _bytes(self, token: int) -> bytes:
        """Return one token's bytes, of a part of a character too; those of a sequence are its text in UTF-8."""
        if token in self.special:
            return self.special[token].encode()
        written = self._backend.id_to_token(token)
        if written is None:
            return b""
        if self.kind == "bytes":
            letters = [_BYTE_LETTERS.get(letter) for letter in written]
            return written.encode() if None in letters else bytes(byte for byte in letters if byte is not None)
        if self.kind == "pieces" and self.piece(token) is None:
            return bytes([int(written[3:5], 16)])
        return self.decode_after([token]).encode()

    def _piece(self, token: int) -> str | None:
        """Return one token's text in the middle of others, or None if it is one byte of a run."""
        if self._byte_pieces and _BYTE_PIECE.fullmatch(self._backend.id_to_token(token) or ""):
            return None
        return self.decode_after([token])

    def _find_anchor(self) -> tuple[list[int], str] | None:
        named = (self._backend.token_to_id(letter) for letter in _LETTERS)
        ids = [token for token in named if token is not None]
        for token in [*ids, *range(min(self._backend.get_vocab_size(), 2_000))]:
            written = self._backend.id_to_token(token)
            if written is None or token in self.special or _BYTE_PIECE.fullmatch(written):
                continue
            shown = self._backend.decode([token])
            if shown.strip() and "\ufffd" not in shown and self._backend.decode([token, token]).startswith(shown):
                return [token], shown
        return None

    def _kind(self) -> str:
        """Return ``bytes`` if tokens are bytes, ``pieces`` if each but a byte of a run has its own text, or ``other``.

        A chain of decoders has pieces if it joins them last, and after that drops at most what begins the text.
        """
        decoder = self._backend.decoder
        spec = {} if decoder is None else json.loads(decoder.__getstate__())
        chain = spec["decoders"] if spec.get("type") == "Sequence" else [spec]
        types = [step.get("type") for step in chain]
        self._byte_pieces = "ByteFallback" in types
        if types == ["ByteLevel"]:
            return "bytes"
        last = types.index("Fuse") if "Fuse" in types else len(types)
        pieces = all(kind in ("Replace", "ByteFallback", "Metaspace", "Strip") for kind in types[:last]) and all(
            step["type"] == "Strip" and not step["stop"] for step in chain[last + 1 :]
        )
        return "pieces" if pieces and self._anchor is not None else "other"


class _BytesText:
    """Of a byte-level tokenizer: characters come with their last byte."""

    def __init__(self, tokens: Detokenizer):
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return "" if token in self._tokens.special else self._decoder.decode(self._tokens.bytes(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _PiecesText:
    """Of pieces: runs of bytes come when they end, and the beginning of a text once something is left of it."""

    def __init__(self, tokens: Detokenizer, continues: bool):
        self._tokens = tokens
        self._begun = continues
        self._held: list[int] = []

    def push(self, token: int) -> str:
        if not self._tokens.visible(token):
            return ""  # What stands before and after it is decoded as neighbours.
        piece = self._tokens.piece(token)
        if self._begun and piece is not None and not self._held:
            return piece
        self._held.append(token)
        return "" if piece is None else self._flush()

    def finish(self) -> str:
        return self._flush()

    def _flush(self) -> str:
        text = self._tokens.decode_after(self._held) if self._begun else self._tokens.decode(self._held)
        if text or self._begun:
            self._begun = True
            self._held.clear()
        return text


class _OtherText:
    """Of any other decoder: the whole is decoded again and again, which such tokenizers are rare enough for."""

    def __init__(self, tokens: Detokenizer, continues: bool):
        self._decode = tokens.decode_after if continues else tokens.decode
        self._ids: list[int] = []
        self._sent = ""

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        return "" if text.endswith("\ufffd") else self._send(text)

    def finish(self) -> str:
        return self._send(self._decode(self._ids))

    def _send(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""
        new, self._sent = text[len(self._sent) :], text
        return new


class Places:
    """Where each token of a text begins in it, in characters; a part of a character begins where the character does.

    While it is open whether a run of bytes is valid, its tokens are told the places that they have if it is.

    Args:
        tokens: of the tokenizer.
    """

    def __init__(self, tokens: Detokenizer):
        self._tokens = tokens
        self._growing = tokens.begin(continues=True)
        self._end = 0
        self._open = b""

    def add(self, token: int) -> int:
        """Return where the next token begins."""
        place = self._end + len(self._open.decode(errors="ignore"))
        if not self._tokens.visible(token):
            return place
        text, data = self._growing.push(token), self._tokens.bytes(token)
        if not text:
            self._open += data
            return place
        self._end += len(text)
        if self._tokens.kind == "bytes":
            place += 0 if _continues(self._open, data) else len(self._open.decode(errors="replace"))
            self._open = _incomplete(self._open + data)
        elif self._tokens.kind == "pieces":
            place, self._open = self._end - len(self._tokens.piece(token) or ""), b""
        return place


def _continues(start: bytes, data: bytes) -> bool:
    """Return whether the first of some bytes may follow those that begin a character."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start + data[:1])
    except UnicodeDecodeError:
        return False
    return True


def _incomplete(data: bytes) -> bytes:
    """Return the end of some bytes that may become a character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(data)
    return decoder.getstate()[0]


_made: weakref.WeakKeyDictionary[Any, Detokenizer] = weakref.WeakKeyDictionary()


def detokenizer_of(tokenizer: Any) -> Detokenizer:
    """Return the detokenizer of a tokenizer, made once."""
    if tokenizer not in _made:
        _made[tokenizer] = Detokenizer(tokenizer)
    return _made[tokenizer]
