import asyncio
import contextlib
import json
import logging
import socket
import time

import api_server
import httpx
import numpy as np
import openai
import pytest
from api_server import ADMIN, ALICE, BOB, NOBODY
from engine_runs import ATOL, chances, request
from prometheus_client.parser import text_string_to_metric_families

from preft_jax.chat import encode_prompt
from serve.client import ENDPOINTS, HttpTarget, list_models
from serve.generation import EventStream
from serve.load import LoadRequest

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def own(root, lively):
    """Return adapters by name; ``late`` is not registered."""
    return {
        name: api_server.adapter_directory(root, name, lively, seed)
        for seed, name in enumerate(("public", "alices", "late"))
    }


@pytest.fixture(scope="module")
def serving(lively, root, own):
    found = api_server.make_serving(lively, root)
    found.adapters.register("public", str(root / "public"))
    found.adapters.register("alices", str(root / "alices"), owner="alice")
    found.gate = api_server.Gate(found.engine.engine)
    return found


@pytest.fixture(scope="module")
def url(serving):
    with api_server.running(serving) as found:
        with httpx.Client(base_url=found) as client:
            while client.get("/ready").status_code != 200:
                assert client.get("/health").status_code == 200
                time.sleep(0.05)
        yield found


def client(url, key):
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60, http_client=httpx.Client(trust_env=False)
    )


@pytest.fixture(scope="module")
def alice(url):
    with client(url, ALICE) as found:
        yield found


@pytest.fixture
def raw(url):
    headers = {"Authorization": f"Bearer {ALICE}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as found:
        yield found


@pytest.fixture
def gate(serving):
    yield serving.gate
    serving.gate.open()


def until(holds):
    """Wait for what comes soon, or never."""
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


def is_idle(serving):
    engine = serving.engine.engine
    return not engine.has_work and engine.pages.num_used == 0 and serving.engine.num_open == 0


@pytest.fixture(autouse=True)
def _leaves_nothing(request):
    yield
    if "url" in request.fixturenames:
        serving = request.getfixturevalue("serving")
        until(lambda: is_idle(serving))
        assert serving.engine.num_waiting == 0
        assert serving.engine.alive
        assert serving.engine.engine.stats.recompiles == 0


# What is served


def test_models_are_those_that_the_key_may_see(url):
    found = {}
    for key in (ALICE, BOB, NOBODY, ADMIN):
        with client(url, key) as one:
            found[key] = {model.id: model.parent for model in one.models.list()}
    public = {"tiny": None, "base": None, "public": "tiny"}
    assert found == {
        ALICE: public | {"alices": "tiny"},
        BOB: public,
        NOBODY: public,
        ADMIN: public | {"alices": "tiny"},
    }
    with client(url, BOB) as bob:
        assert bob.models.retrieve("public").id == "public"
        assert bob.models.retrieve("public").positions == "prompt"
        assert bob.models.retrieve("tiny").positions is None
        with pytest.raises(openai.NotFoundError):
            bob.models.retrieve("alices")


@pytest.mark.parametrize("name", ["base", "public", "alices"])
def test_the_model_is_the_adapter(alice, lively, own, name):
    """Every token is what the reference says for this adapter, with its log-probability."""
    tokens = encode_prompt(lively.tokenizer, "What is a cat?", vocab_size=256).token_ids
    found = alice.completions.create(model=name, prompt=tokens, temperature=0, max_tokens=8, logprobs=3)
    choice = found.choices[0]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (
        len(tokens),
        8,
        len(tokens) + 8,
    )
    assert (choice.finish_reason, found.model, found.object) == ("length", name, "text_completion")
    one = request(tokens, own.get(name), max_tokens=8)
    logprobs, ids = choice.logprobs, []
    for step in range(8):
        raw = chances(lively, one, 0, [*ids, 0])[0][step]
        best = int(raw.argmax())
        assert logprobs.token_logprobs[step] == pytest.approx(raw[best], abs=ATOL)
        assert sorted(logprobs.top_logprobs[step].values())[-1] == pytest.approx(raw.max(), abs=ATOL)
        ids.append(best)
    assert logprobs.tokens == [lively.tokenizer.decode([i]) for i in ids]
    assert logprobs.text_offset[0] == 0
    assert np.diff(logprobs.text_offset).tolist() == [len(token) for token in logprobs.tokens[:-1]]


def test_a_chat_is_its_rendered_prompt(alice, lively):
    tokens = encode_prompt(lively.tokenizer, CHAT, vocab_size=256).token_ids
    chat = alice.chat.completions.create(model="public", messages=CHAT, temperature=0, max_completion_tokens=9)
    text = alice.completions.create(model="public", prompt=tokens, temperature=0, max_tokens=9)
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].message.content == text.choices[0].text
    assert chat.usage == text.usage
    assert chat.object == "chat.completion"
    other = alice.chat.completions.create(model="base", messages=CHAT, temperature=0, max_completion_tokens=9)
    assert other.choices[0].message.content != chat.choices[0].message.content


def test_a_chat_without_a_limit_uses_the_room_there_is(alice, lively):
    tokens = encode_prompt(lively.tokenizer, CHAT, vocab_size=256).token_ids
    found = alice.chat.completions.create(model="tiny", messages=CHAT, temperature=0)
    assert found.usage.total_tokens == 128
    assert found.usage.prompt_tokens == len(tokens)


def test_streams_say_what_whole_answers_say(alice):
    options = {"model": "public", "temperature": 0.9, "seed": 3, "n": 2, "max_tokens": 11}
    whole = alice.completions.create(prompt=["One", "Two"], logprobs=2, **options)
    texts, reasons, offsets, last = [""] * 4, {}, {i: [] for i in range(4)}, None
    for chunk in alice.completions.create(
        prompt=["One", "Two"], logprobs=2, stream=True, stream_options={"include_usage": True}, **options
    ):
        last = chunk
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            offsets[choice.index] += choice.logprobs.text_offset
            if choice.finish_reason:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert offsets == {choice.index: choice.logprobs.text_offset for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert last.choices == []
    assert last.usage == whole.usage
    assert len(set(texts)) == 4


def test_a_streamed_chat_begins_with_its_role(alice):
    options = {
        "model": "tiny",
        "messages": CHAT,
        "temperature": 0,
        "max_tokens": 6,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = alice.chat.completions.create(**options)
    chunks = list(alice.chat.completions.create(stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    parts = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert parts == whole.choices[0].logprobs.content


def test_a_stream_on_the_wire(raw):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    answer = raw.post("/v1/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]


def test_logprobs_of_chats(alice, lively):
    found = alice.chat.completions.create(
        model="tiny", messages=CHAT, temperature=0, max_tokens=20, logprobs=True, top_logprobs=3
    )
    content = found.choices[0].logprobs.content
    assert len(content) == 20
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
    special = set(lively.tokenizer.all_special_tokens)
    joined = bytes(byte for entry in content if entry.token not in special for byte in entry.bytes)
    assert joined.decode(errors="replace") == found.choices[0].message.content
    alone = alice.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_tokens=2, logprobs=True)
    assert [entry.top_logprobs for entry in alone.choices[0].logprobs.content] == [[], []]


def test_seeds_repeat_and_samples_differ(alice):
    def texts(**options):
        found = alice.completions.create(model="tiny", prompt="Once", max_tokens=12, n=3, **options)
        return [choice.text for choice in found.choices]

    assert texts(seed=5) == texts(seed=5)
    assert len(set(texts(seed=5))) == 3
    assert texts(seed=5) != texts(seed=500)
    assert texts() != texts()


def test_stop_texts_end_a_sample(alice):
    options = {"model": "tiny", "prompt": "Once", "temperature": 0, "seed": 1}
    whole = alice.completions.create(max_tokens=30, **options).choices[0].text
    stop = whole[10:12]
    found = alice.completions.create(max_tokens=30, stop=[stop, "never there"], **options).choices[0]
    assert (found.finish_reason, found.text) == ("stop", whole[: whole.index(stop)])
    assert found.stop_reason == stop


def test_penalties_and_biases_reach_the_engine(alice):
    options = {"model": "tiny", "prompt": "Once", "temperature": 0, "max_tokens": 5}
    found = alice.completions.create(logit_bias={"65": 100}, **options)
    assert found.choices[0].text == "AAAAA"
    found = alice.completions.create(logit_bias={"65": 5}, frequency_penalty=2, presence_penalty=2, **options)
    assert found.choices[0].text != "AAAAA"


def test_tokens_there_and_back(raw, lively):
    found = raw.post("/tokenize", json={"model": "public", "prompt": "Grüße", "return_token_strs": True}).json()
    assert found["tokens"] == lively.tokenizer.encode("Grüße")
    assert (found["count"], found["max_model_len"], len(found["token_strs"])) == (7, 128, 7)
    assert raw.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "Grüße"}
    chat = raw.post("/tokenize", json={"messages": CHAT}).json()
    assert chat["tokens"] == encode_prompt(lively.tokenizer, CHAT, vocab_size=256).token_ids
    assert raw.post("/detokenize", json={"tokens": [256]}).status_code == 400
    assert raw.post("/tokenize", json={"model": "none", "prompt": "a"}).status_code == 404


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_benchmark_can_load_it(url, lively, endpoint):
    assert ("public", "tiny", "prompt") in list_models(url, ALICE)
    requests = [LoadRequest(arrival=0.0, prompt=[65, 66, 67], max_tokens=5, user=user) for user in (None, 0, None)]
    names = {None: "tiny", 0: "public"}
    target = HttpTarget(url, names.__getitem__, endpoint=endpoint, api_key=ALICE, decode=lively.tokenizer.decode)
    records = target.run(requests).records
    assert [(record.status, record.output_len, record.estimated) for record in records] == [("completed", 5, False)] * 3


# What is refused


@pytest.mark.parametrize(
    ("options", "kind", "code", "param"),
    [
        ({"model": "unheard"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"prompt": ""}, openai.BadRequestError, "invalid_request", None),
        ({"prompt": [300]}, openai.BadRequestError, "invalid_request", None),
        ({"prompt": "a" * 128}, openai.BadRequestError, "context_length_exceeded", None),
        ({"prompt": "a" * 30_000}, openai.BadRequestError, "context_length_exceeded", None),
        ({"max_tokens": 128}, openai.BadRequestError, "context_length_exceeded", None),
        ({"suffix": "b"}, openai.BadRequestError, "unsupported_field", "suffix"),
        ({"best_of": 3}, openai.BadRequestError, "unsupported_field", "best_of"),
        ({"extra_body": {"unheard": 1}}, openai.BadRequestError, "unknown_field", "unheard"),
        ({"logit_bias": {"256": 1}}, openai.BadRequestError, "invalid_value", "logit_bias"),
    ],
)
def test_what_cannot_be_served_is_refused(url, options, kind, code, param):
    body = {"model": "tiny", "prompt": "a", **options}
    with client(url, BOB) as bob, pytest.raises(kind) as caught:
        bob.completions.create(**body)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


@pytest.mark.parametrize(
    "value", ["[" * 5000 + "]" * 5000, "9" * 5000, '"\xff"'], ids=["deep", "long number", "no UTF-8"]
)
def test_json_that_python_refuses_is_bad_json(raw, value):
    body = f'{{"model": "tiny", "prompt": {value}}}'.encode("latin-1")
    answer = raw.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_json")


@pytest.mark.parametrize("options", [{}, {"add_special_tokens": False}])
def test_text_that_is_no_unicode_is_refused(raw, options):
    content = json.dumps({"prompt": "\ud800", **options})
    answer = raw.post("/tokenize", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


def test_another_tenants_adapter_is_not_there(url):
    found = []
    for key, name in ((BOB, "alices"), (NOBODY, "alices"), (BOB, "no-such")):
        with client(url, key) as one, pytest.raises(openai.NotFoundError) as caught:
            one.chat.completions.create(model=name, messages=CHAT)
        found.append((caught.value.code, caught.value.body["message"].replace(name, "X")))
    assert len(set(found)) == 1


def test_keys_are_needed(url):
    with client(url, "a-wrong-key") as stranger:
        for call in (stranger.models.list, lambda: stranger.completions.create(model="tiny", prompt="a")):
            with pytest.raises(openai.AuthenticationError) as caught:
                call()
            assert caught.value.code == "invalid_api_key"
    with httpx.Client(base_url=url, trust_env=False) as one:
        assert one.get("/nowhere").status_code == 401
        assert one.post("/tokenize", json={"prompt": "a"}).status_code == 401
        for path in ("/health", "/ready", "/version"):
            assert one.get(path).status_code == 200, path


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"null", 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b"\xff\xfe", 400),
        (b'{"model": "tiny", "prompt": "\xff"}', 400),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400),
        (b'{"model": "tiny", "prompt": "a", "temperature": 1e309}', 400),
        (b'{"model": "tiny", "prompt": "a", "temperature": -Infinity}', 400),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400),
        (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 400 + b"}", 400),
        (b'{"model": "tiny", "prompt": "a", "temperature": ' + b"9" * 400 + b"}", 400),
        (b'{"model": "tiny", "prompt": ' + b"[" * 20_000 + b"}", 400),
        (b'{"model": "tiny", "prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", 400),
        (b'{"model": "tiny", "prompt": "a", "\\ud800": 1}', 400),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400),
        (b'{"model": "\\u0000", "prompt": "a"}', 404),
        (b'{"model": "tiny", "prompt": "a", "stop": "\\ud800"}', 400),
        (b'{"model": "tiny", "prompt": "' + b"a" * 2**16 + b'"}', 413),
        (b"x" * 2**19, 413),
    ],
)
def test_hostile_bodies_have_an_answer(raw, content, status):
    found = raw.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert found.status_code == status, found.text
    assert found.json()["error"]["message"]


def test_bodies_that_are_not_json_are_refused(raw):
    assert raw.post("/v1/completions", data={"model": "tiny"}).status_code == 415
    assert raw.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415


def test_routes_that_are_not_there(raw):
    found = raw.get("/v1/nothing")
    assert (found.status_code, found.json()["error"]["code"]) == (404, "not_found")
    found = raw.get("/v1/completions")
    assert (found.status_code, found.json()["error"]["code"]) == (405, "method_not_allowed")
    assert raw.post("/v1/models/../../etc/passwd", json={}).status_code in (404, 405)


# Adapters at run time


def admin(url):
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60, trust_env=False)


def test_the_admin_loads_and_unloads(url, raw, root, tmp_path):
    body = {"lora_name": "late", "lora_path": str(root / "late"), "owner": "bob"}
    with admin(url) as boss, client(url, BOB) as bob:
        assert raw.post("/v1/load_lora_adapter", json=body).status_code == 403
        found = boss.post("/v1/load_lora_adapter", json=body)
        assert (found.status_code, found.text) == (200, "Success: LoRA adapter 'late' added successfully.")
        assert bob.completions.create(model="late", prompt="a", max_tokens=2).usage.completion_tokens == 2
        assert raw.post("/v1/completions", json={"model": "late", "prompt": "a"}).status_code == 404
        assert boss.post("/v1/load_lora_adapter", json=body).status_code == 400
        assert boss.post("/v1/load_lora_adapter", json={**body, "load_inplace": True}).status_code == 200
        for path in (str(tmp_path), "../", "/etc", "nowhere"):
            refused = boss.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lora_path")
        assert boss.post("/v1/load_lora_adapter", json={**body, "lora_name": "base"}).status_code == 400
        (root / "empty").mkdir(exist_ok=True)
        assert boss.post("/v1/load_lora_adapter", json={"lora_name": "e", "lora_path": "empty"}).status_code == 400
        found = boss.post("/v1/unload_lora_adapter", json={"lora_name": "late"})
        assert (found.status_code, found.text) == (200, "Success: LoRA adapter 'late' removed successfully.")
        assert boss.post("/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 404
        with pytest.raises(openai.NotFoundError):
            bob.completions.create(model="late", prompt="a")


# Under way


def test_a_client_that_goes_away_frees_its_kv(serving, gate, url, raw):
    engine = serving.engine.engine
    body = {"model": "public", "prompt": "a", "max_tokens": 100, "n": 3, "stream": True}
    gate.shut()
    gate.let(1)
    with raw.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        gate.let(2)
        next(lines)
        until(gate.waiting.is_set)
        assert engine.pages.num_used > 0
    until(lambda: serving.engine.num_open == 0)
    before = engine.stats.decode_calls
    gate.let(2)
    until(lambda: engine.pages.num_used == 0)
    assert engine.stats.decode_calls <= before + 2
    assert engine.stats.generated_tokens > 0


def test_samples_that_nobody_waited_for_are_counted(serving, gate, raw):
    def ended():
        families = text_string_to_metric_families(raw.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        reasons = {s.labels["finished_reason"]: s.value for s in samples if s.name == "vllm:request_success_total"}
        return reasons, sum(s.value for s in samples if s.name == "vllm:e2e_request_latency_seconds_count")

    before, timed = ended()
    body = {"model": "tiny", "prompt": "a", "max_tokens": 100, "n": 3, "stream": True}
    gate.shut()
    gate.let(1)
    with raw.stream("POST", "/v1/completions", json=body) as answer:
        gate.let(2)
        next(answer.iter_lines())
    until(lambda: serving.engine.num_open == 0)
    gate.open()
    reasons, now = ended()
    assert reasons.get("abort", 0) == before.get("abort", 0) + 3
    assert now == timed
    assert {**reasons, "abort": 0} == {**before, "abort": 0}


def test_a_stream_whose_client_left_before_it_began_is_closed_too():
    """The generator's own end is not enough: one that never began has none."""
    closed = []

    async def events():
        yield b""

    async def gone():
        return {"type": "http.disconnect"}

    async def send(message):
        await asyncio.Event().wait()  # What was sent before has not been read.

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(EventStream(events(), lambda: closed.append(True))(scope, gone, send))
    assert closed == [True]


def test_a_client_that_does_not_wait_for_a_whole_answer_frees_its_kv(serving, gate, raw):
    engine = serving.engine.engine
    gate.shut()
    with pytest.raises(httpx.ReadTimeout):
        raw.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 100}, timeout=0.3)
    until(lambda: serving.engine.num_open == 0)
    gate.let(3)
    until(lambda: not engine.has_work)
    assert engine.pages.num_used == 0


def test_overload_is_refused_and_passes(serving, gate, url, raw, monkeypatch):
    monkeypatch.setattr(serving.engine, "max_waiting", 3)
    gate.shut()
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "stream": True}
    streams = []
    with client(url, BOB) as bob:
        for _ in range(3):
            connection = socket.create_connection(httpx.URL(url).netloc.decode().split(":"))
            content = json.dumps(body).encode()
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                + f"Authorization: Bearer {ALICE}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
                + content
            )
            streams.append(connection)
        until(lambda: serving.engine.num_waiting == 3)
        for _ in range(20):
            with pytest.raises(openai.RateLimitError) as caught:
                bob.completions.create(model="tiny", prompt="a")
            assert caught.value.code == "overloaded"
            assert int(caught.value.response.headers["retry-after"]) >= 1
        assert serving.engine.num_waiting == 3
        gate.open()
        for connection in streams:
            connection.settimeout(60)
            text = b""
            while b"[DONE]" not in text:
                text += connection.recv(65536)
            assert text.startswith(b"HTTP/1.1 200")
            connection.close()
        assert bob.completions.create(model="tiny", prompt="a", max_tokens=2).usage.completion_tokens == 2


# For operators


def test_prometheus_reads_the_metrics(url, raw, serving):
    def read():
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(raw.get("/metrics").text)
            for sample in family.samples
        }

    label = ("model_name", "tiny")
    before = read()
    raw.post("/v1/completions", json={"model": "public", "prompt": [1, 2, 3], "max_tokens": 5, "n": 2})
    assert raw.post("/v1/completions", json={"model": "no", "prompt": "a"}).status_code == 404
    until(lambda: is_idle(serving))
    after = read()

    def grown(*key):
        return after[key] - before.get(key, 0)

    assert grown("vllm:prompt_tokens_total", label) == 3
    assert grown("vllm:generation_tokens_total", label) == 10
    assert grown("vllm:request_success_total", ("finished_reason", "length"), label) == 2
    assert grown("vllm:time_to_first_token_seconds_count", label) == 1
    assert grown("vllm:time_per_output_token_seconds_count", label) == 2
    assert grown("vllm:e2e_request_latency_seconds_count", label) == 2
    assert grown("preft_http_responses_total", ("route", "/v1/completions"), ("status", "404")) == 1
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert after[name, label] == 0
    for name in ("vllm:num_preemptions_total", "vllm:prefix_cache_hits_total", "preft_recompiles_total"):
        assert (name, label) in after
    assert after["preft_adapter_store_registered", label] >= 2
    assert after["preft_engine_ready", label] == 1


def test_requests_have_ids_and_one_line_of_the_log_without_prompts(raw, caplog):
    caplog.set_level(logging.INFO, "preft.server")
    body = {"model": "public", "prompt": "a secret", "max_tokens": 2, "user": "someone"}
    found = raw.post("/v1/completions", json=body, headers={"X-Request-Id": "mine-1"})
    assert found.headers["x-request-id"] == "mine-1"
    found = raw.post("/v1/completions", json={**body, "stream": True}, headers={"X-Request-Id": "not allowed\t!"})
    assert found.headers["x-request-id"] not in ("mine-1", "not allowed\t!")
    until(lambda: sum(record.message == "request" for record in caplog.records) == 2)
    whole, streamed = (record.facts for record in caplog.records if record.message == "request")
    assert whole["seconds"] >= 0
    assert {key: whole[key] for key in whole if key != "seconds"} == {
        "id": "mine-1", "method": "POST", "route": "/v1/completions", "status": 200, "user": "alice", "model": "public",
        "prompt_tokens": 8, "completion_tokens": 2, "finish": ["length"],
    }  # fmt: skip
    assert streamed["completion_tokens"] == 2
    assert "secret" not in caplog.text + json.dumps([whole, streamed])


def test_figures_of_the_page(raw):
    raw.post("/v1/completions", json={"model": "public", "prompt": "a", "max_tokens": 2})
    found = raw.get("/stats").json()
    assert (found["model"], found["ready"], found["recompiles"]) == ("tiny", True, 0)
    assert found["kv_pages"] > 0
    assert found["generated_tokens"] >= 2
    tiers = found["adapters"]
    assert 1 <= tiers["device_pages_used"] <= tiers["device_pages"] == 8
    assert tiers["device_adapters"] >= 1
    assert tiers["registered"] == 2


def test_the_schema_says_what_is_served(raw):
    schema = raw.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/metrics"} <= set(schema["paths"])
    for path in schema["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]


def test_requests_that_dawdle_are_dropped(serving, root, lively):
    slow = api_server.make_serving(lively, root)
    slow.engine.engine.warm_up = lambda: None  # It is never asked.
    with api_server.running(slow, request_seconds=1) as url:
        address = httpx.URL(url).netloc.decode().split(":")
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + f"Authorization: Bearer {ALICE}\r\n".encode()
        for sent in (b"", b"GET /hea", head + b"Content-Length: 100\r\n\r\n{"):
            with socket.create_connection(address, timeout=60) as connection:
                connection.sendall(sent)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(100) == b""
        with httpx.Client(base_url=url, trust_env=False) as client:
            assert client.get("/health").status_code == 200
