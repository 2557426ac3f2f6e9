"""``python -m bench.overload``: a server that is asked for ten times what it can do, and how it comes back from that.

It starts ``python -m serve.api`` with the model, or takes a server that runs (``--base-url``). Four phases follow one
another: lone requests (``unloaded``), a closed loop of ``--concurrency`` clients (``capacity``), an open loop of
Poisson arrivals at ``--factor`` times the capacity (``overload``), and then none but lone requests until the queue is
empty and one of them takes at most 1.5 times what it took unloaded (``recovery``, counted from the last arrival).

What is refused must be refused with 429 or 503 and ``Retry-After``, and no more than ``--max-waiting`` requests may
wait at any time; otherwise the exit status is 1. ``offered_factor`` is what this program managed to send, over the
capacity. Answers under load are compared with those of the lone requests: on real models a few may differ, as sums of
other shapes differ in their last digits.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.judging import judge
from preft_jax.errors import ConfigError, PreftError
from serve.bench.arrivals import draw_arrivals
from serve.bench.client import list_models
from serve.bench.environment import environment

SCHEMA = "preft-jax/overload/1"
RECOVERED = 1.5
"""Times the unloaded latency at which a lone request counts as served as before."""

_LOOKS_SECONDS = 0.05
_WAITING = re.compile(r"^vllm:num_requests_waiting\S* (\S+)$", re.MULTILINE)
_RUNNING = re.compile(r"^vllm:num_requests_running\S* (\S+)$", re.MULTILINE)


class OverloadError(PreftError):
    """A server that cannot be measured."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a request: ``text`` of an accepted one, ``excuse`` whether a refused one got ``Retry-After``."""

    prompt: int
    status: int
    seconds: float
    text: str | None
    excuse: bool

    @property
    def kind(self) -> str:
        """``accepted``, ``rejected`` as it should be, or ``wrong``."""
        if self.text is not None:
            return "accepted"
        return "rejected" if self.status in (429, 503) and self.excuse else "wrong"


class Client:
    """Sends requests for a few prompts, greedy and of one length."""

    def __init__(self, http: httpx.AsyncClient, model: str, prompts: Sequence[Sequence[int]], output_len: int):
        self._http, self._model, self._prompts, self._output_len = http, model, prompts, output_len
        self._next = 0

    async def ask(self) -> Result:
        """Send the next request and wait for its end."""
        prompt, self._next = self._next % len(self._prompts), self._next + 1
        body = {
            "model": self._model,
            "prompt": self._prompts[prompt],
            "max_tokens": self._output_len,
            "temperature": 0,
            "ignore_eos": True,
        }
        start, status, text, excuse = time.perf_counter(), 0, None, False
        with contextlib.suppress(httpx.HTTPError):
            answer = await self._http.post("/v1/completions", json=body)
            status, excuse = answer.status_code, answer.headers.get("retry-after", "").isdecimal()
            if status == 200:
                found = answer.json()
                whole = found["usage"]["completion_tokens"] == self._output_len
                text = found["choices"][0]["text"] if whole else None
        return Result(prompt, status, time.perf_counter() - start, text, excuse)

    async def load(self) -> tuple[int, int]:
        """Return how many requests wait for a first token, and how many samples run."""
        text = (await self._http.get("/metrics")).text
        waiting, running = _WAITING.search(text), _RUNNING.search(text)
        if waiting is None or running is None:
            raise OverloadError("the server's /metrics has no vllm:num_requests_waiting; give one that has it")
        return int(float(waiting[1])), int(float(running[1]))


async def unloaded(client: Client, count: int) -> list[Result]:
    """Send lone requests, one after the other.

    Raises:
        OverloadError: if one of them is refused.
    """
    results = [await client.ask() for _ in range(count)]
    refused = next((result for result in results if result.text is None), None)
    if refused is not None:
        raise OverloadError(f"a lone request was answered {refused.status}; give a server that serves nobody else")
    return results


async def capacity(client: Client, concurrency: int, seconds: float) -> float:
    """Return the requests per second that a closed loop completes, from its first end to the last.

    Raises:
        OverloadError: if fewer than two completed.
    """
    start = time.perf_counter()
    ends: list[float] = []

    async def work() -> None:
        while time.perf_counter() - start < seconds:
            if (await client.ask()).text is not None:
                ends.append(time.perf_counter())
            else:
                await asyncio.sleep(_LOOKS_SECONDS)  # Refused: there are more clients than places.

    await asyncio.gather(*(work() for _ in range(concurrency)))
    if len(ends) < 2:
        raise OverloadError("fewer than two requests completed in the closed loop; raise --capacity-seconds")
    return len(ends) / (max(ends) - start)


@contextlib.asynccontextmanager
async def watched(client: Client) -> AsyncIterator[list[int]]:
    """Look at the queue again and again; yields the lengths that were seen."""
    seen: list[int] = []

    async def look() -> None:
        while True:
            seen.append((await client.load())[0])
            await asyncio.sleep(_LOOKS_SECONDS)

    task = asyncio.create_task(look())
    try:
        yield seen
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError):
            await task


async def recovery(client: Client, since: float, usual: float, limit: float) -> dict[str, float | None]:
    """Return the seconds since ``since`` until nothing waits, and until a lone request is as quick as it was."""
    found: dict[str, float | None] = {"queue_empty_seconds": None, "recovery_seconds": None}
    while time.perf_counter() - since < limit:
        waiting, running = await client.load()
        if waiting:
            await asyncio.sleep(_LOOKS_SECONDS)
            continue
        if found["queue_empty_seconds"] is None:
            found["queue_empty_seconds"] = round(time.perf_counter() - since, 3)
        if running:
            await asyncio.sleep(_LOOKS_SECONDS)
            continue
        result = await client.ask()
        if result.text is not None and result.seconds <= RECOVERED * usual:
            found["recovery_seconds"] = round(time.perf_counter() - since, 3)
            break
    return found


async def measure(args: argparse.Namespace, base_url: str, model: str, console: Console) -> dict[str, Any]:
    """Run all phases and return the figures."""
    rng = np.random.default_rng(args.seed)
    prompts = rng.integers(0, args.vocabulary, (args.num_prompts, args.input_len)).tolist()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    headers = {} if args.api_key is None else {"Authorization": f"Bearer {args.api_key}"}
    options: dict[str, Any] = {"base_url": base_url, "headers": headers, "trust_env": False, "limits": limits}
    async with httpx.AsyncClient(timeout=httpx.Timeout(3600.0, connect=60.0), **options) as http:
        client = Client(http, model, prompts, args.output_len)
        await unloaded(client, 1)
        client = Client(http, model, prompts, args.output_len)
        lone = await unloaded(client, args.num_prompts)
        usual = float(np.median([result.seconds for result in lone]))
        console.print(f"unloaded: {usual:.3f} s a request")
        rate = await capacity(client, args.concurrency, args.capacity_seconds)
        console.print(f"capacity: {rate:.2f} requests/s")
        arrivals = draw_arrivals(rng, max(round(args.factor * rate * args.seconds), 2), args.factor * rate)
        async with watched(client) as seen:
            start, tasks = time.perf_counter(), []
            for arrival in arrivals:
                await asyncio.sleep(max(0.0, arrival - (time.perf_counter() - start)))
                tasks.append(asyncio.create_task(client.ask()))
            stopped = time.perf_counter()
            recovering = asyncio.create_task(recovery(client, stopped, usual, args.recovery_timeout))
            results = await asyncio.gather(*tasks)
            recovered = await recovering
    counts = collections.Counter(result.kind for result in results)
    statuses = collections.Counter(str(result.status) for result in results)
    expected = {result.prompt: result.text for result in lone}
    accepted = [result for result in results if result.text is not None]
    most = max(seen, default=0)
    figures = {
        "unloaded_seconds": round(usual, 4),
        "capacity_per_s": round(rate, 3),
        "offered_per_s": round(len(arrivals) / (stopped - start), 3),
        "offered_factor": round(len(arrivals) / (stopped - start) / rate, 2),
        "offered": len(results),
        **{kind: counts[kind] for kind in ("accepted", "rejected", "wrong")},
        "statuses": dict(sorted(statuses.items())),
        "same_answers": sum(result.text == expected[result.prompt] for result in accepted),
        "accepted_mean_seconds": round(float(np.mean([r.seconds for r in accepted])), 4) if accepted else None,
        "most_waiting": most,
        "max_waiting": args.max_waiting,
        **recovered,
    }
    return figures | {"kept": most <= args.max_waiting and not counts["wrong"]}


@contextlib.contextmanager
def served(args: argparse.Namespace) -> Iterator[str]:
    """Start the server, or take the one that runs; yields its address.

    Raises:
        OverloadError: if it ends before it is ready.
    """
    if args.base_url is not None:
        yield args.base_url.rstrip("/")
        return
    command = [
        *(sys.executable, "-m", "serve.api", "--port", "0", "--model", args.model, "--log-level", "info"),
        *("--max-num-seqs", str(args.max_num_seqs), "--max-waiting", str(args.max_waiting)),
        *("--max-model-len", str(args.input_len + args.output_len), "--bank-pages", "1"),
        "--no-enable-prefix-caching",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = None
        for line in process.stderr:
            with contextlib.suppress(ValueError):
                url = json.loads(line).get("url")
            if url is not None:
                break
        # Its log must be read on, or it waits for that.
        rest = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        try:
            while url is None or httpx.get(f"{url}/ready", trust_env=False).status_code != 200:
                if process.poll() is not None:
                    raise OverloadError(f"the server ended with status {process.returncode} before it was ready")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait()
            rest.wait()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the figures that the JSON line holds."""
    for name in ("num_prompts", "input_len", "output_len", "max_num_seqs", "max_waiting", "concurrency", "vocabulary"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    for name in ("factor", "seconds", "capacity_seconds", "recovery_timeout"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give a number above 0")
    with served(args) as base_url:
        models = list_models(base_url, args.api_key)
        model = args.served_model_name or next((model.id for model in models if model.parent is None), None)
        if model is None:
            raise ConfigError(f"{base_url} lists no base model; name one with --served-model-name")
        figures = asyncio.run(measure(args, base_url, model, Console(stderr=True)))
    options = {name: value for name, value in vars(args).items() if name not in ("output_json", "api_key")}
    return {"schema": SCHEMA, "model": model, "options": options, "figures": figures, **environment()}


def print_table(found: dict[str, Any], console: Console) -> None:
    """Print one row a figure."""
    table = Table(title=f"{found['model']} at {found['options']['factor']:g} times its capacity")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in found["figures"].items():
        shown = ", ".join(f"{n} x {status}" for status, n in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(name.replace("_", " "), shown)
    console.print(table)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.overload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="of the server that is started (default: %(default)s)")
    add("--max-num-seqs", type=int, default=16, help="of that server (default: %(default)s)")
    add("--max-waiting", type=int, default=64, help="of that server, or of the one that runs (default: %(default)s)")
    add("--base-url", default=None, help="take this server instead, which serves nobody else")
    add("--api-key", default=None, help="for it; the admin's, who may see /metrics")
    add("--served-model-name", default=None, help="the model to ask for (default: the base model that it lists first)")
    add("--vocabulary", type=int, default=256, help="prompts are random tokens below this (default: %(default)s)")
    add("--num-prompts", type=int, default=8, help="different prompts (default: %(default)s)")
    add("--input-len", type=int, default=64, help="tokens (default: %(default)s)")
    add("--output-len", type=int, default=32, help="tokens (default: %(default)s)")
    add("--concurrency", type=int, default=32, help="clients of the closed loop (default: %(default)s)")
    add("--capacity-seconds", type=float, default=30.0, help="of the closed loop (default: %(default)s)")
    add("--factor", type=float, default=10.0, help="times the capacity that is offered (default: %(default)s)")
    add("--seconds", type=float, default=20.0, help="of overload (default: %(default)s)")
    add("--recovery-timeout", type=float, default=300.0, help="seconds to wait for it (default: %(default)s)")
    add("--seed", type=int, default=0, help="of prompts and arrivals (default: %(default)s)")
    add("--output-json", type=Path, default=None, help="also write the JSON line here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return judge(make_parser(), argv, run, print_table)


if __name__ == "__main__":
    sys.exit(main())
