import http.server
import json
import socket
import threading

import httpx
import pytest

from preft_jax.errors import ConfigError
from serve.bench import __main__ as bench
from serve.bench import client
from serve.bench.client import HttpTarget, ServerError, list_models
from serve.bench.load import LoadRequest

USAGE = {"prompt_tokens": 3, "completion_tokens": 2}


def event(chunk):
    return b"data: " + (chunk if isinstance(chunk, bytes) else json.dumps(chunk, ensure_ascii=False).encode()) + b"\n\n"


def text(piece, reason=None):
    return {"choices": [{"text": piece, "finish_reason": reason}]}


def delta(reason=None, **fields):
    return {"choices": [{"delta": fields, "finish_reason": reason}]}


DONE = b"[DONE]"
STREAMS = {
    "good": [text("a"), text("b", "length"), {"choices": [], "usage": USAGE}, DONE],
    "separator": [text("a\u2028b\x85"), text("c", "length"), {"choices": [], "usage": USAGE}, DONE],
    "late": [text(""), text("", "length"), {"choices": [], "usage": USAGE}, DONE],
    "one": [text("", "stop"), {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}, DONE],
    "uncounted": [text("a"), text("b"), text("c", "stop"), DONE],
    "aborted": [text("a"), text("", "abort"), DONE],
    "ended": [text("a"), text("", "error"), DONE],
    "malformed": [text("a"), b'{"choices": ['],
    "shapeless": [b'{"choices": [1]}'],
    "usageless": [text("a", "stop"), {"choices": [], "usage": {"prompt_tokens": "3"}}],
    "reported": [text("a"), {"error": {"message": "out of pages"}}],
    "short": [text("a")],
    "chat": [
        delta(role="assistant", content=""),
        delta(content="a"),
        delta(content=""),
        delta(reason="stop"),
        {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}},
        DONE,
    ],
}
STREAMS |= {"b": STREAMS["good"], "a0": STREAMS["good"]}
CODES = {"busy": 429, "full": 503, "wrong": 400, "dead": 500}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the stream or the status that the model's name asks for."""

    protocol_version = "HTTP/1.1"
    models = '{"data": [{"id": "b"}, {"id": "a0", "parent": "b"}]}'

    def log_message(self, *_):
        pass

    def _answer(self, code, body, kind="application/json", length=None):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self._answer(200, self.models.encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.seen.append((self.path, self.headers.get("Authorization"), body))
            server.active += 1
            server.most = max(server.most, server.active)
        name = body["model"]
        try:
            if name in CODES:
                self._answer(CODES[name], json.dumps({"error": {"message": f"{name}\nnow"}}).encode())
            elif name == "broken":
                self._answer(200, event(text("a")), "text/event-stream", length=10_000)
                self.close_connection = True
            else:
                stream = b": a comment\n\n" + b"".join(event(chunk) for chunk in STREAMS[name])
                if server.gate is not None:
                    server.gate.wait(0.05)
                self._answer(200, stream, "text/event-stream")
        finally:
            with server.lock:
                server.active -= 1


@pytest.fixture
def server():
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.daemon_threads = True
    found.seen, found.active, found.most, found.lock, found.gate = [], 0, 0, threading.Lock(), None
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def url(server):
    return f"http://127.0.0.1:{server.server_port}"


def load(server, *names, **options):
    requests = [LoadRequest(arrival=0.0, prompt=[5, 6, 7], max_tokens=2, user=i) for i in range(len(names))]
    return HttpTarget(url(server), names.__getitem__, **options).run(requests)


def test_a_stream_is_a_record_with_the_servers_token_counts(server):
    found = load(server, "good", api_key="k").records[0]
    assert (found.status, found.prompt_len, found.output_len, found.adapter) == ("completed", 3, 2, 0)
    assert len(found.times) == 2
    assert 0 < found.times[0] <= found.times[1]
    assert not found.estimated
    path, key, body = server.seen[0]
    assert (path, key) == ("/v1/completions", "Bearer k")
    assert body == {
        "model": "good",
        "prompt": [5, 6, 7],
        "max_tokens": 2,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_chat_sends_text_and_its_role_is_no_output(server):
    options = {"endpoint": "/v1/chat/completions", "decode": str, "ignore_eos": False}
    found = load(server, "chat", **options).records[0]
    assert (found.status, found.output_len, len(found.times)) == ("completed", 2, 2)
    path, key, body = server.seen[0]
    assert (path, key) == ("/v1/chat/completions", None)
    assert body["messages"] == [{"role": "user", "content": "[5, 6, 7]"}]
    assert not {"prompt", "ignore_eos"} & set(body)


@pytest.mark.parametrize(
    ("name", "status", "outputs", "tokens", "error"),
    [
        ("separator", "completed", 2, 2, None),
        ("late", "completed", 1, 2, None),
        ("one", "completed", 1, 1, None),
        ("uncounted", "completed", 3, 3, None),
        ("aborted", "aborted", 1, 1, None),
        ("ended", "failed", 1, 1, "finish_reason 'error'"),
        ("malformed", "failed", 1, 1, "malformed chunk"),
        ("shapeless", "failed", 0, 0, "malformed chunk"),
        ("usageless", "failed", 1, 1, "malformed usage"),
        ("reported", "failed", 1, 1, "out of pages"),
        ("short", "failed", 1, 1, "ended before"),
        ("broken", "failed", 1, 1, "RemoteProtocolError"),
        ("busy", "rejected", 0, 0, "HTTP 429: busy now"),
        ("full", "rejected", 0, 0, "HTTP 503: full now"),
        ("wrong", "rejected", 0, 0, "HTTP 400: wrong now"),
        ("dead", "failed", 0, 0, "HTTP 500: dead now"),
    ],
)
def test_whatever_comes_back_is_counted_and_never_fatal(server, name, status, outputs, tokens, error):
    found, beside = load(server, name, "good").records
    assert (found.status, len(found.times), found.output_len) == (status, outputs, tokens)
    assert error in found.error if error else found.error is None
    assert found.estimated == (name == "uncounted")
    assert beside.status == "completed"


def test_no_more_than_max_concurrency_are_sent(server):
    server.gate = threading.Event()
    found = load(server, *["good"] * 9, max_concurrency=2)
    assert server.most <= 2
    assert len(found.completed) == 9


def test_requests_wait_for_their_arrival(server):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    requests = [LoadRequest(arrival=at, prompt=[1], max_tokens=1) for at in (0.0, 50.0)]
    target = HttpTarget(url(server), lambda _: "good", sleep=sleep, clock=lambda: 7.0)
    assert len(target.run(requests).completed) == 2
    assert slept == [0.0, 50.0]


@pytest.fixture
def nowhere():
    """Return an address that nothing listens at any more."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        return f"http://127.0.0.1:{gone.getsockname()[1]}"


def test_a_server_that_is_not_there(nowhere):
    requests = [LoadRequest(arrival=0.0, prompt=[1], max_tokens=1)]
    found = HttpTarget(nowhere, lambda _: "good").run(requests).records[0]
    assert (found.status, found.output_len) == ("failed", 0)
    assert "ConnectError" in found.error
    with pytest.raises(ServerError, match="cannot reach"):
        list_models(nowhere)


def test_models_are_listed_with_their_base(server, monkeypatch):
    assert list_models(url(server)) == [("b", None, None), ("a0", "b", None)]
    for wrong in ("<html>", "[]", '{"data": [{}]}', '{"data": 5}'):
        monkeypatch.setattr(Handler, "models", wrong)
        with pytest.raises(ServerError, match="list of models"):
            list_models(url(server))


def test_an_answer_that_is_no_list_of_models_names_its_status():
    transport = httpx.MockTransport(lambda request: httpx.Response(401, json={"error": "who are you"}))
    with pytest.raises(ServerError, match="answered 401: who are you"):
        list_models("http://x", transport=transport)


def test_endpoints_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="allowed: /v1/completions"):
        HttpTarget("http://x", str, endpoint="/v2")
    with pytest.raises(ConfigError, match="no tokenizer"):
        HttpTarget("http://x", str, endpoint=client.ENDPOINTS[1])


def run(server, *arguments):
    return bench.main(["--base-url", url(server), "--model", "tiny", "--num-prompts", "3", *arguments])


def test_the_program_finds_a_servers_models_and_compares_them(server, capsys):
    assert run(server, "--rounds", "3", "--num-warmups", "0", "--api-key", "secret") == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    found = json.loads(line)
    assert [(c["mode"], c["num_adapters"]) for c in found["contenders"]] == [("base", 0), ("prefill_only", 1)]
    assert [body["model"] for _, _, body in server.seen].count("a0") == 9
    assert found["modes"]["prefill_only"]["total_output_tokens"] == 18
    assert "low" in found["ratio_to_base"]["prefill_only"]
    assert found["recompiles"] is None
    assert found["server"] == {"base_url": url(server), "endpoint": "/v1/completions"}
    assert "secret" not in line


def test_models_can_be_named(server, capsys, monkeypatch):
    monkeypatch.setattr(Handler, "models", "none")
    names = ("--served-model-name", "good", "--lora-modules", "one", "late")
    assert run(server, *names, "--mode", "base,all-token", "--endpoint", "/v1/completions") == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [(c["mode"], c["num_adapters"]) for c in found["contenders"]] == [("base", 0), ("all_token", 2)]
    assert {body["model"] for _, _, body in server.seen} <= {"good", "one", "late"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--served-model-name", "busy", "--mode", "base"),
            "none of the 1 warm-ups of base completed; the first: HTTP 429",
        ),
        (("--num-adapters", "2"), "the server has 1 adapters"),
    ],
)
def test_what_cannot_be_compared_ends_with_one_line(server, capsys, arguments, message):
    assert run(server, *arguments) == 1
    assert message in capsys.readouterr().err


def cards(**positions):
    adapters = [{"id": name, "parent": "b", "positions": said} for name, said in positions.items()]
    return json.dumps({"data": [{"id": "b", "positions": None}, *adapters]})


def contenders(server, capsys, *arguments):
    """Return what each contender asked the server for, warm-ups included."""
    server.seen.clear()
    assert run(server, *arguments) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["contenders"]
    asked = [body["model"] for _, _, body in server.seen]
    return [(c["mode"], c["num_adapters"]) for c in found], set(asked)


def test_a_server_says_which_adapters_edit_every_token(server, capsys, monkeypatch):
    monkeypatch.setattr(Handler, "models", cards(one="all", late="all"))
    assert contenders(server, capsys) == ([("base", 0), ("all_token", 2)], {"b", "one", "late"})
    assert run(server, "--mode", "prefill-only") == 1
    assert "--mode prefill-only" in capsys.readouterr().err
    monkeypatch.setattr(Handler, "models", cards(one="all", late="f2+l1", a0=None))
    both = ([("base", 0), ("prefill_only", 1), ("all_token", 1)], {"b", "one", "late"})
    assert contenders(server, capsys) == both
    assert contenders(server, capsys, "--mode", "base,all-token") == (
        [("base", 0), ("all_token", 2)], {"b", "one", "a0"}
    )  # fmt: skip
    named = ("--mode", "base,prefill-only", "--lora-modules", "late", "separator")
    assert contenders(server, capsys, *named) == ([("base", 0), ("prefill_only", 2)], {"b", "late", "separator"})


def test_a_server_without_adapters_runs_base_alone(server, capsys, monkeypatch):
    monkeypatch.setattr(Handler, "models", '{"data": [{"id": "b"}]}')
    assert run(server) == 0
    assert set(json.loads(capsys.readouterr().out.strip().splitlines()[-1])["modes"]) == {"base"}
    assert run(server, "--mode", "prefill-only") == 1
    assert "--lora-modules" in capsys.readouterr().err
