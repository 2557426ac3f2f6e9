"""A server that prefills and one that decodes, over HTTP: together they answer as one does."""

import contextlib
import dataclasses
import http.server
import json
import threading
import time

import api_program
import api_server
import httpx
import pytest
from api_server import ALICE, BOB, CONFIG, USERS, Keys, admin, client, until
from engine_outputs import TIGHT, request, run_one

from preft_jax.errors import ConfigError
from preft_jax.shapes import SITES
from serve import options
from serve.engine.async_engine import AsyncEngine
from serve.engine.engine import Engine
from serve.server.apart import HANDOVER, PrefillServer
from serve.server.serving import Serving
from serve.store.files import AdapterFiles
from serve.store.host import AdapterStore
from serve.store.names import Registry

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


def make_serving(model, **fields):
    """Return a server of a role."""
    store = AdapterStore(AdapterFiles(model), Registry(), host_bytes=2**28)
    role = "decode" if fields.get("prefill") else "prefill"
    bank_pages = 1 if role == "decode" else CONFIG.bank_pages
    config = dataclasses.replace(CONFIG, role=role, bank_pages=bank_pages, bank_sites=SITES)
    running = AsyncEngine(Engine(model, config, store=store))
    sizes = {"max_model_len": CONFIG.max_model_len, "max_body_bytes": 2**16}
    keys = Keys(USERS, api_server.ADMIN)
    return Serving(model=model, names=("tiny",), engine=running, adapters=store, keys=keys, **sizes, **fields)


def until_ready(url):
    until(lambda: httpx.get(f"{url}/ready", trust_env=False).status_code == 200)


@pytest.fixture(scope="module")
def apart(lively, root, own):
    """Yield a decode server's address, both servers, and what ends the prefill server."""
    prefill = make_serving(lively, hands_over=True)
    prefill.adapters.register("public", str(root / "public"))
    prefill.adapters.register("alices", str(root / "alices"), owner="alice")
    with api_server.running(prefill) as prefill_url:
        decode = make_serving(lively, prefill=PrefillServer(prefill_url))
        with api_server.running(decode) as url:
            until_ready(prefill_url)
            until_ready(url)
            yield url, prefill_url, decode, prefill
    for serving in (prefill, decode):
        assert serving.engine.engine.stats.recompiles == 0


def test_they_answer_as_one_server_does(apart, url, own):
    """Adapters by name, several prompts and samples, log-probabilities, stop texts, streams and chats."""
    bodies = [
        {"model": name, "prompt": prompt, "max_tokens": 12, "seed": 3, "n": n, "logprobs": 2, "stop": ["zz"]}
        for name, prompt, n in (
            ("tiny", "Hello", 1),
            ("public", ["a", "Once upon a time"], 2),
            ("alices", [[1, 2, 3]], 1),
        )
    ]
    with client(apart[0], ALICE) as ours, client(url, ALICE) as theirs:
        for body in bodies:
            found, wanted = (one.completions.create(**body).model_dump() for one in (ours, theirs))
            for choice, other in zip(found["choices"], wanted["choices"], strict=True):
                assert (choice["text"], choice["finish_reason"]) == (other["text"], other["finish_reason"])
                assert choice["logprobs"]["tokens"] == other["logprobs"]["tokens"]
                assert choice["logprobs"]["token_logprobs"] == pytest.approx(
                    other["logprobs"]["token_logprobs"], abs=1e-4
                )
            assert found["usage"] == wanted["usage"]
        chat = {"model": "public", "messages": CHAT, "max_tokens": 8, "temperature": 0.0, "stream": True}
        pieces = [[p.choices[0].delta.content for p in one.chat.completions.create(**chat)] for one in (ours, theirs)]
        assert "".join(p or "" for p in pieces[0]) == "".join(p or "" for p in pieces[1])
        assert {m.id for m in ours.models.list()} == {"tiny", "public", "alices"}
        assert ours.models.retrieve("public").parent == "tiny"
    decode = apart[2].engine.engine
    assert decode.stats.prompt_tokens < decode.stats.generated_tokens  # It computes nothing of prompts.
    assert not decode.runner.bank


def test_what_the_prefill_server_refuses_is_what_the_client_is_told(apart):
    url, prefill_url, _, _ = apart
    body = {"model": "alices", "prompt": "a", "max_tokens": 4}
    for key, change, status, told in (
        (BOB, {}, 404, "does not exist"),
        (ALICE, {"max_tokens": 1000}, 400, "1000 are asked for"),
        (ALICE, {"max_tokens": 0}, 400, "max_tokens"),
        ("no-key", {}, 401, ""),
    ):
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{url}/v1/completions", json={**body, **change}, headers=headers, trust_env=False)
        assert answer.status_code == status
        assert told in answer.json()["error"]["message"]
    with api_server.client(prefill_url, ALICE) as direct, pytest.raises(Exception, match="this server prefills only"):
        direct.completions.create(**body)


@pytest.mark.parametrize("name", ["..%2F..%2Fmetrics", "a%2F..%2F..%2F..%2Fstats", "%2E%2E", "%00%0d%0a", "x%3Fy%23z"])
def test_the_name_of_a_model_leads_to_no_other_route(name, apart):
    with admin(apart[0]) as one:
        answer = one.get(f"/v1/models/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_a_client_that_goes_away_frees_both(apart):
    url, _, decode, prefill = apart
    body = {"model": "public", "prompt": "a", "max_tokens": 100, "n": 2, "stream": True}
    with admin(url) as one, one.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    until(lambda: api_server.is_idle(decode) and api_server.is_idle(prefill))


class Stub(http.server.BaseHTTPRequestHandler):
    """Answers what its server was told, after as many seconds."""

    def do_POST(self):
        told = self.server
        told.asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(told.seconds)
        self.send_response(told.status)
        self.send_header("Content-Length", str(len(told.content)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(told.content)

    def log_message(self, *_):
        pass


@pytest.fixture
def stub(apart, monkeypatch):
    """Stand in for the prefill server of the decode server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        server.asked, server.seconds, server.status, server.content = 0, 0.0, 200, b""
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(apart[2], "prefill", PrefillServer(server.url))
        yield server
        server.shutdown()
        thread.join()


def complete(url, **fields):
    with admin(url) as one:
        return one.post("/v1/completions", json={"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4, **fields})


def assert_failed(answer, code, message=""):
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == code
    assert message in answer.json()["error"]["message"]


def test_a_prefill_server_that_does_not_answer_is_an_error_to_try_again(apart, stub, monkeypatch):
    stub.seconds = 0.2
    for prefill, reason in ((PrefillServer(stub.url, 0.05), "ReadTimeout"), (PrefillServer("http://127.0.0.1:9"), "")):
        monkeypatch.setattr(apart[2], "prefill", prefill)
        answer = complete(apart[0])
        assert_failed(answer, "prefill_unreachable", reason)
        assert answer.headers["retry-after"]


def test_an_answer_that_does_not_fit_is_the_prefill_servers_failure(apart, stub):
    """None or too many handovers, one of other samples, no handovers, and more bytes than a prompt's KV can have."""
    url, prefill_url, _, _ = apart
    with admin(prefill_url) as one:
        body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4}
        good = one.post("/v1/completions", json=body, headers={"Accept": HANDOVER}).content
    stub.content = good
    assert complete(url).status_code == 200
    for content, fields, message in (
        (b"", {}, "1 prompts with 0 handovers"),
        (good * 2, {}, "1 prompts with 2 handovers"),
        (good, {"n": 2}, "n is 2, and the handover has 1"),
        (good, {"logprobs": 3}, "logprobs is 3"),
        (b'{"choices": []}', {}, "no handover of version 1"),
        (bytes(2**22), {}, "has more than"),
    ):
        stub.content = content
        assert_failed(complete(url, **fields), "prefill_failed", message)


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        (400, {"message": "No.", "code": "bad", "param": None}, 400),
        (500, {"message": "It broke.", "code": "internal_error", "param": None}, 503),
        (400, {"message": {"a": 1}, "code": "bad", "param": None}, 503),
        (400, {"message": "No.", "code": 7, "param": None}, 503),
        (400, {"message": "No.", "code": "bad", "param": ["a"]}, 503),
        (400, ["No."], 503),
        (302, {"message": "Elsewhere.", "code": "moved", "param": None}, 503),
    ],
)
def test_a_refusal_is_passed_on_if_it_is_one(status, error, told, apart, stub):
    stub.status, stub.content = status, json.dumps({"error": error}).encode()
    answer = complete(apart[0])
    assert answer.status_code == told
    assert all(isinstance(value, str | None) for value in answer.json()["error"].values())


def test_nothing_is_prefilled_for_a_server_that_takes_no_requests(apart, stub, monkeypatch):
    monkeypatch.setattr(apart[2].engine, "ready", False)
    assert_failed(complete(apart[0]), "unavailable", "is starting")
    assert not stub.asked


def test_tokens_are_those_of_the_base_model_whatever_the_name(apart):
    with admin(apart[0]) as one:
        tokens = one.post("/tokenize", json={"model": "public", "prompt": "Hello"}).json()["tokens"]
        assert one.post("/detokenize", json={"model": "public", "tokens": tokens}).json()["prompt"] == "Hello"


def test_two_processes(tmp_path, tiny):
    """The program in both roles: what one sends over a socket another decodes as an engine alone would."""
    adapter = api_server.adapter_directory(tmp_path / "adapters", "mine", tiny, 0)
    body = {"model": "mine", "prompt": [72, 101, 108], "max_tokens": 20, "temperature": 0, "logprobs": 0}
    with (
        api_program.Program("--role", "prefill", "--adapter-dir", str(tmp_path / "adapters")) as prefill,
        api_program.Program("--role", "decode", "--prefill-url", prefill.url) as decode,
    ):
        prefill.until_ready()
        decode.until_ready()
        with decode.client(ALICE) as one:
            (choice,) = one.post("/v1/completions", json=body).json()["choices"]
        with prefill.client(ALICE) as one:
            answer = one.post("/v1/completions", json=body, headers={"Accept": HANDOVER})
    assert answer.headers["content-type"] == HANDOVER
    alone = run_one(Engine(tiny, TIGHT), request(body["prompt"], adapter, max_tokens=20))
    assert choice["text"] == alone.text
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(alone.logprobs, abs=1e-4)


@pytest.mark.host
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--role", "decode"), "need each other"),
        (("--prefill-url", "http://a"), "need each other"),
        (("--role", "decode", "--prefill-url", "a:80"), "give an address such as"),
        (("--role", "decode", "--prefill-url", "http://a", "--prefill-timeout", "inf"), "give a number above 0"),
        (("--role", "prefill", "--all-token"), "serve them with --role both"),
        (("--role", "decode", "--prefill-url", "http://a", "--lora-modules", "a=b"), "--role decode has no adapters"),
    ],
)
def test_options_of_roles_are_checked(arguments, message):
    with pytest.raises(ConfigError, match=message):
        options.check(options.make_parser().parse_args(arguments))


@pytest.mark.host
def test_a_decode_server_without_keys_says_what_that_means(caplog):
    given = ["--role", "decode", "--prefill-url", "http://a"]
    for more, warned in ((["--api-key", "alice=alice-key-1"], False), ([], True)):
        options.check(options.make_parser().parse_args([*given, *more]))
        assert ("all clients are one tenant" in caplog.text) == warned
