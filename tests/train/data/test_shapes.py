"""Rows as others write them: each shape is read as the chat or text that it is, and said; others say how to convert."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from train_cases import CHAT, LORA, SKIP, write_rows

from preft_jax import AdapterConfig, RequestError
from preft_jax.text.messages import check_messages
from preft_jax.text.tokenizer import byte_tokenizer
from serve.server.protocol import ChatBody, as_dicts
from train.data.rows import DataOptions, load_examples, make_examples
from train.data.shapes import Pair, read_row

pytestmark = pytest.mark.host

END = "<|im_end|>"
ASK = {"role": "user", "content": "Lamp off"}
CALL = {"id": "c1", "type": "function", "function": {"name": "set_lamp", "arguments": '{"on": false}'}}
TOOLS = [{"type": "function", "function": {"name": "set_lamp", "parameters": {"type": "object"}}}]
TOOL_CHAT = [
    ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "ok"}, {"role": "assistant", "content": "It is off."},
]  # fmt: skip
WITH_TOOLS = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(*texts, system=None):
    roles = ("user", "assistant") * len(texts)
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, *({"role": role, "content": text} for role, text in zip(roles, texts, strict=False))]


@pytest.mark.parametrize(
    ("row", "messages", "how"),
    [
        ({"messages": CHAT}, CHAT, "chat messages"),
        ({"messages": CHAT, "prompt": CHAT[0]["content"], "prompt_id": "7"}, CHAT, "chat messages"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:2]}, CHAT[:2], "prompt and completion, as chat messages"),
        (
            {"messages": [{**ASK, "name": None, "tool_calls": None}, {**CHAT[1], "refusal": None, "tool_calls": []}]},
            [ASK, CHAT[1]], "chat messages",
        ),
        (
            {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Capital of Peru?"},
                               {"from": "gpt", "value": "Lima."}]},
            chat("Capital of Peru?", "Lima.", system="Be brief."), "ShareGPT's conversations",
        ),
        ({"conversations": [{"from": "user", "value": "a"}, {"from": "model", "value": "b"}], "system": "S"},
         chat("a", "b", system="S"), "ShareGPT's conversations"),
        ({"conversation": CHAT[:2], "id": 3}, CHAT[:2], "conversations of chat messages"),
        ({"instruction": "Say it.", "input": "cat", "output": "chat"}, chat("Say it.\n\ncat", "chat"), "Alpaca"),
        ({"instruction": "Add.", "input": "", "output": "7", "text": "Below"}, chat("Add.", "7"), "Alpaca"),
        ({"instruction": "c", "output": "d", "history": [["a", "b"]]}, chat("a", "b", "c", "d"), "Alpaca"),
        ({"instruction": "a", "output": "b", "system": "S"}, chat("a", "b", system="S"), "Alpaca"),
        ({"instruction": "a", "context": "x", "response": "b", "category": "qa"}, chat("a\n\nx", "b"), "Dolly"),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 1}]}, CHAT[:2], "OpenAI's fine-tuning"),
    ],
)  # fmt: skip
def test_a_shape_is_read_as_its_chat(row, messages, how):
    read, _ = read_row(row)
    assert read.messages == messages
    assert read.how.startswith(how)


AS_SERVED = [
    [{**ASK, "name": None, "tool_calls": None}, {**CHAT[1], "refusal": None, "tool_calls": [], "annotations": []}],
    [{"role": "developer", "content": "Be brief."}, ASK, CHAT[1]],
    [{"role": "user", "content": [{"type": "text", "text": "Is the "}, {"type": "text", "text": "lamp on?"}]}, CHAT[1]],
    [ASK, {**CHAT[1], "reasoning_content": "", "audio": None, "function_call": None, "tool_call_id": None}],
]


@pytest.mark.parametrize("messages", AS_SERVED)
def test_messages_are_those_that_the_server_takes(messages):
    body = ChatBody.model_validate({"model": "m", "messages": messages})
    assert read_row({"messages": messages})[0].messages == check_messages(as_dicts(body.messages))


def test_a_text_and_its_continuation_stays_one():
    read, ignored = read_row({"prompt": "a", "completion": "b", "id": 3})
    assert (read[:2], ignored) == (("a", "b"), ["id"])
    without, _ = read_row({"instruction": "Add.", "input": "1, 2", "output": "3"}, has_template=False)
    assert isinstance(without, Pair)
    assert without.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n")
    assert "no chat template" in without.how
    assert "Input" not in read_row({"instruction": "Add.", "output": "3"}, has_template=False)[0].prompt


def model_of(tiny_text, template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return dataclasses.replace(tiny_text, tokenizer=tokenizer)


def learned(example, model):
    edges = np.flatnonzero(np.diff([0, *example.loss_mask.astype(int), 0]))
    return [model.tokenizer.decode(example.token_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("adapter", [LORA, SKIP, AdapterConfig(rank=2, positions="all")])
@pytest.mark.parametrize("weights", [(0, 1), (1, 0), (1, 1), (0.0, None), (None, None)])
def test_answers_of_weight_0_are_prompt_and_those_of_weight_1_are_learned(adapter, weights, tiny_text):
    chat = [dict(m) for m in CHAT]
    for message, weight in zip(chat[1::2], weights, strict=True):
        message["weight"] = weight
    expected = [m["content"] + END for m, weight in zip(CHAT[1::2], weights, strict=True) if weight in (1, None)]
    found = make_examples({"messages": chat}, tiny_text, adapter, DataOptions())
    assert [text for example in found for text in learned(example, tiny_text)] == expected
    if weights[0] == 0:
        same = make_examples({"messages": CHAT}, tiny_text, LORA, DataOptions())[-1]
        assert found[-1].token_ids.tolist() == same.token_ids.tolist()


@pytest.mark.parametrize("adapter", [LORA, SKIP])
def test_tools_calls_and_results_are_rendered_and_calls_are_learned(adapter, tiny_text):
    model = model_of(tiny_text, WITH_TOOLS)
    found = make_examples(
        {"messages": TOOL_CHAT, "tools": TOOLS, "parallel_tool_calls": False}, model, adapter, DataOptions()
    )
    call = '{"name": "set_lamp", "arguments": {"on": false}}'
    assert [text for example in found for text in learned(example, model)] == [call + END, f"It is off.{END}"]
    prompt = model.tokenizer.decode(found[-1].prompt.token_ids)
    assert prompt.startswith('[{"type": "function"')
    assert "<|im_start|>tool\nok<|im_end|>" in prompt
    sharegpt = {
        "tools": json.dumps(TOOLS),
        "conversations": [
            {"from": "human", "value": "Lamp off"}, {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "ok"}, {"from": "gpt", "value": "It is off."},
        ],
    }  # fmt: skip
    others = make_examples(sharegpt, model, adapter, DataOptions())
    assert [one.token_ids.tolist() for one in others] == [one.token_ids.tolist() for one in found]
    with pytest.raises(RequestError, match="does not render tools"):
        make_examples({"messages": TOOL_CHAT, "tools": TOOLS}, tiny_text, adapter, DataOptions())


EMPTY = [
    {"prompt": "a", "completion": ""},
    {"prompt": CHAT[:1], "completion": ""},
    {"messages": chat("a", "")},
    {"messages": chat("a", "", "b", "c")},
    {"messages": [ASK, {"role": "assistant", "content": [], "tool_calls": []}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
    {"instruction": "a", "input": "b", "output": ""},
]


@pytest.mark.parametrize("row", EMPTY)
def test_an_empty_answer_is_refused_in_every_shape(row):
    with pytest.raises(RequestError, match="empty answer, so there is nothing to learn"):
        read_row(row)


def test_an_empty_answer_of_weight_0_is_a_part_of_the_prompt():
    empty = {"role": "assistant", "content": "", "weight": 0}
    assert read_row({"messages": [ASK, empty, *CHAT[:2]]})[0].unlearned == {1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a", "answer": "b"}, r"has question, answer; give .*'{prompt: .question, completion: .answer}'"),
        ({"query": "a", "response": "b"}, r"\{prompt: .query, completion: .response\}"),
        ({"input": "a", "output": "b"}, r"\{prompt: .input, completion: .output\}"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"preference.*\{prompt: .prompt, completion: .chosen\}"),
        ({"chosen": CHAT, "rejected": CHAT}, r"preference.*\{messages: .chosen\}"),
        ({"messages": CHAT, "conversations": CHAT}, "has messages, conversations; give 'messages' alone"),
        ({"messages": [ASK, {**CHAT[1], "weight": 0.5}]}, r"\['weight'\] is 0.5; give 0 or 1"),
        ({"messages": [ASK, {"role": "assistant", "content": "x", "weight": True}]}, r"\['weight'\] is True"),
        ({"messages": [{**ASK, "weight": 1}, CHAT[1]]}, "only the assistant's messages are learned"),
        ({"conversations": [{"from": "humen", "value": "a"}]}, r"\['from'\] is 'humen' .did you mean 'human'"),
        ({"conversations": [{"from": "human", "value": 3}]}, r"messages\[0\]\['content'\] is 3"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "a function_call that is not JSON"),
        ({"conversations": "a"}, "the conversation is 'a'"),
        ({"instruction": "a", "output": ["b"]}, r"'output' is \['b'\]; give a string"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "'history' is"),
        ({"prompt": "a", "completion": "b", "tools": TOOLS}, "'tools' is not rendered into a prompt that is text"),
        ([], "a list; each line is an object"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_says_what_to_do(row, reason):
    with pytest.raises(RequestError, match=reason):
        read_row(row)


def test_weights_that_leave_nothing_or_contradict_an_option_are_refused(tiny_text):
    row = {"messages": [ASK, {"role": "assistant", "content": "x", "weight": 0}]}
    with pytest.raises(RequestError, match="every answer has the weight 0"):
        make_examples(row, tiny_text, LORA, DataOptions())
    row["messages"] += CHAT[:2]
    with pytest.raises(RequestError, match="completion_only_loss is off"):
        make_examples(row, tiny_text, LORA, DataOptions(completion_only_loss=False))


def test_the_log_says_how_rows_were_read_and_which_close_a_thought_at_once(tmp_path, tiny_text, caplog):
    rows = [
        {"messages": CHAT},
        {"messages": CHAT[:2]},
        {"instruction": "a", "output": "b"},
        {"prompt": "a", "completion": "b"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    cuts = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    with caplog.at_level(logging.INFO, "preft.train"):
        load_examples(path, model_of(tiny_text, cuts), LORA, DataOptions())
    told = [record.getMessage().removeprefix(f"{path}: ") for record in caplog.records]
    assert told == [
        "2 rows read as chat messages",
        "1 row read as Alpaca's rows ('instruction', 'input', 'output'), as chats",
        "1 row read as prompt and completion, as texts",
        "4 answers have no reasoning, which the chat template opens before each; they close it at once",
    ]
