"""Handing an adapter to a server: into the directory that it watches, or by its route for loading."""

import http.server
import json
import threading

import jax
import numpy as np
import pytest

import preft_jax
from preft_jax import AdapterConfig
from preft_jax.errors import AdapterError
from preft_jax.io.adapter_files import load_adapter
from train.publish import publish


@pytest.fixture
def adapter(tiny, rng):
    config = AdapterConfig(rank=2, targets=("q",))
    return preft_jax.random_adapter(config, tiny.config, jax.random.key(int(rng.integers(1000))))


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("PREFT_ADMIN_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def server():
    """Answer with ``server.answer``, status and text, and keep what was asked in ``server.asked``."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.asked.append((self.path, dict(self.headers), json.loads(body)))
            status, text = found.answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.asked, found.answer = [], (200, "Success: LoRA adapter 'mine' added successfully.")
    found.address = f"http://127.0.0.1:{found.server_address[1]}"
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def test_a_directory_gets_the_adapter_under_its_name(adapter, tiny, tmp_path):
    target = tmp_path / "served" / "adapters"
    assert publish(adapter, "mine", tmp_path / "saved", str(target)) == f"mine is in {target}"
    found = load_adapter(target / "mine", tiny)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(adapter.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not (tmp_path / "saved").exists()


def test_the_adapter_that_has_the_name_is_replaced(adapter, tiny, tmp_path):
    other = preft_jax.random_adapter(AdapterConfig(rank=3), tiny.config, jax.random.key(1))
    publish(other, "mine", tmp_path, str(tmp_path))
    publish(adapter, "mine", tmp_path, str(tmp_path))
    assert load_adapter(tmp_path / "mine", tiny).config.rank == 2


def test_a_directory_that_cannot_be_written_is_named(adapter, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="file"):
        publish(adapter, "mine", tmp_path, str(tmp_path / "file"))


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_server_is_told_name_and_path_as_vllm_is(slash, adapter, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = publish(adapter, "mine", (tmp_path / "saved").relative_to(tmp_path), server.address + slash)
    assert told == f"mine is served by {server.address}{slash}"
    ((path, headers, body),) = server.asked
    assert path == "/v1/load_lora_adapter"
    assert body == {"lora_name": "mine", "lora_path": str((tmp_path / "saved").resolve()), "load_inplace": True}
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers


@pytest.mark.parametrize(("key", "header"), [("secret", "Bearer secret"), ("", None)])
def test_the_admin_key_is_the_environments(key, header, adapter, server, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFT_ADMIN_KEY", key)
    publish(adapter, "mine", tmp_path, server.address)
    assert server.asked[0][1].get("Authorization") == header


@pytest.mark.parametrize(
    ("status", "text", "reason"),
    [
        (401, json.dumps({"error": {"message": "give the admin key"}}), "give the admin key"),
        (500, "it broke" + "." * 500, "it broke" + "." * 192),
        (404, json.dumps({"detail": "Not Found"}), "Not Found"),
        (400, json.dumps({"error": "no"}), "no"),
        (400, json.dumps(["no"]), "no"),
        (307, "elsewhere", "elsewhere"),
    ],
)
def test_a_refusal_is_told_with_its_reason_and_where_the_adapter_is(status, text, reason, adapter, server, tmp_path):
    server.answer = status, text
    with pytest.raises(AdapterError) as caught:
        publish(adapter, "mine", tmp_path / "saved", server.address)
    told = str(caught.value)
    assert told.startswith(f"{server.address} does not take the adapter ({status}): ")
    assert reason in told
    assert told.endswith(f"; it is in {tmp_path / 'saved'}")
    assert "." * 193 not in told


def test_a_server_that_cannot_be_reached_is_named(adapter, server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(AdapterError, match=f"{server.address} cannot be reached: .*the adapter is in {tmp_path}"):
        publish(adapter, "mine", tmp_path, server.address)


@pytest.mark.parametrize("target", ["http://127.0.0.1:port", "http://[::1"])
def test_an_address_that_is_none_is_named(target, adapter, tmp_path):
    with pytest.raises(AdapterError, match="cannot be reached"):
        publish(adapter, "mine", tmp_path, target)
