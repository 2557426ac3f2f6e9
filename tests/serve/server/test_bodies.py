"""What a body may cost: counted before it is read, the first fault told, large ones read off the event loop."""

import asyncio
import json
import threading
import tracemalloc

import pytest
from pydantic import ValidationError

from bench.hostile_bodies import hostile_bodies
from serve.server import bodies
from serve.server.bodies import SMALL, Bodies, Bounds, parse
from serve.server.failures import ApiError
from serve.server.protocol import ChatBody, CompletionBody, DetokenizeBody

pytestmark = pytest.mark.host

KINDS = {"/v1/completions": CompletionBody, "/v1/chat/completions": ChatBody, "/detokenize": DetokenizeBody}
MIB = 2**20


def refused(raw, kind):
    with pytest.raises(ApiError) as caught:
        parse(raw, kind)
    assert caught.value.status == 400
    assert len(caught.value.message) < 400
    return caught.value


@pytest.mark.parametrize("name", hostile_bodies(1000))
def test_a_bad_body_costs_little_memory(name):
    path, raw = hostile_bodies(4 * MIB)[name]
    tracemalloc.start()
    try:
        refused(raw, KINDS[path])
        assert tracemalloc.get_traced_memory()[1] < 100 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("stop", [0] * 999), ("stop_token_ids", [-1] * 999), ("prompt", [["a"]] * 999), ("stop", [""] * 999),
     ("logit_bias", {str(i): "x" for i in range(300)}), ("logit_bias", {"a" * i: 0 for i in range(999)})],
)  # fmt: skip
def test_checking_ends_with_the_first_entries_that_are_wrong(field, wrong):
    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate({"model": "m", "prompt": "a", field: wrong})
    assert caught.value.error_count() <= 300
    if isinstance(wrong, list):
        assert caught.value.error_count() <= 2
        assert refused(json.dumps({"model": "m", "prompt": "a", field: wrong}).encode(), CompletionBody).param


def test_what_is_counted_is_what_stands_outside_of_texts():
    bounds = Bounds(values=20, containers=3, names=4)
    message = '{"role":"user","content":%s}'
    for text in ("[[[[{{{{,,,,::::" * 9, '"[[[[', "\\", '\\"[[[[', "\\\\[[[["):
        raw = ('{"messages":[' + message % json.dumps(text) + "]}").encode()
        bounds.check(raw)
    for raw in (b"[" * 4, b"{" * 4, b'"":' * 5, b"1," * 21, b'"\\\\"' + b"[" * 4, b'"\\""' + b"[" * 4):
        with pytest.raises(ApiError):
            bounds.check(raw)


def test_where_larger_bodies_are_let_in_they_may_hold_more():
    assert Bounds.of(2**16) == Bounds.of(4 * MIB) == Bounds()
    assert Bounds.of(64 * MIB).values == 16 * Bounds().values


class Given:
    def __init__(self, raw):
        self.raw = raw

    async def body(self):
        return self.raw


def test_a_large_body_is_read_in_another_thread(monkeypatch):
    threads = []
    real = bodies.parse

    def noted(*args):
        threads.append(threading.current_thread())
        return real(*args)

    monkeypatch.setattr(bodies, "parse", noted)
    read = Bodies(4 * MIB).of(CompletionBody)
    small = b'{"model":"m","prompt":"a"}'
    for raw in (small, small + b" " * SMALL, small + b" " * SMALL):
        assert asyncio.run(read(Given(raw))).prompt == ["a"]
    assert threads[0] is threading.main_thread()
    assert threads[1] is threads[2] is not threading.main_thread()


@pytest.mark.parametrize(
    ("raw", "code"),
    [(b"", "invalid_body"), (b"{", "bad_json"), (b'{"a":1,}', "bad_json"), (b"\xff", "bad_json"),
     (b"[]", "invalid_body"),
     ('{"model":"m"}'.encode("utf-16"), "bad_json"), (b"1" * 5000, "bad_json"), (b"[" * 20000, "bad_json"),
     (b"null", "invalid_body"), (b"NaN", "invalid_body")],
)  # fmt: skip
def test_what_is_no_body_at_all(raw, code):
    assert refused(raw, CompletionBody).code == code
