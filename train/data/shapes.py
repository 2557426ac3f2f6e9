"""The shapes in which rows are written, and what each is read as: a chat, or a text and its continuation.

Every shape becomes one of the two, with the same rules for what is learned and what is empty.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from preft_jax.errors import RequestError, did_you_mean, plain, shown
from preft_jax.text.messages import check_messages, check_tools

_NOT_TEXT = "is no text, and the model reads and writes nothing else; leave such rows out"
_MADE_HERE = "is made here, from the text; leave it out"
_PREFERENCE = "is part of a preference, and here one answer is learned; give that one as 'completion'"
REFUSED = {
    "text": (
        "does not say where the prompt ends, and a prefill-only adapter acts on the prompt alone; give 'prompt' and "
        "'completion', or 'messages'"
    ),
    "chat_template_kwargs": "is not given to the chat template; leave it out",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _NOT_TEXT),
    **dict.fromkeys(("input_ids", "completion_mask", "assistant_masks"), _MADE_HERE),
    **dict.fromkeys(("chosen", "rejected"), _PREFERENCE),
}
"""Columns that give a row another meaning than its text has -> why they are refused; other columns are ignored."""

_FORMS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "chat": (("messages",), ("tools", "functions")),
    "pair": (("prompt", "completion"), ("tools", "functions")),
    "sharegpt": (("conversations",), ("system", "tools")),
    "conversation": (("conversation",), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system", "history", "text")),
    "dolly": (("instruction", "response"), ("context", "system")),
}
"""Form -> the columns that it must have, and those that it may have."""

_COLUMNS = tuple(dict.fromkeys(name for own, optional in _FORMS.values() for name in own + optional))

_KNOWN = ("messages", "prompt", "completion")
"""Columns beside which there is no other form."""

_CONVERTED = (
    ("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer"), ("input", "output"),
    ("problem", "solution"), ("prompt", "response"), ("prompt", "answer"), ("prompt", "output"), ("prompt", "chosen"),
    ("source", "target"), ("instruction", "answer"), ("instruction", "completion"),
)  # fmt: skip
"""Pairs of columns of other datasets that are a prompt and its completion."""

_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool", "tool_response": "tool", "function_call": "function_call",
}  # fmt: skip
"""Who speaks in ShareGPT's conversations -> the role."""

_MOST_NAMED = 8


class Chat(NamedTuple):
    """A chat of which answers are learned.

    Attributes:
        messages: as ``check_messages`` returns them.
        unlearned: indices of the answers that are not learned.
        tools: as ``check_tools`` returns them.
        how: how the row was read, for people.
    """

    messages: list[dict[str, Any]]
    unlearned: frozenset[int]
    tools: list[dict[str, Any]]
    how: str


class Pair(NamedTuple):
    """A text and how it goes on; ``how``: how the row was read, for people."""

    prompt: str
    completion: str
    how: str


def read_row(row: Any, *, has_template: bool = True) -> tuple[Chat | Pair, list[str]]:
    """Return what a row is read as, and the columns that were ignored.

    Args:
        row: of a dataset; a column that is null is as if it were not there.
        has_template: whether the tokenizer has a chat template; without one Alpaca's rows are texts.

    Raises:
        RequestError: for a row of no known shape, saying how to convert it where that can be told; or one whose content
            is malformed.
    """
    if not isinstance(row, Mapping):
        raise RequestError(
            f"a {type(row).__name__}; each line is an object with 'messages', or 'prompt' and 'completion'"
        )
    row = {str(name): value for name, value in row.items() if value is not None}
    forms = [form for form, (own, _) in _FORMS.items() if all(name in row for name in own)]
    own, optional = _FORMS[forms[0]] if forms else ((), ())
    for name, reason in REFUSED.items():
        if name not in optional and row.get(name, "") not in ("", [], {}):
            raise RequestError(f"{name!r} {reason}{_conversion(row)}")
    form = _only(forms, row)
    read = {
        "chat": _chat, "pair": _pair, "sharegpt": _conversation, "conversation": _conversation, "alpaca": _alpaca,
        "dolly": _alpaca,
    }[form](row, has_template)  # fmt: skip
    used = {*own, *(optional if isinstance(read, Chat) or form == "alpaca" else ())}
    return read, [name for name in row if name not in used]


def _only(forms: list[str], row: Mapping[str, Any]) -> str:
    """Return the form of a row that has exactly one."""
    spare = [name for name in _KNOWN if name in row and (not forms or name not in _FORMS[forms[0]][0])]
    if forms == ["chat"] and spare == ["prompt"] and _begins_with(row["messages"], row["prompt"]):
        return "chat"
    if len(forms) == 1 and not spare:
        return forms[0]
    names = [name for form in forms for name in _FORMS[form][0]] if len(forms) > 1 else list(row)
    found = [plain(name) + ("" if name in _COLUMNS else did_you_mean(name, _KNOWN)) for name in names]
    raise RequestError(
        f"has {listed(found) or 'nothing'}; give 'messages' alone, or 'prompt' and 'completion', or ShareGPT's "
        f"'conversations', or Alpaca's 'instruction', 'input' and 'output'{'' if forms else _conversion(row)}"
    )


def _begins_with(messages: Any, prompt: Any) -> bool:
    """Whether a prompt beside messages says again what the user asks first."""
    asked = [m.get("content") for m in messages if isinstance(m, Mapping) and m.get("role") == "user"]
    return bool(asked) and isinstance(prompt, str) and asked[0] == prompt


def _conversion(row: Mapping[str, Any]) -> str:
    """Return how to convert a row of other columns, or an empty string."""
    if isinstance(row.get("chosen"), list) and "prompt" not in row:
        return "; to convert JSON lines: `jq -c '{messages: .chosen}' FILE > rows.jsonl`"
    pair = next((pair for pair in _CONVERTED if all(name in row for name in pair)), None)
    if pair is None:
        return ""
    return (
        f"; rename {pair[0]} to prompt and {pair[1]} to completion (JSON lines: `jq -c '{{prompt: .{pair[0]}, "
        f"completion: .{pair[1]}}}' FILE > rows.jsonl`)"
    )


def listed(names: list[str]) -> str:
    """Return the first few names as a text."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _chat(row: Mapping[str, Any], has_template: bool) -> Chat:
    messages, unlearned, weighted = _weighed(row["messages"])
    tools = check_tools(row.get("tools") or row.get("functions"))
    openai = weighted or tools or any("tool_calls" in message for message in messages)
    how = (
        "OpenAI's fine-tuning rows (messages with weight, tools or tool calls), as chats; answers of weight 0 are not "
        "learned"
        if openai
        else "chat messages"
    )
    return _learnable(Chat(messages, unlearned, tools, how))


def _weighed(messages: Any) -> tuple[list[dict[str, Any]], frozenset[int], bool]:
    """Return messages without their weights, the answers of weight 0, and whether there are weights."""
    if not isinstance(messages, list):
        return check_messages(messages), frozenset(), False
    weights = {i: m["weight"] for i, m in enumerate(messages) if isinstance(m, Mapping) and m.get("weight") is not None}
    checked = check_messages(
        [{k: v for k, v in m.items() if k != "weight"} if isinstance(m, Mapping) else m for m in messages]
    )
    for index, weight in weights.items():
        if isinstance(weight, bool) or weight not in (0, 1):
            raise RequestError(f"messages[{index}]['weight'] is {shown(weight)}; give 0 or 1")
        if weight and checked[index]["role"] != "assistant":
            raise RequestError(f"messages[{index}]['weight'] is 1, and only the assistant's messages are learned")
    return checked, frozenset(index for index, weight in weights.items() if not weight), bool(weights)


def _learnable(chat: Chat) -> Chat:
    """Return a chat, each learned answer of which has something to learn."""
    for index, message in enumerate(chat.messages):
        learned = message["role"] == "assistant" and index > 0 and index not in chat.unlearned
        if learned and not message["content"] and "tool_calls" not in message:
            raise RequestError(
                f"messages[{index}] is an empty answer, so there is nothing to learn; give it a text or the weight 0, "
                "or leave the row out"
            )
    return chat


def _pair(row: Mapping[str, Any], has_template: bool) -> Chat | Pair:
    prompt, completion = row["prompt"], row["completion"]
    tools = row.get("tools") or row.get("functions")
    if isinstance(prompt, str):
        if tools:
            raise RequestError("'tools' is not rendered into a prompt that is text; give the prompt as chat messages")
        return _text_pair(prompt, completion, "prompt and completion, as texts")
    asked, _, _ = _weighed(prompt)
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    answer, unlearned, _ = _weighed(answer)
    if len(answer) != 1 or answer[0]["role"] != "assistant" or unlearned:
        raise RequestError("the completion of a chat is one message of the assistant; give longer chats as 'messages'")
    earlier = frozenset(index for index, message in enumerate(asked) if message["role"] == "assistant")
    return _learnable(Chat([*asked, *answer], earlier, check_tools(tools), "prompt and completion, as chat messages"))


def _text_pair(prompt: str, completion: Any, how: str) -> Pair:
    if not isinstance(completion, str):
        raise RequestError(f"completion is a {type(completion).__name__}; a prompt that is text has one that is text")
    if not completion:
        raise RequestError("the completion is an empty answer, so there is nothing to learn; leave the row out")
    return Pair(prompt, completion, how)


def _with_system(messages: list[Any], system: Any) -> list[Any]:
    return [{"role": "system", "content": system}, *messages] if isinstance(system, str) and system else messages


def _conversation(row: Mapping[str, Any], has_template: bool) -> Chat:
    turns = row["conversations"] if "conversations" in row else row["conversation"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise RequestError(f"the conversation is {shown(turns)}; give a list of {{'from': ..., 'value': ...}}")
    sharegpt = any("from" in turn for turn in turns)
    messages = [_spoken(turn, index) for index, turn in enumerate(turns)] if sharegpt else list(turns)
    messages, unlearned, _ = _weighed(_with_system(messages, row.get("system")))
    how = "ShareGPT's conversations ('from', 'value')" if sharegpt else "conversations of chat messages"
    return _learnable(Chat(messages, unlearned, check_tools(row.get("tools")), f"{how}, as chats"))


def _spoken(turn: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return a turn of ShareGPT as a message."""
    where = f"conversations[{index}]"
    unknown = next((str(name) for name in turn if name not in ("from", "value", "weight") and turn[name]), None)
    if unknown is not None:
        raise RequestError(f"unknown field of {where} {shown(unknown)}; allowed: from, value, weight")
    speaker, value = turn.get("from"), turn.get("value")
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        near = did_you_mean(speaker, _SPEAKERS) if isinstance(speaker, str) else ""
        raise RequestError(f"{where}['from'] is {shown(speaker)}{near}; allowed: {', '.join(_SPEAKERS)}")
    weight = {"weight": turn.get("weight")}
    if role != "function_call":
        return {"role": role, "content": value, **weight}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is a function_call that is not JSON: {error}") from error
    return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls], **weight}


_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The prompt of Taori et al.'s Alpaca (github.com/tatsu-lab/stanford_alpaca)."""


def _alpaca(row: Mapping[str, Any], has_template: bool) -> Chat | Pair:
    alpaca = "output" in row
    answer_name, more_name = ("output", "input") if alpaca else ("response", "context")
    name = f"{'Alpaca' if alpaca else 'Dolly'}'s rows ('instruction', {more_name!r}, {answer_name!r})"
    instruction, more, answer = row["instruction"], row.get(more_name, ""), row[answer_name]
    for column, text in (("instruction", instruction), (more_name, more), (answer_name, answer)):
        if not isinstance(text, str):
            raise RequestError(f"{column!r} is {shown(text)}; give a string")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise RequestError(f"'history' is {shown(history)}; give a list of [question, answer]")
    if not has_template:
        if history or row.get("system"):
            raise RequestError("'history' and 'system' need a chat template, which the model's tokenizer does not have")
        parts = {"paired": ", paired with an input that provides further context", "input": f"### Input:\n{more}\n\n"}
        prompt = _ALPACA.format(instruction=instruction, **(parts if more else dict.fromkeys(parts, "")))
        return _text_pair(prompt, answer, f"{name}, as Alpaca's own prompt: the tokenizer has no chat template")
    turns = [*history, [f"{instruction}\n\n{more}" if more else instruction, answer]]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return _learnable(
        Chat(check_messages(_with_system(messages, row.get("system"))), frozenset(), [], f"{name}, as chats")
    )
