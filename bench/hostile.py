"""``python -m bench.hostile``: what a bad body and silent connections cost a server, and those who stream meanwhile.

It starts ``python -m serve.api`` with few descriptors. First, while ``--streams`` answers are streamed, each body of
``bench/hostile_bodies.py`` is sent: how long its refusal takes, what the server's memory grows by at most, and the
longest gap between two pieces of a stream beyond what they are without it. Then silent connections are opened, more
than there are descriptors, and ``/health`` is asked.

The exit status is 1 if a body takes longer, more memory or a longer gap than ``LIMITS`` say, is not refused with 4xx,
or ``/health`` is not answered.
"""

import argparse
import contextlib
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from bench.hostile_bodies import hostile_bodies
from bench.judging import judge
from preft_jax.errors import ConfigError, PreftError
from serve.bench.environment import environment

SCHEMA = "preft-jax/hostile/1"
LIMITS = {"seconds": 0.3, "peak_mib": 100.0, "gap_seconds": 0.1}
"""Of one body: until its refusal, the server's memory at most, and the longest gap of a stream beyond the usual."""


class HostileError(PreftError):
    """A server that cannot be measured."""


class Streams(threading.Thread):
    """Streams one answer after the other and notes the longest gap between two pieces of one."""

    def __init__(self, url: str, model: str):
        super().__init__(daemon=True)
        self._url, self._model = url, model
        self._longest = 0.0
        self.ends = threading.Event()
        self.pieces = 0

    def run(self) -> None:
        """Stream until told to end."""
        body = {"model": self._model, "prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.Client(base_url=self._url, trust_env=False, timeout=60) as client:
            while not self.ends.is_set():
                before = None
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    for _ in answer.iter_raw():
                        now = time.perf_counter()
                        self._longest = max(self._longest, now - (before or now))
                        before, self.pieces = now, self.pieces + 1

    def longest(self) -> float:
        """Return the longest gap since the last call."""
        found, self._longest = self._longest, 0.0
        return found


def _limit_descriptors(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Server:
    """``serve.api`` in a process of its own with a limit of descriptors."""

    def __init__(self, args: argparse.Namespace):
        command = [
            *(sys.executable, "-m", "serve.api", "--port", "0", "--model", args.model, "--max-model-len", "512"),
            *("--max-num-seqs", "8", "--bank-pages", "1", "--max-connections-per-address", str(args.per_address)),
        ]
        self._process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: _limit_descriptors(args.descriptors)
        )
        self.url = self._listening()
        # Its log must be read on, or it waits for that.
        self._rest = subprocess.Popen(["cat"], stdin=self._process.stderr, stdout=subprocess.DEVNULL)
        while httpx.get(f"{self.url}/ready", trust_env=False, timeout=60).status_code != 200:
            if self._process.poll() is not None:
                raise HostileError(f"the server ended with status {self._process.returncode} before it was ready")
            time.sleep(0.2)

    def _listening(self) -> str:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with contextlib.suppress(ValueError):
                if url := json.loads(line).get("url"):
                    return url
        raise HostileError("the server ended before it listened")

    def peak_mib(self) -> float:
        """Return the most memory since ``forget_peak``."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024

    def forget_peak(self) -> None:
        """Begin anew with what it has now."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()
        self._rest.wait()


@contextlib.contextmanager
def streaming(server: Server, args: argparse.Namespace) -> Iterator[list[Streams]]:
    """Stream answers in the background, all of them under way."""
    streams = [Streams(server.url, args.model) for _ in range(args.streams)]
    for one in streams:
        one.start()
    while not all(one.pieces for one in streams):
        time.sleep(0.01)
    try:
        yield streams
    finally:
        for one in streams:
            one.ends.set()
        for one in streams:
            one.join()


def measure_bodies(server: Server, args: argparse.Namespace) -> tuple[float, list[dict[str, Any]]]:
    """Return the usual gap of a stream, and the figures of each body."""
    rows = []
    with streaming(server, args) as streams, httpx.Client(base_url=server.url, trust_env=False, timeout=120) as client:

        def gap(seconds: float) -> float:
            time.sleep(seconds)
            return max(one.longest() for one in streams)

        gap(1.0)
        usual = gap(args.usual_seconds)
        for name, (path, raw) in hostile_bodies(args.body_bytes).items():
            server.forget_peak()
            before = server.peak_mib()
            gap(0.2)
            start = time.perf_counter()
            answer = client.post(path, content=raw, headers={"Content-Type": "application/json"})
            seconds = time.perf_counter() - start
            row = {
                "body": name, "status": answer.status_code, "code": answer.json()["error"]["code"],
                "seconds": round(seconds, 4), "peak_mib": round(server.peak_mib() - before, 1),
                "gap_seconds": round(max(0.0, gap(0.2) - usual), 4),
            }  # fmt: skip
            kept = all(row[figure] <= limit for figure, limit in LIMITS.items())
            rows.append({**row, "kept": kept and 400 <= answer.status_code < 500})
    return usual, rows


def measure_connections(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Return how ``/health`` is answered while many connections say nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(args.silent):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
        worst = 0.0
        for _ in range(20):
            start = time.perf_counter()
            answer = httpx.get(f"{server.url}/health", trust_env=False, timeout=60)
            worst = max(worst, time.perf_counter() - start)
    return {"silent": args.silent, "health_status": answer.status_code, "health_worst_seconds": round(worst, 4)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the figures that the JSON line holds."""
    for name in ("streams", "body_bytes", "descriptors", "silent", "per_address"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    server = Server(args)
    try:
        usual, rows = measure_bodies(server, args)
        connections = measure_connections(server, args)
    finally:
        server.close()
    kept = all(row["kept"] for row in rows) and connections["health_status"] == 200
    figures = {"usual_gap_seconds": round(usual, 4), "bodies": rows, "connections": connections, "kept": kept}
    options = {name: value for name, value in vars(args).items() if name != "output_json"}
    return {"schema": SCHEMA, "options": options, "limits": LIMITS, "figures": figures, **environment()}


def print_table(found: dict[str, Any], console: Console) -> None:
    """Print one row a body."""
    figures = found["figures"]
    table = Table(title=f"Bad bodies beside {found['options']['streams']} streams ({figures['connections']})")
    columns = ("body", "status", "seconds", "peak_mib", "gap_seconds", "kept")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="left" if name == "body" else "right")
    for row in figures["bodies"]:
        table.add_row(*(str(row[name]) for name in columns))
    console.print(table)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.hostile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="tiny", help="of the server that is started (default: %(default)s)")
    add("--streams", type=int, default=2, help="answers that are streamed meanwhile (default: %(default)s)")
    add("--body-bytes", type=int, default=4 * 2**20 - 4096, help="of each body (default: %(default)s)")
    add("--usual-seconds", type=float, default=5.0, help="of streams without bad bodies (default: %(default)s)")
    add("--descriptors", type=int, default=256, help="that the server may open (default: %(default)s)")
    add("--silent", type=int, default=260, help="connections that say nothing (default: %(default)s)")
    add("--per-address", type=int, default=64, help="the server's bound (default: %(default)s)")
    add("--output-json", type=Path, default=None, help="also write the JSON line here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return judge(make_parser(), argv, run, print_table)


if __name__ == "__main__":
    sys.exit(main())
