"""Too many connections, and requests whose ends are not certain: the book alone, and a server without an engine."""

import asyncio
import contextlib
import gzip
import json
import random
import resource
import socket
import threading
import types

import pytest
import uvicorn
from api_server import until

from preft_jax.errors import ConfigError
from serve.server.auth import Keys
from serve.server.connections import AT_ONCE, RESERVED, Connections, allowed_connections
from serve.server.middleware import Front
from serve.server.slow_clients import timed_protocol

pytestmark = pytest.mark.host

KEY = "some-key-1"


# The book


def test_the_oldest_idle_connection_of_the_address_with_most_makes_room():
    book = Connections(6, 4)
    for name, host in (("a1", "10.0.0.1"), ("b1", "10.0.0.2"), ("a2", "10.0.0.1"), ("a3", "10.0.0.1")):
        assert book.open(name, host) is None
    book.busy("a1")
    for name in ("b2", "c1"):
        assert book.open(name, f"10.0.0.{name}") is None
    assert book.open("b3", "10.0.0.2") == "a2", "a1 works"
    assert book.open("c2", "10.0.0.3") in ("a3", "b1")
    assert len(book) == 6


def test_nobody_goes_for_others_while_all_work():
    book = Connections(3, 3)
    for name in "abc":
        book.open(name, "h")
        book.busy(name)
    assert book.open("d", "h") == "d"
    assert book.open("e", "i") == "e"
    book.idle("b")
    assert book.open("f", "i") == "b"
    book.close("b")
    book.idle("b")
    assert book.open("g", "i") == "f"


def test_an_address_has_its_bound_and_an_ipv6_network_is_one():
    book = Connections(100, 2)
    for first, other in (
        ("10.0.0.1", "10.0.0.2"), ("2001:db8::1", "2001:db8:0:1::1"), ("::ffff:10.0.0.9", "10.0.0.8"), (None, "socket")
    ):  # fmt: skip
        for i in range(2):
            assert book.open((first, i), first) is None
        same = "2001:db8::ffff:2" if first == "2001:db8::1" else first
        assert book.open((first, 2), same) == (first, 0)
        assert book.open((first, 3), other) is None
    assert book.open("mapped", "10.0.0.9") is not None
    for most, each in ((0, 0), (5, 6), (5, 0)):
        with pytest.raises(ConfigError, match="limited"):
            Connections(most, each)


def test_the_book_is_right_whatever_happens():
    rng = random.Random(1)
    book, model = Connections(12, 5), {}
    for i in range(5000):
        what = rng.randrange(4)
        if what == 0 or not model:
            host = f"h{rng.randrange(6)}"
            dropped = book.open(i, host)
            model[i] = [host, True]
            if dropped is not None:
                assert dropped == i or model[dropped][1], "nobody who works is dropped"
                del model[dropped]
        else:
            one = rng.choice([*model, i])
            (book.idle, book.busy, book.close)[what - 1](one)
            if one in model and what == 3:
                del model[one]
            elif one in model:
                model[one][1] = what == 1
        assert len(book) == len(model) <= 12
        for host in {host for host, _ in model.values()}:
            assert sum(one == host for one, _ in model.values()) <= 5
    for one in [*model]:
        book.close(one)
    assert [book._address, book._counts, book._idle] == [{}, {}, {}]


def test_descriptors_are_left_for_what_must_go_on():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard), hard))
        allowed = allowed_connections()
        assert 16 <= allowed <= max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert RESERVED >= 4 * AT_ONCE + 32


# A server


async def app(scope, receive, send):
    """Answer with the body's length; ``/held`` in two pieces, the second when the first is read and asked for."""
    body = (await receive()).get("body", b"")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    if scope["path"] == "/held":
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await scope["state"]["free"].wait()
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


class Server:
    """A server of ``app`` behind ``Front``, in a thread."""

    def __init__(self, most=20, per_address=20, seconds=30):
        self.book = Connections(most, per_address)
        self.answers, self.most_open = [], 0
        metrics = types.SimpleNamespace(answered=lambda route, status: self.answers.append(status))
        front = Front(
            self.lifted, keys=Keys({KEY: "ann"}), metrics=metrics, max_body_bytes=10_000, body_seconds=seconds
        )
        config = uvicorn.Config(
            front, http=timed_protocol(seconds, seconds, self.book), backlog=AT_ONCE, lifespan="off", log_config=None,
            access_log=False,
        )  # fmt: skip
        self.server = uvicorn.Server(config)
        self.loop = self.free = None

    async def lifted(self, scope, receive, send):
        if self.free is None:
            self.loop, self.free = asyncio.get_running_loop(), asyncio.Event()
        self.most_open = max(self.most_open, len(self.server.server_state.connections))
        scope["state"]["free"] = self.free
        await app(scope, receive, send)

    def release(self):
        self.loop.call_soon_threadsafe(self.free.set)


@contextlib.contextmanager
def running(**options):
    one = Server(**options)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        one.address = listener.getsockname()
        thread = threading.Thread(target=uvicorn.Server.run, args=(one.server, [listener]))
        thread.start()
        try:
            until(lambda: one.server.started)
            listener.listen(512)  # As the program does: many wait, and few are accepted at a time.
            yield one
        finally:
            if one.free is not None:
                one.release()
            one.server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
    assert len(one.book) == 0


def connect(server):
    found = socket.create_connection(server.address)
    found.settimeout(30)
    return found


def ask(connection, *, method="POST", path="/x", version="1.1", headers=(), body=b""):
    lines = [f"{method} {path} HTTP/{version}", "Host: x", f"Authorization: Bearer {KEY}", *headers]
    connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def rest(connection):
    """Return all that comes until the server closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return found


@pytest.mark.parametrize("said", [b"", b"GET /he", b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nab"])
def test_silent_connections_make_room_and_work_goes_on(said):
    with running() as server, contextlib.ExitStack() as stack:
        held = stack.enter_context(connect(server))
        ask(held, path="/held", headers=["Content-Length: 0"])
        assert held.recv(4096).startswith(b"HTTP/1.1 200")
        for _ in range(100):
            silent = stack.enter_context(connect(server))
            with contextlib.suppress(OSError):
                silent.sendall(said)
        for _ in range(3):
            with connect(server) as one:
                ask(one, method="GET", path="/health", headers=["Connection: close"])
                assert b" 200 " in rest(one)
        assert len(server.book) <= 20
        assert server.most_open <= 20 + 4 * AT_ONCE
        server.release()
        found = b""
        while b"\r\n0\r\n\r\n" not in found:
            found += held.recv(4096) or pytest.fail(str(found))


def test_one_address_cannot_have_all():
    with running(most=20, per_address=5) as server, contextlib.ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(connect(server))
        with connect(server) as one:
            ask(one, method="GET", path="/health", headers=["Connection: close"])
            assert b" 200 " in rest(one)
        until(lambda: len(server.book) == 4)


HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("options", "body"),
    [
        ({"headers": ["Content-Length: 5", "Transfer-Encoding: chunked"]}, b"0\r\n\r\n" + HIDDEN),
        ({"headers": ["Transfer-Encoding: chunked", "Content-Length: 5"]}, b"0\r\n\r\n" + HIDDEN),
        ({"headers": ["transfer-encoding: CHUNKED", "content-length: 0"]}, b"0\r\n\r\n" + HIDDEN),
        ({"headers": ["Content-Length: 5", "Content-Length: 5", "Transfer-Encoding: chunked"]}, b"0\r\n\r\n" + HIDDEN),
        ({"headers": ["Transfer-Encoding: chunked"], "version": "1.0"}, b"0\r\n\r\n" + HIDDEN),
        ({"headers": ["Content-Length: 5", "Transfer-Encoding: chunked"], "method": "GET"}, b"0\r\n\r\n" + HIDDEN),
        ({"headers": ["Content-Length: 0", "Transfer-Encoding: chunked"], "path": "/health"}, b"0\r\n\r\n" + HIDDEN),
        ({"headers": ["Content-Length: 5", "Content-Length: 6"]}, b"0\r\n\r\n" + HIDDEN),
        ({"headers": ["Content-Length: +5"]}, b"0\r\n\r\n" + HIDDEN),
    ],
)  # fmt: skip
def test_a_request_whose_end_is_not_certain_is_the_last(options, body):
    with running() as server, connect(server) as one:
        ask(one, **options, body=body)
        answer = rest(one)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.count(b"HTTP/1.1") == 1
        assert set(server.answers) <= {400}


def test_certain_ends_are_fine():
    with running() as server, connect(server) as one:
        kind = "Content-Type: application/json"
        ask(one, headers=["Transfer-Encoding: chunked", kind], body=b"2\r\n{}\r\n0\r\n\r\n")
        ask(one, headers=["Content-Length: 2", kind, "Connection: close"], body=b"{}")
        answer = rest(one)
        assert answer.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "x-unknown", "GZIP", "deflate"])
def test_a_body_in_an_encoding_that_is_not_understood_is_refused(encoding):
    with running() as server, connect(server) as one:
        body = gzip.compress(b"{}")
        headers = [f"Content-Encoding: {encoding}", f"Content-Length: {len(body)}", "Content-Type: application/json"]
        ask(one, headers=headers, body=body)
        head, _, content = rest(one).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 415 ")
        assert b"accept-encoding: identity" in head.lower()
        assert json.loads(content)["error"]["code"] == "encoding_not_supported"


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
def test_a_body_as_it_is_is_read(encoding):
    with running() as server, connect(server) as one:
        headers = [f"Content-Encoding: {encoding}", "Content-Length: 2", "Content-Type: application/json"]
        ask(one, headers=[*headers, "Connection: close"], body=b"{}")
        assert rest(one).startswith(b"HTTP/1.1 200 ")
