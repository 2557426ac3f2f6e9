"""The API under way: clients that leave, overload, metrics and the log."""

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import socket

import api_server
import httpx
import openai
import pytest
from api_server import ADMIN, ALICE, BOB, NOBODY, admin, client, is_idle, until
from prometheus_client.parser import text_string_to_metric_families

from serve.server.generation import EventStream

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


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


def test_samples_that_nobody_waited_for_are_counted(serving, gate, url, raw):
    def ended():
        with admin(url) as one:
            families = text_string_to_metric_families(one.get("/metrics").text)
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
    with client(url, ALICE) as alice, client(url, BOB) as bob:
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
                alice.completions.create(model="tiny", prompt="a")
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


def test_who_fills_the_queue_does_not_shut_others_out(serving, gate, url, raw, monkeypatch):
    monkeypatch.setattr(serving.engine, "max_waiting", 8)
    gate.shut()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        body = {"model": "tiny", "prompt": ["a"] * 8, "max_tokens": 2, "n": 4}
        first = pool.submit(raw.post, "/v1/completions", json=body)
        until(lambda: serving.engine.num_waiting == 8)
        assert raw.post("/v1/completions", json={"model": "tiny", "prompt": "a"}).status_code == 429
        ends = []
        with client(url, BOB) as bob:
            second = pool.submit(bob.completions.create, model="tiny", prompt="b", max_tokens=2)
            first.add_done_callback(lambda _: ends.append("alice"))
            second.add_done_callback(lambda _: ends.append("bob"))
            until(lambda: serving.engine.num_waiting == 9)
            gate.open()
            assert second.result().usage.completion_tokens == 2
        assert len(first.result().json()["choices"]) == 32
    assert ends == ["bob", "alice"]


# What one tenant learns of another


SECRETS = [f"{word} is my password: " for word in ("correct", "horse", "battery", "staple", "sesame")]


def hits(serving, url, key, prompt, **more):
    """Return the prompt tokens of a request that were found in the prefix cache."""
    before = serving.engine.engine.stats.prefix_hit_tokens
    body = {"model": "public", "prompt": prompt, "max_tokens": 1, **more}
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=60) as one:
        assert one.post("/v1/completions", json=body).status_code == 200
    until(lambda: is_idle(serving))
    return serving.engine.engine.stats.prefix_hit_tokens - before


def test_the_prefix_cache_is_kept_apart_by_tenant_and_by_salt(serving, url, monkeypatch):
    """Who guesses another's prompt finds the same in the cache for each guess: nothing."""
    assert hits(serving, url, ALICE, SECRETS[2]) == 0
    assert hits(serving, url, ALICE, SECRETS[2]) > 0
    for key in (BOB, NOBODY, ADMIN):
        assert [hits(serving, url, key, guess) for guess in SECRETS] == [0] * 5
        assert hits(serving, url, key, SECRETS[2]) > 0, "one's own"
    assert hits(serving, url, ALICE, SECRETS[2], cache_salt="a") == 0
    assert hits(serving, url, ALICE, SECRETS[2], cache_salt="b") == 0
    assert hits(serving, url, ALICE, SECRETS[2], cache_salt="a") > 0
    assert hits(serving, url, BOB, SECRETS[2], cache_salt="a") == 0, "a salt that is known opens nothing"
    monkeypatch.setattr(serving, "share_prefix_cache", True)
    assert hits(serving, url, BOB, "Shared by all who are let in.") == 0
    assert hits(serving, url, ALICE, "Shared by all who are let in.") > 0
    assert hits(serving, url, ALICE, "Shared by all who are let in.", cache_salt="a") == 0


def test_figures_that_count_everybodys_requests_are_the_admins(url, serving):
    for key in (ALICE, BOB, NOBODY):
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, trust_env=False) as one:
            for path in ("/metrics", "/stats"):
                answer = one.get(path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_only")


# For operators


def test_prometheus_reads_the_metrics(url, raw, serving):
    def read():
        with admin(url) as one:
            text = one.get("/metrics").text
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
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


def test_routers_are_told_which_adapters_requests_have(serving, gate, url, raw):
    """As by vLLM: names by commas, in labels, of adapters that run and of those that wait for a first token."""

    def told():
        with admin(url) as one:
            families = text_string_to_metric_families(one.get("/metrics").text)
        (sample,) = [s for family in families for s in family.samples if s.name == "vllm:lora_requests_info"]
        assert sample.value > 1e9
        assert sample.labels["max_lora"] == "8"
        return sample.labels["running_lora_adapters"], sample.labels["waiting_lora_adapters"]

    body = {"prompt": "a", "max_tokens": 90, "stream": True}
    with (
        concurrent.futures.ThreadPoolExecutor() as pool,
        raw.stream("POST", "/v1/completions", json={"model": "public", **body}) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        gate.shut()
        others = [pool.submit(raw.post, "/v1/completions", json={"model": one, **body}) for one in ("alices", "tiny")]
        until(lambda: serving.engine.num_open == 3)
        assert told() == ("public", "alices")
        gate.open()
        assert all(other.result().status_code == 200 for other in others)
        for _ in lines:
            pass
    until(lambda: is_idle(serving))
    assert told() == ("", "")


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


def test_why_a_request_failed_is_for_the_log_alone(raw, caplog, monkeypatch):
    def broken(new, sample):
        raise RuntimeError("the file /secret/place is gone")

    caplog.set_level(logging.INFO, "preft.server")
    monkeypatch.setattr("serve.engine.engine.to_output", broken)
    body = {"model": "base", "prompt": "a", "max_tokens": 2}
    found = raw.post("/v1/completions", json=body)
    assert (found.status_code, found.json()["error"]["code"]) == (500, "generation_failed")
    streamed = raw.post("/v1/completions", json=body | {"stream": True})
    for text in (found.text, streamed.text):
        assert "whose log says why" in text
        assert "secret" not in text
    told = [record.facts for record in caplog.records if record.message == "a request failed"]
    assert [facts["id"] for facts in told] == [answer.headers["X-Request-Id"] for answer in (found, streamed)]
    assert all("/secret/place" in facts["reason"] for facts in told)


def test_figures_of_the_page(url, raw):
    raw.post("/v1/completions", json={"model": "public", "prompt": "a", "max_tokens": 2})
    with admin(url) as one:
        found = one.get("/stats").json()
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
