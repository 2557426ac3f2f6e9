"""Mutated bodies for the server: each is answered as the documents say, and leaves nothing behind.

``python -m tests.fuzz.bodies`` runs the whole app and a tiny engine in this process, without a socket.
"""

import asyncio
import collections
import json
import random
import sys
import tempfile
from pathlib import Path

import httpx

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

import api_server
from engine_outputs import assert_released
from fuzz import program
from fuzz.mutate import change_bytes, change_tree, dump

import preft_jax
from serve.server.app import make_app

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
SAMPLING = {
    "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -0.5,
    "repetition_penalty": 1.1, "logit_bias": {"65": 3, "66": -1.5}, "seed": 3, "n": 2, "stop": ["b", "cd"],
    "stop_token_ids": [7], "ignore_eos": True, "priority": 1, "user": "u",
}  # fmt: skip
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
COMPLETION = {"model": "tiny", "prompt": "Once", "max_tokens": 3, "logprobs": 2}
CHAT_BODY = {"model": "public", "messages": CHAT, "max_tokens": 2, "logprobs": True, "top_logprobs": 1}
LOAD = {"lora_name": "late", "lora_path": "late", "load_inplace": True, "owner": "alice", "pinned": False}

BODIES = (
    ("/v1/completions", COMPLETION | SAMPLING),
    ("/v1/completions", COMPLETION | STREAM),
    ("/v1/completions", {"model": "public", "prompt": [[65, 66], [67]], "max_tokens": 2}),
    ("/v1/completions", {"model": "public", "prompt": ["a", "b"], "max_tokens": 2, "suffix": None, "echo": False}),
    ("/v1/chat/completions", CHAT_BODY | SAMPLING),
    ("/v1/chat/completions", CHAT_BODY | STREAM),
    ("/v1/chat/completions", {"model": "tiny", "messages": CHAT, "max_completion_tokens": 2, "tools": []}),
    ("/tokenize", {"model": "tiny", "prompt": "Grüße", "add_special_tokens": False, "return_token_strs": True}),
    ("/tokenize", {"messages": CHAT, "add_generation_prompt": True}),
    ("/detokenize", {"model": "tiny", "tokens": [65, 66, 200]}),
    ("/v1/load_lora_adapter", LOAD),
    ("/v1/unload_lora_adapter", {"lora_name": "late"}),
)

CODES = {
    400: {
        "invalid_value", "missing_field", "unknown_field", "unsupported_field", "bad_json", "invalid_body",
        "name_taken", "context_length_exceeded", "invalid_request", "adapter_error", "path_not_allowed",
    },
    404: {"model_not_found"},
    413: {"body_too_large"},
    415: {"not_json"},
}  # fmt: skip
"""Status -> the codes that ``docs/server.md`` names for it; of the others, none is right for a bad body."""


class Bodies:
    """Draws bodies, sends them and judges the answers."""

    def __init__(self, client, seed):
        self.rng = random.Random(seed)
        self.ends = collections.Counter()
        self._client = client

    async def step(self):
        """Send one body."""
        path, content = self._draw()
        kind = "application/json" if self.rng.random() < 0.98 else self.rng.choice(("text/plain", "", "application/x"))
        answer = await self._client.post(path, content=content, headers={"Content-Type": kind})
        try:
            self._judge(path, answer)
        except Exception as error:
            error.add_note(f"{path} {kind!r} {content[:1000]!r} -> {answer.status_code} {answer.content[:1000]!r}")
            raise
        self.ends[answer.status_code] += 1

    def _draw(self):
        rng = self.rng
        path, body = rng.choice(BODIES)
        if rng.random() < 0.75:
            body = dump(change_tree(body, rng), rng).encode()
            return path, change_bytes(body, rng) if rng.random() < 0.1 else body
        other = json.dumps(rng.choice(BODIES)[1] if rng.random() < 0.1 else body).encode()
        return path, change_bytes(other, rng) if rng.random() < 0.95 else other + b" " * 2**17

    def _judge(self, path, answer):
        status = answer.status_code
        if status == 200:
            if answer.headers["content-type"].startswith("text/event-stream"):
                events = answer.text.split("\n\n")
                assert events[-2:] == ["data: [DONE]", ""]
                assert not any("error" in json.loads(event.removeprefix("data: ")) for event in events[:-2])
            elif "lora" not in path:
                json.loads(answer.content, parse_constant=_no_constant)
            return
        assert status in CODES, "a status that the documents do not name"
        error = json.loads(answer.content)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["code"] in CODES[status], "a code that the documents do not name"
        assert isinstance(error["message"], str)
        assert 0 < len(error["message"]) < 2000
        assert error["param"] is None or isinstance(error["param"], str)


def _no_constant(name):
    raise AssertionError(f"{name} in an answer")


async def _good(client):
    """Return a good request's answer; it must not depend on what was served before it."""
    body = {"model": "public", "prompt": "Once", "max_tokens": 5, "temperature": 0}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200
    return answer.json()["choices"]


async def run(root, model, *, seed, until):
    """Send bodies until ``until(number)`` says stop; returns how many answers had which status."""
    for number, name in enumerate(("public", "late")):
        api_server.adapter_directory(root, name, model, number)
    serving = api_server.make_serving(model, root)
    serving.adapters.register("public", str(root / "public"))
    app = make_app(serving)
    transport = httpx.ASGITransport(app)
    headers = {"Authorization": f"Bearer {api_server.ADMIN}"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers, timeout=None) as client,
    ):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.05)
        before, number = await _good(client), 0
        fuzzer = Bodies(client, seed)
        while not until(number):
            try:
                await fuzzer.step()
            except Exception as error:
                error.add_note(f"seed {seed}, body {number}")
                raise
            number += 1
        assert await _good(client) == before
        assert serving.engine.num_open == serving.engine.num_waiting == 0
        assert serving.engine.alive
    assert_released(serving.engine.engine)
    assert serving.engine.engine.stats.recompiles == 0
    return fuzzer.ends


def _run_here(seed, until):
    root, model = Path(tempfile.mkdtemp()), preft_jax.load_model("tiny")
    return asyncio.run(run(root, model, seed=seed, until=until))


if __name__ == "__main__":
    program.main("bodies", __doc__, "bodies", _run_here)
