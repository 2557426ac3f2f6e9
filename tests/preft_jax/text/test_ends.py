"""What ends an answer: configuration, tokenizer and chat template, in models of several lines."""

import logging

import pytest
import text_tokenizers as kinds
from tokenizers import AddedToken

from preft_jax import ModelError
from preft_jax.text.chat import encode_answer, render_chat
from preft_jax.text.ends import end_token_ids, through_end, turn_end

pytestmark = pytest.mark.host

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATML
ALPACA = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"

LINES = {
    "ChatML": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "Phi-3": (PHI3, ["<|user|>", "<|assistant|>", "<|end|>"], "<|end|>"),
    "Llama 3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "Llama 2": (LLAMA2, [], "</s>"),
    "Gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "a system message first": (NEEDS_SYSTEM, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "no special token": (ALPACA, [], None),
    "ChatML in letters": (CHATML, [], None),
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "a <unk> b"},
]


def chat_model(line, kind="llama 2", special=True):
    """Return a base model's tokenizer with the template and the added tokens of a chat fine-tune."""
    template, added, _ = LINES[line]
    tokenizer = kinds.KINDS[kind](chat_template=template)
    for token in added:
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)], special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("line", LINES)
def test_the_token_with_which_the_template_ends_an_answer_ends_answers(line, special):
    tokenizer = chat_model(line, special=special)
    found, expected = turn_end(tokenizer), LINES[line][2]
    assert (found and found.token) == expected
    ends = end_token_ids((7,), tokenizer, len(tokenizer), "m")
    own = tokenizer.convert_tokens_to_ids([token for token in ("</s>", expected) if token])
    assert ends == tuple(dict.fromkeys((7, *own)))


@pytest.mark.parametrize("line", [line for line in LINES if LINES[line][2] is not None])
def test_an_answer_ends_with_the_end_of_its_turn_and_nothing_behind_it(line):
    tokenizer = chat_model(line)
    chats = [CHAT[:3], CHAT] if line != "Gemma" else [CHAT[1:3], CHAT[1:]]
    for chat in chats:
        prompt, answer = encode_answer(tokenizer, chat)
        assert prompt == render_chat(tokenizer, chat[:-1])
        end = turn_end(tokenizer).token_id
        assert (answer[-1], answer.count(end)) == (end, 1)
        whole = render_chat(tokenizer, chat, add_generation_prompt=False)
        known = [*prompt.token_ids, *answer]
        assert whole.token_ids[: len(known)] == known
        assert whole.unedited_spans[-1] == (len(prompt.token_ids), len(known))
        assert len(whole.unedited_spans) == sum(message["role"] == "assistant" for message in chat)


def test_configuration_tokenizer_and_template_together():
    tokenizer = chat_model("Phi-3")
    end, eos = tokenizer.convert_tokens_to_ids(["<|end|>", "</s>"])
    assert end_token_ids((), tokenizer, len(tokenizer), "m") == (eos, end)
    assert end_token_ids((end, 9), tokenizer, len(tokenizer), "m") == (end, 9, eos)
    assert end_token_ids((9, 9), None, 10, "m") == (9,)
    tokenizer.chat_template = None
    assert end_token_ids((), tokenizer, len(tokenizer), "m") == (eos,)
    tokenizer.chat_template = LINES["Gemma"][0]  # Another template: not the answer of the first.
    assert turn_end(tokenizer) is None


def test_what_cannot_be_generated_is_left_out_and_said(caplog):
    tokenizer = chat_model("ChatML")
    with caplog.at_level(logging.WARNING, "preft.models"):
        assert end_token_ids((2, 9_999, -1), tokenizer, len(tokenizer) - 1, "base") == (2,)
    assert "base names the end token 9999" in caplog.text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "m has a chat template that cannot be read .line 1.*endfor"),
        ("{{ messages | nonsense }}", "cannot be read .*nonsense"),
        ("{{ 'a' ", "cannot be read"),
    ],
)
def test_a_template_that_is_none_is_an_error_at_load(template, message):
    tokenizer = kinds.llama2(chat_template=template)
    with pytest.raises(ModelError, match=message):
        end_token_ids((), tokenizer, 400, "m")


def test_a_template_that_fails_is_said(caplog):
    tokenizer = kinds.llama2(chat_template="{{ messages[0].content + 1 }}")
    with caplog.at_level(logging.WARNING, "preft.models"):
        assert end_token_ids((), tokenizer, 400, "m") == (2,)
    assert "refuses a question with its answer" in caplog.text


def test_through_the_first_end():
    assert [through_end(ids, (7, 8)) for ids in ([], [1, 2], [1, 8, 7], [7, 1], [1, 2, 7])] == [0, 2, 2, 1, 3]
