"""Chat messages in the one form that templates are given: what OpenAI's API and datasets write in several ways.

The server, ``preft_jax.generate`` and training share these rules: null is absence, ``developer`` is ``system``,
``function`` is ``tool``, text parts are joined, and a field that asks for nothing is dropped.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from preft_jax.errors import RequestError, did_you_mean, reject_unknown, shown

ROLES = ("system", "user", "assistant", "tool")

ROLE_ALIASES = {"developer": "system", "function": "tool"}
"""Newer and older words of OpenAI's API."""

MESSAGE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "reasoning_content": ("",),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
"""Fields that OpenAI's or vLLM's messages have beside ``role`` and ``content``, and values that ask for nothing."""

_FIELDS_OF_ROLE = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}

_UNSUPPORTED = {
    "reasoning_content": "is not given to the chat template; write it into the content, as '<think>...</think>'",
    "tool_calls": "is the assistant's; leave it out",
    "tool_call_id": "is a tool's; leave it out",
}


def join_text_parts(value: Any) -> Any:
    """Join the text parts of a message, which is what plain text would have been; anything else is returned as it is.

    Raises:
        RequestError: for a part that is no text.
    """
    if not isinstance(value, list):
        return value
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) != {"type", "text"}:
            raise RequestError(f"part {index} is no text; only parts {{'type': 'text', 'text': ...}} are supported")
        if not isinstance(part["text"], str):
            raise RequestError(f"part {index} has a text of type {type(part['text']).__name__}; give a string")
        texts.append(part["text"])
    return "\n".join(texts)


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return chat messages as templates are given them.

    Each is a dict of ``role`` (one of ``ROLES``) and ``content`` (text); an assistant's may have ``tool_calls``, whose
    arguments are dicts, and a tool's ``tool_call_id`` and ``name``.

    Raises:
        RequestError: naming the message and the field, if there are no messages, or one lacks a field, has one that is
            unknown or not supported, an unknown role, or content that is not text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(
            f"messages is {shown(messages)}; give a list of at least one {{'role': ..., 'content': ...}}"
        )
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is {shown(message)}; give a dict with 'role' and 'content'")
    message = {str(name): value for name, value in message.items() if value is not None}
    reject_unknown(message, ("role", "content", *MESSAGE_NEUTRAL), what=f"field of {where}", error=RequestError)
    role = message.get("role")
    if not isinstance(role, str):
        raise RequestError(f"{where}['role'] is {shown(role)}; give a string")
    role = ROLE_ALIASES.get(role, role)
    if role not in ROLES:
        raise RequestError(
            f"{where} has the unknown role {shown(role)}{did_you_mean(role, ROLES)}; allowed: {', '.join(ROLES)}"
        )
    own = {
        name: message[name]
        for name in MESSAGE_NEUTRAL
        if name in message and message[name] not in MESSAGE_NEUTRAL[name]
    }
    if role == "assistant" and "function_call" in own:
        own["tool_calls"] = [*own.get("tool_calls", []), {"type": "function", "function": own.pop("function_call")}]
    unsupported = next((name for name in own if name not in _FIELDS_OF_ROLE.get(role, ())), None)
    if unsupported is not None:
        raise RequestError(
            f"{where}[{unsupported!r}] {_UNSUPPORTED.get(unsupported, 'is not supported; leave it out')}"
        )
    checked: dict[str, Any] = {"role": role, "content": _content(message, own, where)}
    if "tool_calls" in own:
        checked["tool_calls"] = check_tool_calls(own.pop("tool_calls"), where)
    for name, value in own.items():
        if not isinstance(value, str):
            raise RequestError(f"{where}[{name!r}] is {shown(value)}; give a string")
    return checked | own


def _content(message: Mapping[str, Any], own: Mapping[str, Any], where: str) -> str:
    try:
        content = join_text_parts(message.get("content", "" if "tool_calls" in own else None))
    except RequestError as error:
        raise RequestError(f"{where}['content']: {error}") from error
    if not isinstance(content, str):
        raise RequestError(f"{where}['content'] is {shown(content)}; give a string")
    return content


def check_tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return an assistant's tool calls with arguments as dicts; OpenAI has them as JSON in a string.

    Raises:
        RequestError: naming the call that is malformed.
    """
    if not isinstance(calls, list):
        raise RequestError(f"{where}['tool_calls'] is {shown(calls)}; give a list")
    checked = []
    for index, call in enumerate(calls):
        at = f"{where}['tool_calls'][{index}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"{at} is {shown(call)}; give {{'function': {{'name': ..., 'arguments': {{...}}}}}}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{at} has arguments that are not JSON: {error}") from error
        if not isinstance(arguments if arguments is not None else {}, dict):
            raise RequestError(f"{at} has arguments of type {type(arguments).__name__}; give an object")
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        function = {"name": function["name"], "arguments": arguments or {}}
        checked.append({**identity, "type": "function", "function": function})
    return checked


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Return descriptions of tools, each ``{"type": "function", "function": {...}}``; OpenAI's older form has the
    function alone. Null and an empty list are no tools; so is null in a description absence.

    Raises:
        RequestError: naming the tool that is malformed.
    """
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"tools is a text that is not JSON ({error}); give a list") from error
    if not tools:
        return []
    if not isinstance(tools, list):
        raise RequestError(f"tools is {shown(tools)}; give a list")
    checked = []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(
                f"tools[{index}] is {shown(tool)}; give {{'type': 'function', 'function': {{'name': ..., 'parameters': "
                "...}}"
            )
        checked.append({"type": "function", "function": without_nulls(function)})
    return checked


def without_nulls(value: Any) -> Any:
    """Return a JSON value without the entries of objects that are null, at every depth: Arrow's tables add them."""
    if isinstance(value, Mapping):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list | tuple) else value
