"""``python -m serve.api`` in a process of its own, with the tiny model."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import api_server
import httpx
from prometheus_client.parser import text_string_to_metric_families

KEYS = ("--api-key", f"alice={api_server.ALICE}", "--admin-key", api_server.ADMIN)
SIZES = (
    "--model", "tiny", "--max-model-len", "1024", "--max-num-seqs", "2", "--max-lora-rank", "16", "--bank-pages", "3",
)  # fmt: skip
"""Options that later ones override."""


class Program:
    """The program in a process of its own; ``cache``: a directory of compiled programs in place of the tests' own."""

    def __init__(self, *arguments, cache=None, run=("-m", "serve.api")):
        environment = {**os.environ}
        if cache is not None:
            environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, *run, "--port", "0", *SIZES, *KEYS, *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines, self.others = [], []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        while not (found := self.events("listening")):
            assert self.process.poll() is None, (self.lines, self.others)
            assert self.reader.is_alive(), (self.lines, self.others)
            time.sleep(0.05)
        self.url = found[0]["url"]

    def _read(self):
        """Read its log. Its libraries may write lines of their own beside it, as XLA does of a slow compilation."""
        for line in self.process.stderr:
            try:
                self.lines.append(json.loads(line))
            except json.JSONDecodeError:
                self.others.append(line)

    def events(self, name):
        return [line for line in self.lines if line["event"] == name]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.reader.join()
        self.process.stderr.close()

    def client(self, key):
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=60, trust_env=False)

    def until_ready(self):
        with self.client(api_server.ALICE) as client:
            while client.get("/ready").status_code != 200:
                assert self.process.poll() is None
                time.sleep(0.2)

    def metrics(self):
        """Return what ``/metrics`` tells: by name, or by name and the labels that are not the model's name."""
        with self.client(api_server.ADMIN) as client:
            text = client.get("/metrics").text
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = tuple(value for name, value in sample.labels.items() if name != "model_name")
                found[(sample.name, *labels) if labels else sample.name] = sample.value
        return found

    def until_idle(self):
        """Wait until no request runs or waits; return the metrics then."""
        while True:
            found = self.metrics()
            if not found["vllm:num_requests_running"] and not found["vllm:num_requests_waiting"]:
                return found
            assert self.process.poll() is None
            time.sleep(0.05)

    def memory(self):
        """Return the bytes that it has in memory."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))

    def end(self):
        """Wait for it; returns its exit status."""
        status = self.process.wait(60)
        self.reader.join()
        return status
