"""A tokenizer that puts tokens around texts, and stop texts that hold special tokens, over HTTP."""

import dataclasses
import json

import api_server
import httpx
import pytest
from text_tokenizers import with_template

from preft_jax.text.tokenizer import byte_tokenizer

CHAT = [{"role": "user", "content": "Hi"}]
BEGIN, END = 254, 255


@pytest.fixture(scope="module")
def client(lively, tmp_path_factory):
    tokenizer = with_template(byte_tokenizer(), "<|im_start|> $A <|im_end|>")
    serving = api_server.make_serving(dataclasses.replace(lively, tokenizer=tokenizer), tmp_path_factory.mktemp("none"))
    headers = {"Authorization": f"Bearer {api_server.ALICE}"}
    with (
        api_server.running(serving) as url,
        httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as found,
    ):
        api_server.until(lambda: found.get("/ready").status_code == 200)
        yield found


def post(client, path, **body):
    answer = client.post(path, json={"model": "tiny", **body})
    assert answer.status_code == 200, answer.text
    return answer


def test_prompts_begin_as_texts_do_and_never_end(client):
    def tokens(**body):
        return post(client, "/tokenize", **body).json()["tokens"]

    chat = tokens(messages=CHAT)
    assert chat[:3] == [BEGIN, *b"us"]
    cases = [
        ({"prompt": "Hi"}, [BEGIN, *b"Hi"]),
        ({"prompt": "Hi", "add_special_tokens": False}, [*b"Hi"]),
        ({"prompt": "<|im_start|>Hi"}, [BEGIN, *b"Hi"]),
        ({"messages": CHAT, "add_special_tokens": True}, chat),
        ({"messages": CHAT, "add_special_tokens": False}, chat),
    ]
    for body, expected in cases:
        assert tokens(**body) == expected
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        usage = post(client, path, max_tokens=1, **body).json()["usage"]
        assert usage["prompt_tokens"] == len(expected)


LETTERS = {str(token): -100 for token in range(256) if token not in (*b"ab", END)}


@pytest.mark.parametrize("stop", ["<|im_end|>", "a<|im_end|>", "<|im_end|>b"])
def test_stop_texts_that_hold_a_special_token(stop, client):
    body = {"prompt": "Once", "logit_bias": LETTERS, "max_tokens": 60, "seed": 0, "logprobs": 0}
    free = post(client, "/v1/completions", **body).json()["choices"][0]
    written = "".join(free["logprobs"]["tokens"])
    assert (stop in written, "<" in free["text"]) == (True, False)
    expected = written[: written.index(stop)].replace("<|im_end|>", "")
    whole = post(client, "/v1/completions", stop=stop, **body).json()["choices"][0]
    assert (whole["text"], whole["finish_reason"], whole["stop_reason"]) == (expected, "stop", stop)
    assert "".join(whole["logprobs"]["tokens"]) == written[: written.index(stop) + len(stop)]
    events = post(client, "/v1/completions", stop=[stop, "zz"], stream=True, **body).text.split("\n\n")[:-2]
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == expected
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", stop)
