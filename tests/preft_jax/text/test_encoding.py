"""Token ids of parts of a text against those of the whole, and what tokenizers put around texts."""

import itertools

import pytest
import text_tokenizers as kinds

from preft_jax import RequestError
from preft_jax.text.chat import EncodedPrompt, encode_prompt, render_chat
from preft_jax.text.detokenizer import detokenizer_of
from preft_jax.text.encoding import encode_after, encode_parts, encode_text

pytestmark = pytest.mark.host

CHAINS = [name for name in kinds.KINDS if name != "word piece"]
SNIPPETS = [*"abcdefgh 12.\n", "  ", "\n\n", " the", "hello", "é", "😀", "日本", "e\u0301", "it's", "a b"]


@pytest.fixture(scope="module", params=CHAINS)
def tokenizer(request):
    return kinds.KINDS[request.param]()


def draw(rng, tokenizer, most=12):
    marks = [entry.content for entry in tokenizer.added_tokens_decoder.values()]
    pool = SNIPPETS * 3 + marks
    return "".join(pool[rng.integers(len(pool))] for _ in range(int(rng.integers(1, most))))


def clean_cuts(tokenizer, text):
    """Return the places between two tokens of the whole."""
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    inside = {at for start, end in encoding.offsets for at in range(start + 1, end)}
    starts = {start for start, _ in encoding.offsets}
    return [at for at in range(1, len(text)) if at not in inside and at in starts]


def flat(parts):
    return list(itertools.chain.from_iterable(parts))


def test_parts_are_the_whole_where_no_token_reaches_over_a_cut(tokenizer, rng):
    seen = 0
    for _ in range(300):
        text = draw(rng, tokenizer)
        cuts = clean_cuts(tokenizer, text)
        whole = encode_text(tokenizer, text)
        # The first part's tokens are those it has alone: what serving made of it before the rest was there.
        cuts = [at for at in cuts if whole[: len(alone := encode_text(tokenizer, text[:at]))] == alone]
        chosen = [0, *(at for at in cuts if rng.integers(2)), len(text)]
        seen += len(chosen) > 2
        parts = [text[a:b] for a, b in itertools.pairwise(chosen)]
        assert flat(encode_parts(tokenizer, parts)) == whole, parts
    assert seen > 100


def test_parts_spell_the_whole_wherever_it_is_cut(tokenizer, rng):
    for _ in range(300):
        words = [draw(rng, tokenizer, 5) for _ in range(3)]
        if any("\n" in word or " " in word for word in words) and "<|end|>" in "".join(words):
            continue  # A token that swallows the space behind it does so only where it stands in one part.
        found, tokens = encode_parts(tokenizer, words), detokenizer_of(tokenizer)
        text = tokens.decode(flat(found), special=True)
        assert text == tokens.decode(encode_text(tokenizer, "".join(words)), special=True), words


def test_a_parts_tokens_do_not_depend_on_what_follows(tokenizer, rng):
    for _ in range(100):
        words = [draw(rng, tokenizer, 6) for _ in range(4)]
        found = encode_parts(tokenizer, words)
        for count in range(1, 4):
            assert encode_parts(tokenizer, words[:count]) == found[:count]
        assert found[0] == encode_text(tokenizer, words[0])


@pytest.mark.parametrize("kind", ["llama 2", "metaspace first", "metaspace always", "unigram"])
def test_no_space_is_put_before_what_stands_behind_a_prompt(kind):
    tokenizer = kinds.KINDS[kind]()
    for prompt, completion in [
        ("the", "!"),
        ("the", " lo"),
        ("a\n", "b"),
        ("hello ", "the"),
        ("2.", "4"),
        ("ab", "cd"),
    ]:
        ids = [*encode_text(tokenizer, prompt), *encode_after(tokenizer, prompt, completion)]
        tokens = detokenizer_of(tokenizer)
        assert tokens.decode(ids) == tokens.decode(encode_text(tokenizer, prompt + completion)), (prompt, completion)


def test_a_long_text_before_costs_no_more_than_its_end():
    tokenizer = kinds.llama2()
    seen = []
    encode = tokenizer.encode
    tokenizer.encode = lambda text, **options: (seen.append(len(text)), encode(text, **options))[1]
    found = encode_after(tokenizer, "the lo. " * 10_000, "the")
    assert found == encode_text(tokenizer, "the")[1:] or len(found) > 0
    assert max(seen) < 1_000


AROUND = {
    "before": ("<s> $A", ["<s>"]),
    "before and behind": ("<s> $A </s>", ["<s>"]),
    "behind": ("$A </s>", []),
    "two before": ("<s> <tool> $A </s>", ["<s>", "<tool>"]),
    "none": ("$A", []),
}


@pytest.mark.parametrize("kind", ["llama 2", "gemma", "metaspace first"])
@pytest.mark.parametrize("around", AROUND)
def test_prompts_begin_as_texts_do_once_and_never_end(around, kind):
    template, begin = AROUND[around]
    tokenizer = kinds.with_template(kinds.KINDS[kind](), template)
    begin = tokenizer.convert_tokens_to_ids(begin)
    plain = tokenizer.encode("hello a", add_special_tokens=False)

    def prompt(text, **options):
        return encode_prompt(tokenizer, text, vocab_size=len(tokenizer), **options).token_ids

    assert prompt("hello a") == [*begin, *plain]
    assert prompt("hello a", add_special_tokens=False) == plain
    written = "".join(tokenizer.convert_ids_to_tokens(begin)) + "hello a"
    assert prompt(written) == tokenizer.encode(written, add_special_tokens=False)  # It begins so: not again.
    assert prompt(written)[: len(begin)] == begin


def test_the_tokens_that_begin_texts_may_be_asked_for_before_a_chat():
    template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    tokenizer = kinds.with_template(kinds.gemma(chat_template=template), "<s> $A </s>")
    chat = [{"role": role, "content": text} for role, text in (("user", "ab"), ("assistant", "cd"), ("user", "e"))]

    def prompt(**options):
        return encode_prompt(tokenizer, chat, vocab_size=len(tokenizer), **options)

    usual = prompt()
    assert usual == render_chat(tokenizer, chat)
    assert usual.token_ids == tokenizer.encode("ab</s>cd</s>e</s>", add_special_tokens=False)
    more = prompt(add_special_tokens=True)
    assert more.token_ids == [1, *usual.token_ids]
    assert more.unedited_spans == tuple((start + 1, end + 1) for start, end in usual.unedited_spans)
    tokenizer.chat_template = "{{ bos_token }}" + template
    assert prompt(add_special_tokens=True) == prompt()  # The template writes it.


@pytest.mark.parametrize("kind", CHAINS)
def test_chats_are_the_whole_text_and_each_turn_begins_with_the_one_before(kind):
    """Also where every text begins with a space: answers have spans, and their tokens are the whole's."""
    tokenizer = kinds.KINDS[kind]()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    words = ["hello", "the lo", "a", "b. c", "!"]
    chat = [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]
    found = [render_chat(tokenizer, chat[: i + 1]) for i in (0, 2, 4)]
    for i, one in zip((0, 2, 4), found, strict=True):
        text = tokenizer.apply_chat_template(chat[: i + 1], tokenize=False)
        assert one.token_ids == tokenizer.encode(text, add_special_tokens=False)
        answers = [
            detokenizer_of(tokenizer).decode_after(one.token_ids[a:b], special=True) for a, b in one.unedited_spans
        ]
        assert answers == [f" {word}{tokenizer.eos_token}" for word in words[1:i:2]]
    for one, after in itertools.pairwise(found):
        assert after.token_ids[: len(one.token_ids)] == one.token_ids


def test_a_text_that_the_tokenizer_cannot_take_is_refused_by_name():
    tokenizer = kinds.llama2()
    with pytest.raises(RequestError, match="not valid Unicode"):
        encode_prompt(tokenizer, "a\ud800", vocab_size=400)

    def broken(text, **options):
        raise Exception("no unknown token")

    tokenizer.encode = broken
    with pytest.raises(RequestError, match="cannot turn the text into tokens: no unknown token"):
        encode_prompt(tokenizer, "a", vocab_size=400)


def test_token_ids_get_nothing():
    tokenizer = kinds.with_template(kinds.llama2(), "<s> $A </s>")
    assert encode_prompt(tokenizer, [5, 6], vocab_size=400, add_special_tokens=True) == EncodedPrompt([5, 6], ())
