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
    return pieces, text.finish(), kept, text.stopped


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


def run(tokenizer, ids, stop, size=1, end=None):
    """Return the text, its pieces, the tokens that count and what stopped it; ``end`` is an end token."""
    text, pieces, kept = TextStream(tokenizer, stop), [], 0
    for at in range(0, len(ids), size):
        piece, count = text.push(ids[at : at + size])
        pieces.append(piece)
        kept += count
        if text.stopped is not None:
            break
    rest = text.finish(end)
    return "".join(pieces) + rest, pieces, kept, text.stopped


IM_START, IM_END = 254, 255


@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize(
    ("ids", "stop", "text", "kept", "stopped"),
    [
        ([*b"ab", IM_END, *b"cd"], "<|im_end|>", "ab", 3, "<|im_end|>"),
        ([IM_END, *b"cd"], "<|im_end|>", "", 1, "<|im_end|>"),
        ([*b"ab\n", IM_END, *b"cd"], "\n<|im_end|>", "ab", 4, "\n<|im_end|>"),
        ([*b"ab", IM_END, *b"\ncd"], "<|im_end|>\n", "ab", 4, "<|im_end|>\n"),
        ([*b"a", IM_END, IM_START, *b"cd"], "<|im_end|><|im_start|>c", "a", 4, "<|im_end|><|im_start|>c"),
        ([*b"a", IM_END, *b"b", IM_END, *b"c"], "b<|im_end|>", "a", 4, "b<|im_end|>"),
        ([*b"ab", IM_START, *b"cd"], "<|im_end|>", "abcd", 5, None),
        ([*b"a", IM_START, *b"b"], "ab", "", 3, "ab"),  # Special tokens have no place in the text.
        ([*b"ab<|im_end|>cd"], "<|im_end|>", "ab", 12, "<|im_end|>"),  # Written in letters.
    ],
)
def test_stop_texts_that_are_or_hold_special_tokens(ids, stop, text, kept, stopped, size, tokenizer):
    found = run(tokenizer, ids, ("zz", stop), size)
    assert (found[0], found[2], found[3]) == (text, kept, stopped)


@pytest.mark.parametrize(
    ("ids", "stop", "text", "stopped"),
    [(b"ab\n", "\n<|im_end|>", "ab", "\n<|im_end|>"), (b"ab", "<|im_end|>", "ab", "<|im_end|>"), (b"ab", "a", "", "a")],
)
def test_a_stop_text_may_end_with_the_end_token(ids, stop, text, stopped, tokenizer):
    found = run(tokenizer, list(ids), (stop,), end=IM_END)
    assert (found[0], found[3]) == (text, stopped)


stop_texts = st.lists(
    st.lists(st.sampled_from(["a", "b", "<|im_end|>"]), min_size=1, max_size=3).map("".join), max_size=3
)


@given(st.lists(st.sampled_from([*b"ab", IM_END]), max_size=12), st.integers(1, 4), stop_texts)
def test_stop_texts_among_special_tokens_cut_where_the_full_text_says(tokenizer, ids, size, stops):
    written = ["<|im_end|>" if token == IM_END else chr(token) for token in ids]
    shown = ["" if token == IM_END else chr(token) for token in ids]
    expected = ("".join(shown), None)
    for count in range(1, len(ids) + 1):
        full, plain = "".join(written[:count]), "".join(shown[:count])
        found = [
            (len(full[: full.find(stop)].replace("<|im_end|>", "")) if "<" in stop else plain.find(stop), stop)
            for stop in stops
            if stop in (full if "<" in stop else plain)
        ]
        if found:
            at, by = min(found)
            expected = (plain[:at], by)
            break
    text, pieces, _, stopped = run(tokenizer, ids, stops, size)
    assert (text, stopped) == expected
    assert all(text.startswith("".join(pieces[:i])) for i in range(len(pieces)))
