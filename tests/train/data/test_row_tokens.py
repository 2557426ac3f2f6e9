"""Tokens of training rows for tokenizers that add something: the served prompt, the rest of the whole text, one end."""

import dataclasses
import itertools

import numpy as np
import pytest
import text_tokenizers as kinds
from tokenizers import AddedToken

from preft_jax.adapters.config import AdapterConfig
from preft_jax.text.chat import encode_prompt
from preft_jax.text.detokenizer import detokenizer_of
from preft_jax.text.ends import end_token_ids
from preft_jax.text.streams import TextStream
from train.data.rows import DataOptions, make_examples

pytestmark = pytest.mark.host

LORA = AdapterConfig(rank=2)
SKIP = AdapterConfig(rank=2, assistant_turns="skip")
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "the lo"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "a b."},
]


def model_of(tiny_text, tokenizer, configured=()):
    size = len(tokenizer)
    ends = end_token_ids(configured, tokenizer, size, "m")
    config = dataclasses.replace(tiny_text.config, vocab_size=size, eos_token_ids=ends)
    return dataclasses.replace(tiny_text, config=config, tokenizer=tokenizer)


PAIRS = [
    ("hello the", "!"),
    ("2. ", "4"),
    ("the", " lo"),
    ("ab", "cd"),
    ("a\n", "b"),
    ("日本", "é 😀"),
    ("<s>hello", " a"),
]


@pytest.mark.parametrize("around", ["<s> $A </s>", "$A </s>", "<s> $A", "$A"])
@pytest.mark.parametrize("kind", ["llama 2", "gemma", "metaspace first", "metaspace always"])
def test_a_pair_is_the_whole_text_behind_one_beginning_and_before_one_end(kind, around, tiny_text):
    tokenizer = kinds.with_template(kinds.KINDS[kind](), around)
    model, tokens = model_of(tiny_text, tokenizer), detokenizer_of(tokenizer)
    for prompt, completion in PAIRS:
        (row,) = make_examples({"prompt": prompt, "completion": completion}, model, LORA, DataOptions())
        served = encode_prompt(tokenizer, prompt, vocab_size=len(tokenizer)).token_ids
        assert row.prompt.token_ids == served
        assert row.token_ids.tolist() == [*served, *row.answer]
        assert row.answer[-1] == tokenizer.eos_token_id
        begins = ("<s>" in around or prompt.startswith("<s>")) * [1]
        assert [token for token in row.token_ids if token in (1, 2)] == [*begins, 2]
        whole = tokenizer.encode(prompt + completion, add_special_tokens=False)
        assert tokens.decode(row.token_ids) == tokens.decode(whole)
        # What is learned is what the server says when it is generated.
        stream = TextStream(tokenizer, continues=True)
        assert stream.push(row.answer[:-1])[0] + stream.finish() == completion


@pytest.mark.parametrize("adapter", [LORA, SKIP])
def test_nothing_behind_the_end_of_a_turn_is_learned(adapter, tiny_text):
    tokenizer = kinds.llama2(chat_template=PHI3)
    marks = [AddedToken(token, special=True, normalized=False) for token in ("<|user|>", "<|assistant|>")]
    tokenizer.add_tokens(marks, special_tokens=True)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for configured in ((2,), (end,), ()):
        model = model_of(tiny_text, tokenizer, configured)
        assert set(model.config.eos_token_ids) == {2, end}
        rows = make_examples({"messages": CHAT}, model, adapter, DataOptions())
        assert len(rows) == (2 if adapter is LORA else 1)
        learned = [row.token_ids[row.loss_mask].tolist() for row in rows]
        assert not {2} & set(itertools.chain(*learned))
        assert [ids[-1] for ids in learned] == [end] * len(rows)
        assert sum(ids.count(end) for ids in learned) == 2
        for row in rows:
            assert row.token_ids[-1] == end
            assert row.answer[-1] == end


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("ab", "ab</s>"),
        ("ab</s>", "ab</s>"),
        ("ab</s>\n", "ab</s>"),
        ("ab<|end|>\nhello</s>", "ab<|end|>"),
        ("</s>a", "</s>"),
    ],
)
def test_a_completion_is_learned_through_its_first_end(completion, expected, tiny_text):
    tokenizer = kinds.gemma(chat_template="{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
    model = model_of(tiny_text, tokenizer)
    (row,) = make_examples({"prompt": "hello", "completion": completion}, model, LORA, DataOptions())
    assert detokenizer_of(tokenizer).decode_after(row.answer, special=True) == expected
    assert row.loss_mask.tolist() == [False] * len(row.prompt.token_ids) + [True] * len(row.answer)


def test_an_answer_that_holds_an_end_is_learned_through_it(tiny_text):
    tokenizer = kinds.llama2(chat_template=PHI3)
    model = model_of(tiny_text, tokenizer)
    chat = [CHAT[0], {"role": "assistant", "content": "a</s>b"}, *CHAT[2:]]
    for adapter in (LORA, SKIP):
        rows = make_examples({"messages": chat}, model, adapter, DataOptions())
        learned = np.concatenate([row.token_ids[row.loss_mask] for row in rows]).tolist()
        ends = tokenizer.convert_tokens_to_ids(["</s>", "<|end|>"])
        assert [token for token in learned if token in ends] == ends
