"""Text as it streams: incomplete characters and possible stop texts are held back, and nothing is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preft_jax.text.streams import TextStream

pytestmark = pytest.mark.host

GRIN = list("😀".encode())


@pytest.fixture(scope="module")
def tokenizer(tiny_text):
    return tiny_text.tokenizer


def stream(tokenizer, ids, stop=(), size=1):
    """Return the pieces of a text that comes ``size`` tokens at a time, its rest, and how many tokens count."""
    text, pieces, kept = TextStream(tokenizer, stop), [], 0
    for at in range(0, len(ids), size):
        piece, count = text.push(ids[at : at + size])
        pieces.append(piece)
        kept += count
        if text.stopped is not None:
            break
    return pieces, text.finish(ids[:kept]), kept, text.stopped


def test_a_character_comes_when_its_last_byte_does(tokenizer):
    pieces, rest, _, _ = stream(tokenizer, [97, *GRIN, 98])
    assert pieces == ["a", "", "", "", "😀", "b"]
    assert rest == ""


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_an_incomplete_character_at_the_end_is_what_the_tokenizer_makes_of_it(cut, tokenizer):
    ids = [97, *GRIN[:cut]]
    pieces, rest, _, _ = stream(tokenizer, ids)
    assert pieces == ["a", *[""] * cut]
    assert "a" + rest == tokenizer.decode(ids)
    assert rest == "�"


def test_special_tokens_have_no_text(tokenizer):
    pieces, rest, kept, _ = stream(tokenizer, [104, 255, 105])
    assert ("".join(pieces) + rest, kept) == ("hi", 3)


pieces = st.lists(st.integers(0, 255).map(lambda b: [b]) | st.sampled_from("é€😀x\n").map(lambda c: list(c.encode())))


@given(pieces.map(lambda parts: [byte for part in parts for byte in part]), st.integers(1, 5))
def test_pieces_and_rest_are_the_whole_text(tokenizer, ids, size):
    pieces, rest, kept, _ = stream(tokenizer, ids, size=size)
    assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=True)
    assert kept == len(ids)


def cut(text, stops):
    """Return where a text ends that comes a character at a time, how much of it counts, and what ended it."""
    for end in range(1, len(text) + 1):
        found = [(text.find(stop, 0, end), stop) for stop in stops if stop in text[:end]]
        if found:
            return min(found)[0], end, min(found)[1]
    return len(text), len(text), None


texts = st.text("ab", max_size=14)


@given(texts, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_stop_texts(tokenizer, text, stops, size):
    pieces, rest, kept, stopped = stream(tokenizer, list(text.encode()), stops, size)
    end, count, by = cut(text, stops)
    assert "".join(pieces) + rest == text[:end]
    assert (kept, stopped) == (count, by)
    if stopped:
        assert rest == ""


def test_the_beginning_of_a_stop_text_is_held_back(tokenizer):
    pieces, rest, _, stopped = stream(tokenizer, list(b"one st"), ("stop",))
    assert "".join(pieces) == "one"
    assert rest == " st"
    assert stopped is None


def test_a_stop_text_of_several_bytes(tokenizer):
    pieces, rest, kept, stopped = stream(tokenizer, [97, *GRIN, 98], ("😀",), size=2)
    assert ("".join(pieces) + rest, kept, stopped) == ("a", 5, "😀")


def test_without_a_tokenizer_there_is_no_text():
    assert stream(None, [1, 2, 3], size=2) == (["", ""], "", 3, None)
