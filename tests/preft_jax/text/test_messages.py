"""Messages as OpenAI's API and datasets write them, in the one form that templates are given."""

import pytest

from preft_jax import RequestError
from preft_jax.text.messages import check_messages, check_tools

pytestmark = pytest.mark.host

USER = {"role": "user", "content": "Lamp off"}
CALL = {"type": "function", "function": {"name": "set_lamp", "arguments": {"on": False}}}


CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
AS_TEXT = {**CALL, "function": {"name": "set_lamp", "arguments": '{"on": false}'}}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    ("message", "same"),
    [
        ({**USER, "name": None, "tool_calls": None}, USER),
        (
            {"role": "assistant", "content": "done", "tool_calls": [], "refusal": None, "annotations": []},
            {"role": "assistant", "content": "done"},
        ),
        ({"role": "assistant", "content": "x", "reasoning_content": ""}, {"role": "assistant", "content": "x"}),
        ({"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be brief."}),
        ({"role": "user", "content": PARTS}, {"role": "user", "content": "a\nb"}),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        ({"role": "function", "name": "f", "content": "ok"}, {"role": "tool", "name": "f", "content": "ok"}),
        (
            {"role": "tool", "tool_call_id": "c", "content": "ok"},
            {"role": "tool", "tool_call_id": "c", "content": "ok"},
        ),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, CALLS),
        ({"role": "assistant", "function_call": CALL["function"]}, CALLS),
        ({"role": "assistant", "tool_calls": [AS_TEXT]}, CALLS),
    ],
)
def test_what_is_written_in_several_ways_is_one_message(message, same):
    assert check_messages([message]) == [same]
    assert check_messages([same]) == [same]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({**USER, "name": "ann"}, r"messages\[0\]\['name'\] is not supported; leave it out"),
        ({**USER, "tool_calls": [CALL]}, "'tool_calls'. is the assistant's"),
        ({"role": "assistant", "content": "x", "reasoning_content": "hm"}, "write it into the content, as '<think>"),
        ({"role": "assistant", "content": "x", "tool_calls": {}}, r"'tool_calls'\] is {}; give a list"),
        ({"role": "assistant", "tool_calls": [{"name": 3}]}, r"'tool_calls'\]\[0\] is .*give {'function'"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "arguments that are not JSON"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}, "arguments of type list"),
        ({"role": "assistant", "content": None}, r"'content'\] is None; give a string"),
        ({"role": "tool", "content": "x", "tool_call_id": 3}, r"'tool_call_id'\] is 3; give a string"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "part 0 is no text"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "part 0 has a text of type int"),
    ],
)
def test_what_cannot_be_rendered_is_named(message, reason):
    with pytest.raises(RequestError, match=reason):
        check_messages([message])


def test_tools_are_functions_without_nulls():
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
    wide = {"name": "f", "description": None, "parameters": {**function["parameters"], "enum": None}}
    expected = [{"type": "function", "function": function}]
    for tools in ([function], [{"function": wide}], expected, '[{"name": "f", "parameters": ' + (
        '{"type": "object", "properties": {"a": {"type": "string"}}}}]'
    )):  # fmt: skip
        assert check_tools(tools) == expected
    assert [check_tools(none) for none in (None, [], "", "[]")] == [[], [], [], []]
    for wrong, reason in ((3, "tools is 3"), ("{", "not JSON"), ([{"type": "function"}], r"tools\[0\] is")):
        with pytest.raises(RequestError, match=reason):
            check_tools(wrong)
