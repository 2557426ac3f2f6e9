"""The program is killed, or told to end while it compiles: what it promised is there afterwards, and it ends."""

import concurrent.futures
import os
import random
import signal
import sqlite3
import threading
import time

import api_program
import api_server
import httpx
import pytest

LIVES = 3
STRAY = ".0123.float32.1.1.pages.89ab.tmp"
"""What a kill may leave of a file that was being written."""


@pytest.fixture(scope="module")
def directories(tiny, tmp_path_factory):
    """Return the root of six adapters, and their digests by name."""
    root = tmp_path_factory.mktemp("adapters")
    return root, {f"d{i}": api_server.adapter_directory(root, f"d{i}", tiny, i).digest for i in range(6)}


def options(root, state):
    return ("--state-dir", str(state), "--allow-runtime-lora-updating", "--adapter-root", str(root))


def tokens(alice, name):
    body = {"model": name, "prompt": "the same", "max_tokens": 6, "temperature": 0, "logprobs": 1}
    answer = alice.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()["choices"][0]
    return found["text"], found["logprobs"]["token_logprobs"]


def in_registry(state):
    """Return what the file says, read by itself: by name, the directory's name, the digest and the owner."""
    with sqlite3.connect(state / "adapters.sqlite") as file:
        rows = file.execute("SELECT name, path, digest, owner FROM adapters").fetchall()
    file.close()
    return {name: (os.path.basename(path), digest, owner) for name, path, digest, owner in rows}


class Registering:
    """Clients that register adapters under new names, and again under old ones, until the program dies.

    ``answered`` is what each name stands for by the last answer, and ``open`` what has been asked for since.
    """

    def __init__(self, program, life, seed):
        self._program, self._life = program, life
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self.answered, self.open = {}, {}
        self._enough = threading.Semaphore(0)
        self._pool = concurrent.futures.ThreadPoolExecutor(4)
        self._ends = [self._pool.submit(self._run, number) for number in range(4)]

    def _run(self, client):
        with self._program.client(api_server.ADMIN) as admin:
            for number in range(10_000):
                # Names of one client only, so that the last answer says what a name stands for.
                name = f"life{self._life}-{client}-{number // 2 if number % 2 else self._draw(number // 2 + 1)}"
                body = {
                    "lora_name": name,
                    "lora_path": f"d{self._draw(6)}",
                    "owner": self._draw_owner(),
                    "load_inplace": True,
                }
                with self._lock:
                    # Without an owner, a name keeps the one that it has.
                    wanted = body["lora_path"], body["owner"] or self.answered.get(name, (None, None))[1]
                    self.open[name] = wanted
                try:
                    answer = admin.post("/v1/load_lora_adapter", json=body)
                except httpx.HTTPError:
                    return
                assert answer.status_code == 200, answer.text
                with self._lock:
                    self.answered[name] = self.open.pop(name)
                self._enough.release()

    def _draw(self, count):
        with self._lock:
            return self._rng.randrange(count)

    def _draw_owner(self):
        with self._lock:
            return self._rng.choice(["alice", "bob", None])

    def kill_after(self, count):
        """Kill the program some moment after so many answers, while others are under way."""
        for _ in range(count):
            assert self._enough.acquire(timeout=60)
        time.sleep(self._rng.random() * 0.05)
        self._program.process.kill()
        for end in self._ends:
            end.result(60)
        self._pool.shutdown()


def test_what_was_answered_survives_kills_and_nothing_is_half_there(directories, tmp_path):
    root, digests = directories
    state = tmp_path / "state"
    known, before = {}, {}
    for life in range(LIVES):
        with api_program.Program(*options(root, state)) as program:
            program.until_ready()
            assert not [path.name for path in (state / "pages").iterdir() if path.name.endswith(".tmp")]
            _check_served(program, known, before)
            if life == LIVES - 1:
                break
            if not life:
                known = _register_all(program, directories)
                _check_served(program, known, before)
            registering = Registering(program, life, seed=life)
            registering.kill_after((12, 1)[life])
        assert len(registering.answered) > 0
        found = in_registry(state)
        wanted = {name: {said} for name, said in (known | registering.answered).items()}
        for name, said in registering.open.items():
            wanted.setdefault(name, {None}).add(said)
        assert found.keys() >= {name for name, those in wanted.items() if None not in those}
        for name, (directory, digest, owner) in found.items():
            assert (directory, owner) in wanted[name]
            assert digest == digests[directory]
        known = {name: (directory, owner) for name, (directory, _, owner) in found.items()}
        kept = {path.name.split(".")[0] for path in (state / "pages").iterdir() if path.name.endswith(".pages")}
        assert kept >= {digests[directory] for directory, _ in known.values()}
        (state / "pages" / STRAY).write_bytes(b"half")


def _register_all(program, directories):
    with program.client(api_server.ADMIN) as admin:
        for name in directories[1]:
            body = {"lora_name": f"first-{name}", "lora_path": name, "owner": "bob"}
            assert admin.post("/v1/load_lora_adapter", json=body).status_code == 200
    return {f"first-{name}": (name, "bob") for name in directories[1]}


def _check_served(program, known, before):
    """Everybody sees what is theirs, and requests have the tokens in ``before`` by directory, which takes new ones."""
    for key, user in ((api_server.ALICE, "alice"), (api_server.ADMIN, None)):
        with program.client(key) as client:
            listed = {card["id"]: card["owned_by"] for card in client.get("/v1/models").json()["data"][1:]}
        visible = {
            name: owner or "preft-jax" for name, (_, owner) in known.items() if user in (None, owner) or not owner
        }
        assert listed == visible
    with program.client(api_server.ADMIN) as admin:
        for name, (directory, _) in known.items():
            found = tokens(admin, name)
            assert found == before.setdefault(directory, found)
    assert len(set(map(str, before.values()))) == len(before)


NEVER_COMPILED = """
import sys, threading
from preft_jax.device.programs import Programs
Programs._compile = lambda *args: threading.Event().wait()
from serve.api import main
sys.exit(main(sys.argv[1:]))
"""
"""The program, whose compilations never end: as with real ones, nothing can end them from outside."""


@pytest.mark.parametrize(
    ("run", "later"), [(("-m", "serve.api"), 0.0), (("-c", NEVER_COMPILED), 2.0)], ids=["long", "endless"]
)
def test_it_ends_when_told_to_while_it_compiles(tmp_path, run, later):
    with api_program.Program("--max-num-seqs", "16", cache=tmp_path / "cache", run=run) as program:
        time.sleep(later)
        with program.client(api_server.ALICE) as client:
            assert client.get("/ready").status_code == 503
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == 0
        assert [line["status"] for line in program.events("ended")] == [0]
        assert not [line for line in program.lines if line["level"] in ("warning", "error")]
