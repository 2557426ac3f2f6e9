import json

import pytest
from pydantic import ValidationError

from preft_jax.sampling.parameters import SamplingParams
from serve.server.failures import validation_error
from serve.server.protocol import NEUTRAL, ChatBody, CompletionBody, LoadBody, TokenizeBody, as_dicts

pytestmark = pytest.mark.host

TEXT = {"model": "m", "prompt": "hello"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def refused(body, kind=CompletionBody):
    """Return the parameter and the message of the error that a body gives."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    error = validation_error(errors)
    assert error.status == 400
    return error.param, error.message


def test_a_short_body_has_openais_defaults():
    body = CompletionBody.model_validate(TEXT)
    assert body.prompt == ["hello"]
    assert (body.limit, body.n, body.num_logprobs, body.stream, body.include_usage) == (16, 1, None, False, False)
    assert body.sampling() == SamplingParams()
    chat = ChatBody.model_validate(CHAT)
    assert (chat.limit, chat.num_logprobs) == (None, None)


def test_every_field_arrives():
    given = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1.5,
        "repetition_penalty": 1.1, "logit_bias": {"5": -100, "6": 1.5}, "seed": 11, "stop_token_ids": [1, 2],
        "ignore_eos": True,
    }  # fmt: skip
    more = {
        "max_tokens": 9, "n": 3, "stop": ["a", "b"], "stream": True, "stream_options": {"include_usage": True},
        "logprobs": 4, "priority": 2, "user": "u",
    }  # fmt: skip
    body = CompletionBody.model_validate({**TEXT, **given, **more})
    assert body.sampling() == SamplingParams(**{**given, "logit_bias": {5: -100.0, 6: 1.5}, "stop_token_ids": (1, 2)})
    assert (body.limit, body.n, body.stop, body.num_logprobs, body.priority) == (9, 3, ["a", "b"], 4, 2)
    assert body.include_usage


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_four_kinds_of_prompts(given, prompts):
    assert CompletionBody.model_validate({**TEXT, "prompt": given}).prompt == prompts


@pytest.mark.parametrize("wrong", [[], [[]], [1, "a"], ["a", [1]], [True], [1.0], 5, {"a": 1}, [[1], []], [None]])
def test_other_prompts_are_refused(wrong):
    assert refused({**TEXT, "prompt": wrong})[0] == "prompt"


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("temperature", True),
        ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", 10**400),
        ("top_p", 0), ("top_p", 1.5), ("top_k", -2), ("top_k", 2**31), ("top_k", 1.5), ("min_p", 1.01),
        ("presence_penalty", 2.5), ("frequency_penalty", -3), ("repetition_penalty", 0), ("repetition_penalty", 1e309),
        ("n", 0), ("n", 129), ("n", True), ("n", 10**100), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2**31),
        ("seed", 2**63), ("seed", 1.5), ("stream", "yes"), ("stream", 1), ("logprobs", 21), ("logprobs", True),
        ("stop", ""), ("stop", ["a"] * 17), ("stop", [1]), ("stop", [""]), ("stop", "a" * 1001),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]), ("stop_token_ids", [2**40]), ("ignore_eos", 1), ("priority", -1), ("user", 5),
        ("logit_bias", {"a": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"1": "x"}), ("logit_bias", [1]),
        ("logit_bias", {"1": 1, "01": 1}), ("logit_bias", {"99999999999": 1}), ("logit_bias", {"-1": 1}),
        ("logit_bias", {str(i): 1 for i in range(301)}), ("model", ""), ("model", 5), ("model", "m" * 257),
        ("stream_options", {"include_usage": 1}), ("stream_options", {"x": 1}), ("stream_options", 5),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_named(field, wrong):
    param, message = refused({**TEXT, field: wrong})
    assert param.split("[")[0].split(".")[0] == field, (param, message)
    assert message


@pytest.mark.parametrize(("kind", "body"), [(CompletionBody, TEXT), (ChatBody, CHAT)])
def test_null_is_as_good_as_nothing(kind, body):
    names = [name for name in kind.model_fields if name not in body]
    found = kind.model_validate(body | dict.fromkeys([*names, *NEUTRAL, "whatever"]))
    assert found == kind.model_validate(body)


def test_what_is_not_supported_is_named_unless_it_asks_for_nothing():
    for name, neutral in NEUTRAL.items():
        for value in neutral:
            CompletionBody.model_validate({**TEXT, name: value})
        param, message = refused({**TEXT, name: {"some": "thing"}})
        assert param == name
        assert name in message
        assert "not supported" in message
    assert refused({**CHAT, "tools": [{"type": "function"}]}, ChatBody)[0] == "tools"
    assert refused({**TEXT, "best_of": 2})[0] == "best_of"
    assert refused({**TEXT, "echo": True})[0] == "echo"
    assert refused({**TEXT, "echo": 0})[0] == "echo"
    assert refused({**CHAT, "response_format": {"type": "json_object"}}, ChatBody)[0] == "response_format"


def test_an_unknown_field_is_named_with_its_nearest():
    param, message = refused({**TEXT, "temprature": 1})
    assert param == "temprature"
    assert "did you mean 'temperature'?" in message


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (CompletionBody, {"prompt": "a"}, "model"),
        (CompletionBody, {"model": "m"}, "prompt"),
        (CompletionBody, {"model": "m", "prompt": None}, "prompt"),
        (CompletionBody, {**TEXT, "stream_options": {"include_usage": True}}, "stream_options"),
        (ChatBody, {**CHAT, "messages": []}, "messages"),
        (ChatBody, {**CHAT, "messages": "hello"}, "messages"),
        (ChatBody, {**CHAT, "messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        (ChatBody, {**CHAT, "messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (ChatBody, {**CHAT, "messages": [{"role": "user"}]}, "messages[0].content"),
        (ChatBody, {**CHAT, "messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name"),
        (ChatBody, {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        (ChatBody, {**CHAT, "top_logprobs": 2}, "top_logprobs"),
        (ChatBody, {**CHAT, "logprobs": 2}, "logprobs"),
        (TokenizeBody, {"model": "m"}, "prompt"),
        (TokenizeBody, {"prompt": "a", "messages": CHAT["messages"]}, "prompt"),
        (LoadBody, {"lora_name": "../up", "lora_path": "x"}, "lora_name"),
        (LoadBody, {"lora_name": "a\n", "lora_path": "x"}, "lora_name"),
        (LoadBody, {"lora_name": "a", "lora_path": ""}, "lora_path"),
    ],
)
def test_what_is_missing_or_disagrees_is_named(kind, body, param):
    assert refused(body, kind)[0] == param


def test_messages_become_plain_ones():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": [], "annotations": []}
    body = ChatBody.model_validate(
        {
            "model": "m",
            "messages": [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}, answer],
        }
    )
    assert as_dicts(body.messages) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "yes"},
    ]


def test_the_newer_limit_of_chats_wins():
    assert ChatBody.model_validate({**CHAT, "max_tokens": 5}).limit == 5
    assert ChatBody.model_validate({**CHAT, "max_tokens": 5, "max_completion_tokens": 7}).limit == 7


def test_seeds_of_64_bits_are_taken_modulo_32():
    assert CompletionBody.model_validate({**TEXT, "seed": -1}).sampling().seed == 2**32 - 1


def test_errors_never_repeat_a_text():
    _, message = refused({**TEXT, "prompt": "secret", "temperature": "secret"})
    assert "secret" not in message
    _, message = refused({**TEXT, "temperature": 5})
    assert "given: 5" in message
    json.dumps(message).encode()
