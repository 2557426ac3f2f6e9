import json

import httpx
import jax
import numpy as np
import openai
import pytest
from api_server import ADMIN, ALICE, BOB, NOBODY, admin, client
from engine_runs import ATOL, chances, request

from preft_jax import AdapterConfig, random_adapter
from preft_jax.text.chat import encode_prompt
from serve.bench.client import ENDPOINTS, HttpTarget, list_models
from serve.bench.load import LoadRequest
from serve.store.names import RegistryError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


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
        assert bob.models.retrieve("public").kind == "lora"
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
    assert np.diff(logprobs.text_offset).min() >= 0
    for token, at in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert "\ufffd" in token or choice.text.startswith(token, at)


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


def test_a_learned_prefix_takes_room_and_is_no_part_of_the_prompt(serving, raw, lively):
    adapter = random_adapter(AdapterConfig(kind="prefix", rank=20), lively.config, jax.random.key(0))
    serving.adapters.publish("prefixed", adapter)
    body = {"messages": CHAT, "ignore_eos": True}
    usage = {
        name: raw.post("/v1/chat/completions", json={"model": name, **body}).json()["usage"]
        for name in ("tiny", "prefixed")
    }
    assert usage["prefixed"]["prompt_tokens"] == usage["tiny"]["prompt_tokens"]
    assert usage["tiny"]["total_tokens"] == 128 == usage["prefixed"]["total_tokens"] + 20
    refused = raw.post("/v1/chat/completions", json={"model": "prefixed", "max_tokens": 108, **body})
    assert refused.status_code == 400
    assert "behind a learned prefix of 20" in refused.json()["error"]["message"]
    serving.adapters.unregister("prefixed")


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


def test_what_is_replaced_keeps_its_owner_and_pin_unless_told_otherwise(serving, url, root):
    """vLLM's body knows neither: a tenant's adapter must not become everybody's by it."""
    body = {"lora_name": "private", "lora_path": str(root / "late")}
    with admin(url) as boss, httpx.Client(base_url=url, headers={"Authorization": f"Bearer {ALICE}"}) as alice:

        def load(**more):
            assert boss.post("/v1/load_lora_adapter", json=body | more).status_code == 200
            adapter = serving.adapters.get("private")
            return adapter.owner, adapter.pinned, alice.get("/v1/models/private").status_code

        try:
            assert load(owner="bob", pinned=True) == ("bob", True, 404)
            assert load(load_inplace=True) == ("bob", True, 404)
            assert load(load_inplace=True, pinned=False) == ("bob", False, 404)
            assert load(load_inplace=True, owner=None) == ("bob", False, 404), "null is as good as nothing"
            assert load(load_inplace=True, owner="alice") == ("alice", False, 200)
        finally:
            boss.post("/v1/unload_lora_adapter", json={"lora_name": "private"})


def test_more_prompts_than_may_ever_wait_are_a_mistake(raw, monkeypatch, serving):
    monkeypatch.setattr(serving.engine, "max_waiting", 3)
    found = raw.post("/v1/completions", json={"model": "base", "prompt": ["a"] * 4, "max_tokens": 1})
    assert found.status_code == 400
    assert "4 prompts, and at most 3 may wait" in found.json()["error"]["message"]


def test_what_cannot_be_written_is_no_success_and_no_404(url, serving, monkeypatch):
    """The name is still there, and the answer says so."""

    def fails(*args, **options):
        raise RegistryError("adapters.sqlite cannot be written: disk full; nothing was changed: it is still registered")

    monkeypatch.setattr(serving.adapters, "unregister", fails)
    monkeypatch.setattr(serving.adapters, "register", fails)
    with admin(url) as boss:
        for path, body in (
            ("/v1/unload_lora_adapter", {"lora_name": "public"}),
            ("/v1/load_lora_adapter", {"lora_name": "late", "lora_path": "late"}),
        ):
            found = boss.post(path, json=body)
            assert (found.status_code, found.json()["error"]["code"]) == (503, "not_stored")
            assert "it is still registered" in found.json()["error"]["message"]
            assert found.headers["Retry-After"]
        names = {model["id"] for model in boss.get("/v1/models").json()["data"]}
    assert "public" in names
    assert "late" not in names
