"""Many requests over many adapters through the program: whatever clients do, nothing is lost and nothing is left."""

import asyncio
import collections
import json
import random
import string

import api_program
import api_server
import httpx
import jax
import numpy as np
import pytest

from preft_jax import random_adapter, save_adapter
from preft_jax.adapters.config import AdapterConfig

ROUTE = "/v1/completions"
AT_A_TIME = 24
RANKS = (2, 5)
MOST_GROWN = 8 * 2**20
"""Bytes of memory that may be noise while the weighed requests are served; less than their stop texts and biases."""
BYTES = 57_000
"""About what an adapter takes in host memory."""


class Load:
    """What is sent, and what came of it.

    Every tenth client goes away: by turns once it has a first piece of a stream, and some moments after it asked.
    """

    def __init__(self, program, adapters, requests, text, seed):
        self.program, self.adapters, self.text = program, adapters, text
        self.rng = random.Random(seed)
        self.users = (np.random.default_rng(seed).zipf(1.2, requests) - 1) % adapters
        self.prefix = f"load-{seed}"
        self.answered, self.gone = {}, set()

    def body(self, number, **fields):
        prompt = "".join(self.rng.choices(string.ascii_lowercase, k=self.rng.randrange(3, 30)))
        stop = ["".join(self.rng.choices(string.ascii_uppercase, k=self.text // 16)) for _ in range(16)]
        tokens = self.rng.randrange(1, 6)
        bias = {str(token): self.rng.random() / 1e3 for token in range(256)}
        return {"model": f"u{self.users[number]}", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True,
                "temperature": 0, "stop": stop, "logit_bias": bias, **fields}  # fmt: skip

    async def ask(self, client, number):
        """Send a request, and read its answer or go away."""
        name = f"{self.prefix}-{number}"
        if number % 20 == 0:
            await self.leave_after_a_piece(client, name, number)
        elif number % 20 == 10:
            await self.leave_at_once(name, number)
        else:
            body = self.body(number)
            answer = await client.post(ROUTE, json=body, headers={"X-Request-Id": name})
            assert answer.status_code == 200, answer.text
            found = answer.json()
            assert found["choices"][0]["finish_reason"] == "length"
            assert found["usage"]["completion_tokens"] == body["max_tokens"]
            self.answered[name] = body["max_tokens"]

    async def leave_after_a_piece(self, client, name, number):
        body = self.body(number, stream=True, max_tokens=400)
        async with client.stream("POST", ROUTE, json=body, headers={"X-Request-Id": name}) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    break
        self.gone.add(name)

    async def leave_at_once(self, name, number):
        """Send a whole request over a connection of its own, and close that some moments later."""
        body = json.dumps(self.body(number, max_tokens=400, stream=self.rng.random() < 0.5)).encode()
        head = {"Host": "here", "Authorization": f"Bearer {api_server.ALICE}", "Content-Type": "application/json",
                "Content-Length": len(body), "X-Request-Id": name}  # fmt: skip
        lines = "".join(f"{key}: {value}\r\n" for key, value in head.items())
        url = httpx.URL(self.program.url)
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(f"POST {ROUTE} HTTP/1.1\r\n{lines}\r\n".encode() + body)
        await writer.drain()
        await asyncio.sleep(self.rng.random() * 0.1)
        writer.close()
        self.gone.add(name)

    async def reload(self, done):
        """Let names stand for other adapters, over and over; returns how often."""
        count = 0
        headers = {"Authorization": f"Bearer {api_server.ADMIN}"}
        async with httpx.AsyncClient(base_url=self.program.url, headers=headers, timeout=60, trust_env=False) as admin:
            while not done.is_set():
                name, other = (f"u{self.rng.randrange(self.adapters)}" for _ in range(2))
                body = {"lora_name": name, "lora_path": other, "load_inplace": True}
                answer = await admin.post("/v1/load_lora_adapter", json=body)
                assert answer.status_code == 200, answer.text
                count += 1
                await asyncio.sleep(0.05)
        return count

    async def run(self):
        """Send everything, some at a time; returns how often adapters were reloaded."""
        waiting = collections.deque(range(len(self.users)))
        headers = {"Authorization": f"Bearer {api_server.ALICE}"}
        done = asyncio.Event()
        reloads = asyncio.create_task(self.reload(done))
        async with httpx.AsyncClient(
            base_url=self.program.url, headers=headers, timeout=120, trust_env=False
        ) as client:

            async def work():
                while waiting:
                    await self.ask(client, waiting.popleft())

            await asyncio.gather(*(work() for _ in range(AT_A_TIME)))
        done.set()
        return await reloads


def check_load(tiny, root, *, adapters, requests, room, text):
    """Serve requests with room for ``room`` adapters on the device; the last four fifths of them are weighed.

    Each request has stop texts of ``text`` characters and a bias of every token, which takes about as much again:
    whatever keeps requests, or their bodies, keeps those.
    """
    for i in range(adapters):
        config = AdapterConfig(rank=RANKS[i % 2], targets=("q", "down"))
        save_adapter(root / "adapters" / f"u{i}", random_adapter(config, tiny.config, jax.random.key(i)))
    options = (
        "--adapter-dir", str(root / "adapters"), "--state-dir", str(root / "state"), "--allow-runtime-lora-updating",
        "--adapter-root", str(root / "adapters"), "--bank-pages", str(room + 1), "--max-num-seqs", "8",
        "--adapter-memory-gib", str(adapters / 5 * BYTES / 2**30), "--no-enable-prefix-caching",
    )  # fmt: skip
    with api_program.Program(*options) as program:
        program.until_ready()
        first = requests // 5
        loads = [Load(program, adapters, count, text, seed) for seed, count in enumerate((first, requests - first))]
        reloads = asyncio.run(loads[0].run())
        program.until_idle()
        before = program.memory()
        reloads += asyncio.run(loads[1].run())
        metrics = program.until_idle()
        grown = program.memory() - before
        lines = [line for line in program.events("request") if line["id"].startswith("load-")]
    assert grown < MOST_GROWN
    answered = loads[0].answered | loads[1].answered
    gone = loads[0].gone | loads[1].gone

    # Every request is there once: answered in full, or its client is the one that went away.
    assert collections.Counter(line["id"] for line in lines) == collections.Counter([*answered, *gone])
    assert len(answered) + len(gone) == requests
    assert len(gone) >= requests // 10
    ends = collections.Counter()
    for line in lines:
        end = line.get("finish", [])
        ends.update(end)
        if line["id"] in answered:
            assert (line["status"], end, line["completion_tokens"]) == (200, ["length"], answered[line["id"]])
        else:
            assert (line["status"], end) in [(200, ["cancelled"]), (200, ["length"]), (499, ["cancelled"]), (499, [])]
    assert ends["cancelled"] > requests // 20

    # The server's own books say the same, and nothing is left.
    assert _by_label(metrics, "vllm:request_success_total") == {"length": ends["length"], "abort": ends["cancelled"]}
    assert metrics["vllm:request_prompt_tokens_count"] == ends["length"] + ends["cancelled"]
    answers = {key[1:]: value for key, value in metrics.items() if key[0] == "preft_http_responses_total"}
    assert answers.pop(("/v1/load_lora_adapter", "200")) == reloads
    statuses = collections.Counter((line["route"], str(line["status"])) for line in lines)
    assert {key: count for key, count in answers.items() if key[0] in (ROUTE, "none")} == statuses
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
                 "preft_recompiles_total", "preft_device_failures_total", "preft_adapter_store_failed_loads_total",
                 "preft_adapter_store_leased", "preft_adapter_store_waiting"):  # fmt: skip
        assert metrics[name] == 0, name

    # It was what it should be: more adapters than there is room for, on the device and in memory.
    assert metrics["preft_adapter_device_pages"] == room
    assert metrics["preft_adapter_device_loads_total"] > room
    assert metrics["preft_adapter_store_evictions_total"] > adapters // 5
    assert metrics["preft_adapter_store_registered"] == adapters
    assert metrics["preft_adapter_store_host_bytes"] <= metrics["preft_adapter_store_host_budget_bytes"]
    assert reloads > 10


def _by_label(metrics, name):
    return {key[1]: value for key, value in metrics.items() if key[0] == name}


def test_every_request_is_accounted_for_and_requests_are_forgotten(tiny, tmp_path):
    check_load(tiny, tmp_path, adapters=60, requests=400, room=16, text=16_000)


@pytest.mark.slow
def test_two_thousand_requests_leave_no_page_either(tiny, tmp_path):
    """A page of the KV cache has 12 KiB here: one kept for each request would be more than may be noise."""
    check_load(tiny, tmp_path, adapters=500, requests=2000, room=64, text=16_000)
