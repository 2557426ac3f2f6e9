"""Log-probabilities of an answer: tokens, their bytes and their places in the text."""

import json

import pytest
import text_tokenizers as kinds

from preft_jax.text.streams import TextStream
from serve.engine.request import Output, TokenLogprobs
from serve.server.answers import ChatShape, CompletionShape, TokenTexts

pytestmark = pytest.mark.host


def answer(tokenizer, ids, size, kind, logprobs=1):
    """Return the text and the choices of a stream of ``ids``, ``size`` at a time."""
    shape = kind(model="m", created=0, texts=TokenTexts(tokenizer), logprobs=logprobs)
    stream, choices, texts = TextStream(tokenizer, continues=True), [], []
    for at in range(0, len(ids), size):
        part = ids[at : at + size]
        text = stream.push(part)[0] + (stream.finish() if at + size >= len(ids) else "")
        tops = [TokenLogprobs(token, -1.0, {token: -1.0}) for token in part]
        texts.append(text)
        choices.append(json.loads(json.dumps(shape.piece(0, Output(request_id=0, text=text, top_logprobs=tops)))))
    return "".join(texts), choices


CASES = {
    "spaces": ("llama 2", ["▁hello", "▁the", "a", "▁", "▁."], " hello thea  .", [0, 6, 10, 11, 12]),
    "bytes": ("llama 2", ["a", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "b"], "a😀b", [0, 1, 1, 1, 1, 2]),
    "two characters in a run": ("gemma", ["<0xC3>", "<0xA9>", "<0xC3>", "<0xA9>", "▁the"], "éé the", [0, 0, 1, 1, 2]),
    "special tokens": ("metaspace first", ["▁hello", "</s>", "▁the", "<s>"], " hello the", [0, 6, 6, 10]),
    "parts of characters": ("byte level", ["ðŁĺ", "Ģ", "Ġa", "<|im_end|>"], "😀 a", [0, 0, 1, 3]),
    "added tokens": ("byte level", ["Ġa", "日本", "<tool>"], " a日本<tool>", [0, 2, 4]),
}


@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize(("kind", "tokens", "text", "offsets"), CASES.values(), ids=CASES)
def test_bytes_join_to_the_text_and_offsets_are_places_in_it(kind, tokens, text, offsets, size):
    tokenizer = kinds.KINDS[kind]()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    found, choices = answer(tokenizer, ids, size, CompletionShape)
    assert found == text
    assert [at for choice in choices for at in choice["logprobs"]["text_offset"]] == offsets
    found, choices = answer(tokenizer, ids, size, ChatShape)
    entries = [entry for choice in choices for entry in choice["logprobs"]["content"]]
    special = set(tokenizer.all_special_tokens)
    assert bytes(byte for one in entries if one["token"] not in special for byte in one["bytes"]).decode() == text
    assert [entry["top_logprobs"][0]["bytes"] for entry in entries] == [entry["bytes"] for entry in entries]


def test_without_a_tokenizer_tokens_are_told_by_their_ids():
    text, choices = answer(None, [7, 300], 1, CompletionShape)
    assert text == ""
    assert [choice["logprobs"]["tokens"] + choice["logprobs"]["text_offset"] for choice in choices] == [
        ["7", 0],
        ["300", 0],
    ]
