"""Chats with tools: a tokenizer's template with descriptions of tools, and tool calls as that template reads them.

Templates do not agree. Most read arguments as a dict, some as JSON in a string; beside a tool call most read empty
content, some none at all. Many have no place for tools and leave them out in silence. So a chat is rendered with other
parts in the place of its own: a part that makes no difference is not rendered, and that is an error.
"""

import json
from collections.abc import Sequence
from typing import Any

import jinja2

from preft_jax.errors import RequestError

_OTHER = "a text that no tool returns"


class ToolTemplate:
    """A tokenizer whose chat template is given tools, and messages whose tool calls are written as it reads them.

    Attributes of the tokenizer are its own.

    Args:
        tokenizer: with a chat template.
        tools: see ``check_tools``.
        as_text: write a call's arguments as JSON in a string.
        as_none: leave the content of a message out that has calls and no text.
    """

    def __init__(self, tokenizer: Any, tools: Sequence[dict[str, Any]], *, as_text: bool, as_none: bool):
        self._tokenizer = tokenizer
        self._tools = list(tools) or None
        self._as_text = as_text
        self._as_none = as_none

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def with_tools(self, tools: Sequence[dict[str, Any]]) -> "ToolTemplate":
        """Return the same with other tools."""
        return ToolTemplate(self._tokenizer, tools, as_text=self._as_text, as_none=self._as_none)

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **options: Any) -> Any:
        """Render messages as the tokenizer does."""
        written = [self._written(message) for message in messages]
        return self._tokenizer.apply_chat_template(written, tools=self._tools, **options)

    def _written(self, message: dict[str, Any]) -> dict[str, Any]:
        if "tool_calls" not in message:
            return message
        calls = message["tool_calls"]
        if self._as_text:
            calls = [
                {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
                for call in calls
            ]
        content = message["content"] or (None if self._as_none else "")
        return {**message, "content": content, "tool_calls": calls}


def with_tools(tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> Any:
    """Return a tokenizer that renders a chat with its tools, tool calls and tool results; itself if there are none.

    Args:
        tokenizer: with a chat template.
        messages: the whole chat, as ``check_messages`` returns it.
        tools: as ``check_tools`` returns them.

    Raises:
        RequestError: if the template does not render one of them.
    """
    if not tools and not any("tool_calls" in message or message["role"] == "tool" for message in messages):
        return tokenizer
    missing = ""
    for as_none in (False, True):
        for as_text in (False, True):
            candidate = ToolTemplate(tokenizer, tools, as_text=as_text, as_none=as_none)
            missing_here = _not_rendered(candidate, messages, tools)
            if not missing_here:
                return candidate
            missing = missing or missing_here
    raise RequestError(
        f"the model's chat template does not render {missing}; take a model whose template has tools, or describe "
        "tools in the system message and write calls and results as the text of messages"
    )


def _not_rendered(template: ToolTemplate, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
    """Return what of a chat makes no difference to its text, or ``""``."""
    try:
        whole = _text(template, messages)
        if tools and whole == _text(template.with_tools(()), messages):
            return "tools"
        for index, message in enumerate(messages):
            if message["role"] == "tool":
                if whole == _text(template, _with(messages, index, {**message, "content": _OTHER})):
                    return f"messages[{index}], a tool's result"
            elif "tool_calls" in message:
                for call in range(len(message["tool_calls"])):
                    if whole == _text(template, _with(messages, index, _other_call(message, call))):
                        return f"messages[{index}]['tool_calls']"
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        return f"these messages ({error})"
    return ""


def _text(template: ToolTemplate, messages: Sequence[dict[str, Any]]) -> str:
    return template.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=False)


def _with(messages: Sequence[dict[str, Any]], index: int, other: dict[str, Any]) -> list[dict[str, Any]]:
    return [*messages[:index], other, *messages[index + 1 :]]


def _other_call(message: dict[str, Any], index: int) -> dict[str, Any]:
    calls = list(message["tool_calls"])
    function = {"name": "another", "arguments": {"x": _OTHER}}
    calls[index] = {**calls[index], "function": function}
    return {**message, "tool_calls": calls}
