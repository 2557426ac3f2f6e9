"""Datasets that are refused, with file, line and reason."""

import dataclasses
import json
import logging

import pytest
import train_cases as cases
from train_cases import CHAT, LORA, SKIP

from preft_jax.text.tokenizer import byte_tokenizer
from train.data.errors import DataError
from train.data.rows import DataOptions, load_examples

pytestmark = pytest.mark.host

ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GOOD = {"prompt": "a", "completion": "b"}


def refusal(tmp_path, lines, model, adapter=LORA, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(DataError) as caught:
        load_examples(path, model, adapter, DataOptions(**options))
    assert str(path) in str(caught.value)
    return str(caught.value).removeprefix(str(path))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not JSON"),
        pytest.param("[" * 100_000, "not JSON", id="deep"),
        ("[1]", "a list; each line is an object"),
        ({"text": "a b"}, "'text' does not say where the prompt ends"),
        ({**GOOD, "text": "a b"}, "'text' does not say where the prompt ends"),
        (
            {**GOOD, "id": 5, "tools": [{"name": "lamp"}]},
            "'tools' is not rendered into a prompt that is text; give the prompt as chat messages",
        ),
        ({"messages": CHAT, "images": ["a.png"]}, "'images' is no text"),
        (
            {**GOOD, "chat_template_kwargs": {"enable_thinking": False}},
            "'chat_template_kwargs' is not given to the chat template",
        ),
        ({**GOOD, "completion_mask": [0, 1]}, "'completion_mask' is made here"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'chosen' is part of a preference"),
        ({"id": 5, "source": "web"}, "has id, source; give 'messages' alone"),
        ({f"column{i}": i for i in range(10)}, "column7 and 2 more; give"),
        ({"mesages": CHAT, "id": 5}, r"has mesages \(did you mean 'messages'\?\), id; give"),
        ({"prompt": "a", "completion": None}, "has prompt; give 'messages' alone"),
        ({"messages": CHAT, "prompt": "a"}, "give 'messages' alone"),
        ({"prompt": "a", "completions": "b"}, "did you mean 'completion'"),
        ({"prompt": "a"}, "has prompt; give 'messages' alone, or"),
        ({}, "has nothing; give"),
        ({**GOOD, "messages": CHAT}, "give 'messages' alone"),
        ({"prompt": "a", "completion": ""}, "nothing to learn"),
        ({"prompt": "", "completion": "b"}, "the prompt is empty"),
        ({"prompt": "a", "completion": 5}, "completion is a int"),
        ({"prompt": "a", "completion": "\ud800"}, "not valid Unicode"),
        ({"prompt": CHAT[:1], "completion": CHAT[:2]}, "one message of the assistant"),
        ({"prompt": CHAT[:1], "completion": CHAT[:1]}, "one message of the assistant"),
        ({"prompt": [97], "completion": "b"}, r"messages\[0\] is 97"),
        ({"messages": []}, "give a list of at least one"),
        ({"messages": CHAT[:1]}, "nothing to learn"),
        ({"messages": CHAT[1:2]}, "nothing to learn"),
        ({"messages": [*CHAT, {"role": "assistent", "content": ""}]}, "did you mean 'assistant'"),
        ({"messages": [{"role": "user", "contents": "a"}]}, "did you mean 'content'"),
        ({"prompt": "a" * 40, "completion": "b"}, "41 tokens and max_length is 40"),
    ],
)
def test_a_line_that_cannot_be_learned_is_refused_with_its_number_and_the_reason(row, reason, tmp_path, tiny_text):
    line = row if isinstance(row, str) else json.dumps(row)
    told = refusal(tmp_path, [json.dumps(GOOD), "", line, "{"], tiny_text, max_length=40)
    assert told.startswith(":3: ")
    with pytest.raises(DataError, match=reason):
        raise DataError(told)


@pytest.mark.parametrize(("name", "data"), [("none", None), ("latin", b'{"prompt": "\xe9"}\n'), ("empty", b"\n \n")])
def test_a_file_that_gives_no_rows_is_named(name, data, tmp_path, tiny_text):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=f"{name} (cannot be read|has no lines)"):
        load_examples(path, tiny_text, LORA, DataOptions())


def test_examples_know_their_lines(tmp_path, tiny_text):
    path = cases.write_rows(tmp_path / "rows.jsonl", [GOOD, {"messages": CHAT}, GOOD])
    path.write_text("\n" + path.read_text())
    assert [example.line for example in load_examples(path, tiny_text, LORA, DataOptions())] == [2, 3, 3, 4]


def test_columns_that_are_not_needed_are_ignored_and_named_once(tmp_path, tiny_text, caplog):
    plain = [GOOD, {"messages": CHAT}, GOOD, GOOD]
    beside = [{"id": 1}, {"source\n": "web", "tools": []}, {"id": 2, "tools": None, "messages": None}, {"text": ""}]
    rows = [row | more for row, more in zip(plain, beside, strict=True)]
    caplog.set_level(logging.WARNING, "preft.train")
    examples = load_examples(cases.write_rows(tmp_path / "rows.jsonl", rows), tiny_text, LORA, DataOptions())
    (record,) = caplog.records
    assert record.getMessage() == f"{tmp_path / 'rows.jsonl'}: ignored columns: id, source\\n, text"
    expected = load_examples(cases.write_rows(tmp_path / "plain.jsonl", plain), tiny_text, LORA, DataOptions())
    assert [one.token_ids.tolist() for one in examples] == [one.token_ids.tolist() for one in expected]
    assert len(caplog.records) == 1, "nothing is ignored there"


def test_examples_whose_answer_is_cut_off_are_left_out_and_counted(tmp_path, tiny_text, caplog):
    rows = [{"prompt": "abcdef", "completion": "b"}, {"prompt": "a", "completion": "bcdefgh"}, GOOD]
    path = cases.write_rows(tmp_path / "rows.jsonl", rows)
    kept = load_examples(path, tiny_text, LORA, DataOptions(max_length=5, truncate=True))
    assert [(example.line, len(example)) for example in kept] == [(2, 5), (3, 2)]
    assert "1 examples have nothing to learn once they are cut" in caplog.text
    assert "no example with an answer within max_length" in refusal(
        tmp_path, [json.dumps(rows[0])], tiny_text, max_length=5, truncate=True
    )


def test_a_template_that_refuses_the_answer_is_told_with_the_line(tmp_path, tiny_text):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ALTERNATES
    told = refusal(
        tmp_path, [json.dumps({"messages": [*CHAT[:2], CHAT[3]]})], dataclasses.replace(tiny_text, tokenizer=tokenizer)
    )
    assert told.startswith(":1: ")
    assert "roles must alternate" in told


def test_a_model_without_tokenizer_is_told(tmp_path, tiny_text):
    for row in (GOOD, {"messages": CHAT}):
        assert "tokenizer" in refusal(tmp_path, [json.dumps(row)], dataclasses.replace(tiny_text, tokenizer=None))


@pytest.mark.parametrize(
    ("row", "vocab_size", "token"),
    [
        ({"prompt": "a🦉", "completion": "b"}, 240, 240),
        ({"prompt": "a", "completion": "🦉"}, 240, 240),
        ({"messages": CHAT[:2]}, 254, 255),
        ({"messages": CHAT}, 255, 255),
    ],
)
@pytest.mark.parametrize("adapter", [LORA, SKIP])
def test_tokens_that_the_model_does_not_have_are_refused(row, vocab_size, token, adapter, tmp_path, tiny_text):
    smaller = dataclasses.replace(tiny_text, config=dataclasses.replace(tiny_text.config, vocab_size=vocab_size))
    assert f"token id {token} is outside the model's vocabulary" in refusal(
        tmp_path, [json.dumps(row)], smaller, adapter
    )
