"""Prompts: chats against their literal text, the spans of earlier answers, and malformed prompts refused by name."""

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from preft_jax import RequestError
from preft_jax.adapters.edit_mask import make_edit_mask
from preft_jax.text.chat import EncodedPrompt, encode_prompt, render_chat
from preft_jax.text.tokenizer import byte_tokenizer

pytestmark = pytest.mark.host

CHAT = [
    {"role": "user", "content": "What is 12 + 7?"},
    {"role": "assistant", "content": "It is 19."},
    {"role": "user", "content": "And 2024?"},
]

DROPS_EARLIER_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What Qwen3's template does: answers that are not the last lose their reasoning."""


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer with a token for each byte and ChatML."""
    return byte_tokenizer()


def with_template(template: str):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def merging_tokenizer():
    """A byte-level tokenizer that joins two line ends, so that a piece's first token depends on what precedes it."""
    tokenizer = byte_tokenizer()
    vocab = {**tokenizer.get_vocab(), "ĊĊ": 256}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    template = tokenizer.chat_template
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template)


def spelled(tokenizer, encoded: EncodedPrompt) -> list[str]:
    """Return the text of each un-edited span."""
    return [tokenizer.decode(encoded.token_ids[start:end]) for start, end in encoded.unedited_spans]


def test_smollm2_chat_is_its_literal_format(smollm2_text):
    encoded = render_chat(smollm2_text.tokenizer, CHAT)
    assert smollm2_text.tokenizer.decode(encoded.token_ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 12 + 7?<|im_end|>\n"
        "<|im_start|>assistant\nIt is 19.<|im_end|>\n"
        "<|im_start|>user\nAnd 2024?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert spelled(smollm2_text.tokenizer, encoded) == ["It is 19.<|im_end|>"]


def test_span_runs_from_after_the_header_through_the_end_of_turn(tokenizer):
    encoded = render_chat(
        tokenizer, [*CHAT, {"role": "assistant", "content": "What?"}, {"role": "user", "content": "!"}]
    )
    assert spelled(tokenizer, encoded) == ["It is 19.<|im_end|>", "What?<|im_end|>"]
    (start, end), _ = encoded.unedited_spans
    assert tokenizer.decode(encoded.token_ids[:start]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(encoded.token_ids[end:]).startswith("\n<|im_start|>user")
    mask_T = make_edit_mask(len(encoded.token_ids), "prompt", unedited_spans=encoded.unedited_spans)[:, 0]
    assert not mask_T[start:end].any()
    assert mask_T.sum() == len(mask_T) - sum(last - first for first, last in encoded.unedited_spans)


def test_without_generation_prompt_the_last_answer_has_a_span(tokenizer):
    encoded = render_chat(tokenizer, CHAT[:2], add_generation_prompt=False)
    assert spelled(tokenizer, encoded) == ["It is 19.<|im_end|>"]
    assert tokenizer.decode(encoded.token_ids).endswith("It is 19.<|im_end|>\n")


def test_no_answer_no_span(tokenizer):
    assert render_chat(tokenizer, CHAT[:1]).unedited_spans == ()


@pytest.mark.parametrize("answer", ["It is 19.", "\n\nIt", "\n", "<|im_end|>", "a <|im_end|> b", "  é🙂 "])
def test_next_turn_begins_with_this_turn_and_the_answers_own_tokens(answer):
    """Generated tokens can be reused: header tokens, then the answer's, whatever the text would merge into."""
    tokenizer = merging_tokenizer()
    first = render_chat(tokenizer, CHAT[:1])
    generated = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    second = render_chat(tokenizer, [CHAT[0], {"role": "assistant", "content": answer}, CHAT[2]])
    known = first.token_ids + generated
    assert second.token_ids[: len(known)] == known
    assert second.unedited_spans == ((len(first.token_ids), len(known)),)


def test_pieces_differ_from_the_whole_text_where_tokens_would_span_the_boundary():
    """The premise of the test above: in one piece, the header's line end and the answer's are one token."""
    tokenizer = merging_tokenizer()
    messages = [CHAT[0], {"role": "assistant", "content": "\nIt"}, CHAT[2]]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render_chat(tokenizer, messages).token_ids != tokenizer.encode(text, add_special_tokens=False)


def test_template_that_rewrites_earlier_answers_has_unknown_spans():
    tokenizer = with_template(DROPS_EARLIER_REASONING)
    messages = [CHAT[0], {"role": "assistant", "content": "<think>hm</think>It is 19."}, CHAT[2]]
    encoded = render_chat(tokenizer, messages)
    assert encoded.unedited_spans is None
    assert "hm" not in tokenizer.decode(encoded.token_ids)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert encoded.token_ids == tokenizer.encode(text)
    # The answer itself, while it is the last one, is where it was generated.
    assert render_chat(tokenizer, messages[:2], add_generation_prompt=False).unedited_spans is not None


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{% for m in messages %}{{ m['content'] }} {% endfor %}", id="no end of turn"),
        pytest.param(
            "{% if messages[-1]['role'] != 'user' %}{{ raise_exception('user last') }}{% endif %}"
            "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}",
            id="refuses a part of the conversation",
        ),
    ],
)
def test_template_that_does_not_say_where_answers_end_has_unknown_spans(template):
    encoded = render_chat(with_template(template), CHAT)
    assert encoded.unedited_spans is None
    assert encoded.token_ids


def test_what_a_template_puts_behind_the_end_of_a_turn_is_no_part_of_the_answer():
    tokenizer = with_template("{% for m in messages %}{{ m['content'] }}<|im_end|>.{% endfor %}")
    assert spelled(tokenizer, render_chat(tokenizer, CHAT)) == ["It is 19.<|im_end|>"]


def test_answer_first_has_a_span(tokenizer, smollm2_text):
    for one in (tokenizer, smollm2_text.tokenizer):
        encoded = render_chat(one, [{"role": "assistant", "content": "Hello."}, CHAT[0]])
        assert spelled(one, encoded) == ["Hello.<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is .*at least one"),
        ("hi", "messages is 'hi'"),
        (None, "messages is None"),
        ([CHAT[0], "hi"], r"messages\[1\] is 'hi'; give a dict"),
        ([{"content": "hi"}], r"messages\[0\]\['role'\] is None"),
        ([{"role": "user"}], r"messages\[0\]\['content'\] is None"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\['content'\] is 3; give a string"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\]\['content'\]: part 0 is no text"),
        ([CHAT[0], {"role": "asistant", "content": "x"}], r"messages\[1\] .*'asistant' \(did you mean 'assistant'\?\)"),
        ([{"role": "bot", "content": "x"}], "unknown role 'bot'; allowed: system, user, assistant, tool"),
        ([{"role": "user", "content": "x", "tools": []}], r"unknown field of messages\[0\] 'tools'"),
    ],
)
def test_malformed_messages_are_named(tokenizer, messages, message):
    with pytest.raises(RequestError, match=message):
        render_chat(tokenizer, messages)


def test_template_that_refuses_says_why():
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        render_chat(tokenizer, CHAT)


def test_no_chat_template():
    with pytest.raises(RequestError, match="no chat template; give the prompt as text"):
        render_chat(with_template(""), CHAT)


@pytest.mark.parametrize("ids", [[5, 0, 255], (5, 0, 255), np.array([5, 0, 255]), [np.int64(5), 0, np.int32(255)]])
def test_token_ids_are_taken_as_they_are(ids):
    encoded = encode_prompt(None, ids, vocab_size=256)
    assert encoded == EncodedPrompt([5, 0, 255], ())
    assert {type(token) for token in encoded.token_ids} == {int}


def test_text_gets_the_tokens_the_tokenizer_adds(tokenizer):
    assert encode_prompt(tokenizer, "hi", vocab_size=256) == EncodedPrompt(list(b"hi"), ())
    backend = byte_tokenizer().backend_tokenizer
    adding = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", add_bos_token=True)
    assert encode_prompt(adding, "hi", vocab_size=256).token_ids == [254, *b"hi"]


def test_chat_template_text_gets_no_second_bos():
    backend = byte_tokenizer()
    adding = PreTrainedTokenizerFast(
        tokenizer_object=backend.backend_tokenizer,
        bos_token="<|im_start|>",
        add_bos_token=True,
        chat_template="{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}",
    )
    encoded = encode_prompt(adding, CHAT, vocab_size=256)
    assert encoded.token_ids == [254, *b"What is 12 + 7?", 255, *b"It is 19.", 255, *b"And 2024?", 255]
    assert encoded.unedited_spans == ((17, 27),)


def test_messages_are_rendered(tokenizer):
    assert encode_prompt(tokenizer, CHAT, vocab_size=256) == render_chat(tokenizer, CHAT)
    without = encode_prompt(tokenizer, CHAT, vocab_size=256, add_generation_prompt=False)
    assert not tokenizer.decode(without.token_ids).endswith("assistant\n")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        (np.array([], np.int32), "the prompt is empty"),
        ([1, 256], "token id 256 is outside the model's vocabulary; allowed: 0 to 255"),
        ([-1], "token id -1 is outside"),
        ([1, True], "holds True"),
        ([1.0], "holds 1.0"),
        (np.array([1.5]), "holds .*1.5"),
        ([CHAT[0], 3], "holds {'role'.*integers only"),
        (["hi"], "holds 'hi'"),
        (3, "type int is not allowed; give text, token ids or messages"),
        (None, "type NoneType"),
        (b"hi", "type bytes is not allowed"),
        ({"role": "user", "content": "hi"}, "type dict is not allowed"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_bad_prompts_are_refused(tokenizer, prompt, message):
    with pytest.raises(RequestError, match=message):
        encode_prompt(tokenizer, prompt, vocab_size=256)


def test_text_outside_a_smaller_vocabulary_is_refused(tokenizer):
    with pytest.raises(RequestError, match="token id 104 is outside"):
        encode_prompt(tokenizer, "hi", vocab_size=100)


@pytest.mark.parametrize("prompt", ["hi", CHAT])
def test_text_without_a_tokenizer(prompt):
    with pytest.raises(RequestError, match="no tokenizer; give the prompt as token ids"):
        encode_prompt(None, prompt, vocab_size=256)


def test_encoded_prompt_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EncodedPrompt([1], ()).token_ids = []
