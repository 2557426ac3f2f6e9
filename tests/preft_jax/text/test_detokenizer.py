"""Random token ids of every kind of tokenizer: streamed they are the whole text, and their bytes join to it."""

import pytest
import text_tokenizers as kinds

from preft_jax.text.detokenizer import Places, detokenizer_of
from preft_jax.text.streams import TextStream

pytestmark = pytest.mark.host

GRIN = "😀 日本\u0301"


@pytest.fixture(scope="module", params=kinds.KINDS)
def tokenizer(request):
    return kinds.KINDS[request.param]()


def draw(rng, tokenizer):
    """Return ids of which many are bytes, special, or of no token."""
    size = len(tokenizer)
    known = tokenizer.encode(GRIN, add_special_tokens=False) or [1]
    parts = []
    for _ in range(int(rng.integers(1, 8))):
        kind = rng.integers(5)
        if kind == 0:
            parts += rng.integers(0, size + 2, int(rng.integers(1, 6))).tolist()
        elif kind == 1:
            parts += rng.integers(0, min(size, 12), 2).tolist()
        elif kind == 2:
            parts += known[: int(rng.integers(1, len(known) + 1))]
        elif kind == 3:
            parts += rng.integers(max(0, size - 40), size, 3).tolist()
        else:
            parts += [int(rng.integers(size))] * int(rng.integers(1, 3))
    return parts


def streamed(tokenizer, ids, size, **options):
    stream = TextStream(tokenizer, **options)
    pieces = [stream.push(ids[at : at + size]) for at in range(0, len(ids), size)]
    assert sum(kept for _, kept in pieces) == len(ids)
    return "".join(text for text, _ in pieces) + stream.finish()


def whole(tokenizer, ids):
    return tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)


def check_places(tokens, ids, text):
    """A token begins where the text of those before it ends, once it is known whether they end a character."""
    places = Places(tokens)
    found = [places.add(token) for token in ids]
    assert found == sorted(found)
    for at, token in enumerate(ids):
        if not tokens.visible(token) or (tokens.kind == "pieces" and tokens.piece(token) is None):
            continue  # A byte of a run has no text of its own.
        piece = tokens.text(token)
        if piece and "\ufffd" not in piece:
            before = tokens.decode_after(ids[:at])
            assert text.startswith(before + piece), (ids, at)
            assert found[at] == len(before), (ids, at)


def check(rng, tokenizer, count):
    tokens = detokenizer_of(tokenizer)
    first = tokenizer.encode("ab", add_special_tokens=False)
    for _ in range(count):
        ids, size = draw(rng, tokenizer), int(rng.integers(1, 4))
        assert streamed(tokenizer, ids, size) == whole(tokenizer, ids), ids
        behind = whole(tokenizer, [*first, *ids])[len(whole(tokenizer, first)) :]
        text = streamed(tokenizer, ids, size, continues=True)
        assert text == behind, ids
        if tokens.kind != "other":
            check_places(tokens, ids, text)
        joined = b"".join(tokens.bytes(token) for token in ids if tokens.visible(token))
        if tokens.kind == "bytes":
            assert joined.decode(errors="replace") == text, ids
        elif "\ufffd" not in text:  # A run of bytes that is not valid is U+FFFD for each of them.
            assert joined == text.encode(), ids


def test_streamed_is_whole_and_bytes_join_to_the_text(tokenizer, rng):
    check(rng, tokenizer, 600)


@pytest.mark.slow
def test_streamed_is_whole_and_bytes_join_to_the_text_many_times(tokenizer, rng):
    check(rng, tokenizer, 100_000)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("byte level", "bytes"),
        ("llama 2", "pieces"),
        ("gemma", "pieces"),
        ("unigram", "pieces"),
        ("word piece", "other"),
    ],
)
def test_kinds_of_decoders(kind, expected):
    assert detokenizer_of(kinds.KINDS[kind]()).kind == expected


def ids_of(tokenizer, *tokens):
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def test_a_run_of_bytes_comes_when_it_ends():
    """Whether its bytes are characters is decided by all of them."""
    tokenizer = kinds.llama2()
    stream = TextStream(tokenizer, continues=True)
    run = ids_of(tokenizer, "<0xF0>", "<0x9F>", "<0x98>", "<0x80>")
    assert [stream.push([token])[0] for token in [*run, *ids_of(tokenizer, "a")]] == ["", "", "", "", "😀a"]
    stream = TextStream(tokenizer, continues=True)
    assert (
        "".join(stream.push([token])[0] for token in ids_of(tokenizer, "a", "<0xE6>", "<0x97>", "b"))
        == "a\ufffd\ufffdb"
    )


def test_what_broke_the_library_s_own_stream():
    """Valid characters, then a byte that makes the run invalid: what was sent would have had to be taken back."""
    tokenizer = kinds.llama2()
    ids = ids_of(tokenizer, *(f"<0x{byte:02X}>" for byte in [*"日本".encode(), 0xFF]), "a")
    assert streamed(tokenizer, ids, 1) == whole(tokenizer, ids) == "\ufffd" * 7 + "a"


@pytest.mark.parametrize("kind", ["llama 2", "metaspace first"])
def test_an_answer_keeps_the_space_that_parts_it_from_its_prompt(kind):
    tokenizer = kinds.KINDS[kind]()
    ids = ids_of(tokenizer, "▁hello", "▁the")
    assert streamed(tokenizer, ids, 1) == "hello the"
    assert streamed(tokenizer, ids, 1, continues=True) == " hello the"


def test_bytes_of_single_tokens():
    tokens, tokenizer = detokenizer_of(kinds.llama2()), kinds.llama2()
    named = {name: tokens.bytes(*ids_of(tokenizer, name)) for name in ("<0xE6>", "▁hello", "▁", "섬", "</s>", "<tool>")}
    assert named == {
        "<0xE6>": b"\xe6", "▁hello": b" hello", "▁": b" ", "섬": "섬".encode(), "</s>": b"</s>", "<tool>": b"<tool>",
    }  # fmt: skip
    tokens, tokenizer = detokenizer_of(kinds.byte_level()), kinds.byte_level()
    assert [tokens.bytes(*ids_of(tokenizer, name)) for name in ("ð", "Ġa", "ðŁĺ", "<｜end▁of▁sentence｜>")] == [
        b"\xf0", b" a", b"\xf0\x9f\x98", "<｜end▁of▁sentence｜>".encode(),
    ]  # fmt: skip
    assert tokens.bytes(10_000) == b""
