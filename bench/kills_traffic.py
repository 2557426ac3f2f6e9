"""What users do to a server that is killed, and a book of what it has told them."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

ROWS = b"".join(
    json.dumps({"prompt": f"{word}?", "completion": "no"}).encode() + b"\n"
    for word in ("one", "two", "three", "four", "five", "six")
)
"""What every job learns."""

_LARGEST = 2**18
_MOST_FILES = 40
_CLOSE = 1e-3
"""Between two log-probabilities of one token: prompts are computed in calls of other sizes."""


@dataclasses.dataclass
class Book:
    """What a server was asked for and what it has answered, over all its lives.

    Attributes:
        rng: chooses what is asked for.
        begun: SHA-256 of each content whose upload was begun.
        files: SHA-256 by id of uploads that were answered.
        deleted: ids of files whose deletion was answered.
        leaving: ids of files whose deletion was begun.
        jobs: ids of jobs that were answered.
        answers: what the base model and each adapter said first.
        counts: of what was done.
        faults: what was not as it must be.
    """

    rng: random.Random
    begun: set[str] = dataclasses.field(default_factory=set)
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    deleted: set[str] = dataclasses.field(default_factory=set)
    leaving: set[str] = dataclasses.field(default_factory=set)
    jobs: set[str] = dataclasses.field(default_factory=set)
    answers: dict[str, tuple[str, list[float]]] = dataclasses.field(default_factory=dict)
    counts: "collections.Counter[str]" = dataclasses.field(default_factory=collections.Counter)
    faults: list[str] = dataclasses.field(default_factory=list)

    def check_answer(self, model: str, text: str, logprobs: list[float]) -> None:
        """Compare an answer with the first one of the same adapter: the same update of a job gives the same."""
        first = self.answers.setdefault(_kind(model), (text, logprobs))
        near = len(first[1]) == len(logprobs) and all(
            abs(ours - other) < _CLOSE for ours, other in zip(first[1], logprobs, strict=True)
        )
        self.counts["answers"] += 1
        if first[0] != text or not near:
            self.faults.append(f"{model} answers {text!r} {logprobs}, and {first} before")


def _kind(model: str) -> str:
    """Return which of the models is meant, all jobs being one: the base, a checkpoint's step, or the last adapter."""
    return model.rpartition(":")[2] if ":ckpt-step-" in model else "adapter" if ":" in model else "base"


class Client:
    """Asks a server as a user does."""

    def __init__(self, url: str, key: str):
        self._client = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120, trust_env=False
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Return an answer.

        Raises:
            httpx.HTTPError: if there is none, or it is an error.
        """
        answer = self._client.request(method, path, **options)
        answer.raise_for_status()
        return answer

    def items(self, path: str) -> list[dict[str, Any]]:
        """Return a list that the server pages."""
        found: list[dict[str, Any]] = []
        while True:
            more = {"after": found[-1]["id"]} if found else {}
            page = self.ask("GET", path, params={"limit": 1000, **more}).json()
            found += page["data"]
            if not page["has_more"]:
                return found

    def models(self) -> list[str]:
        """Return the names of models."""
        return [model["id"] for model in self.ask("GET", "/v1/models").json()["data"]]

    def upload(self, content: bytes) -> str:
        """Return the id of a new file."""
        files = {"file": ("rows.jsonl", content)}
        return self.ask("POST", "/v1/files", data={"purpose": "fine-tune"}, files=files).json()["id"]

    def answer(self, model: str) -> tuple[str, list[float]]:
        """Return what a model says, and the log-probabilities of its tokens."""
        body = {"model": model, "prompt": "seven?", "max_tokens": 4, "temperature": 0, "logprobs": 0}
        choice = self.ask("POST", "/v1/completions", json=body).json()["choices"][0]
        return choice["text"], choice["logprobs"]["token_logprobs"]


def upload(client: Client, book: Book) -> None:
    """Upload a file of random size; delete one where there are many."""
    content = json.dumps({"text": book.rng.randbytes(book.rng.randrange(1, _LARGEST)).hex()}).encode() + b"\n"
    own = hashlib.sha256(content).hexdigest()
    book.begun.add(own)
    book.files[client.upload(content)] = own
    book.counts["uploads"] += 1
    kept = sorted(book.files.keys() - book.leaving)
    if len(kept) > _MOST_FILES:
        book.leaving.add(kept[1])
        client.ask("DELETE", f"/v1/files/{kept[1]}")
        book.deleted.add(kept[1])
        book.counts["deletions"] += 1


def create(client: Client, book: Book, hyperparameters: dict[str, Any], open_jobs: int) -> None:
    """Create a job where fewer are open than are to be."""
    jobs = client.items("/v1/fine_tuning/jobs")
    if sum(job["finished_at"] is None for job in jobs) < open_jobs:
        body = {"model": "tiny", "training_file": min(book.files), "seed": 7, "hyperparameters": hyperparameters}
        book.jobs.add(client.ask("POST", "/v1/fine_tuning/jobs", json=body).json()["id"])
        book.counts["jobs"] += 1
    time.sleep(0.2)


def ask(client: Client, book: Book) -> None:
    """Ask one of the models."""
    model = book.rng.choice(client.models())
    book.check_answer(model, *client.answer(model))


@contextlib.contextmanager
def traffic(url: str, key: str, book: Book, actions: "list[Callable[[Client, Book], None]]") -> Iterator[None]:
    """Do each of some things again and again, in a thread of its own, until the server is gone or this ends."""
    ends = threading.Event()

    def repeat(action: "Callable[[Client, Book], None]") -> None:
        with Client(url, key) as client:
            while not ends.is_set():
                try:
                    action(client, book)
                except httpx.HTTPStatusError as error:
                    if error.response.status_code != 503:  # It is being ended.
                        book.faults.append(f"{error.request.url.path}: {error.response.text[:500]}")
                    return
                except httpx.HTTPError:
                    return

    threads = [threading.Thread(target=repeat, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ends.set()
        for thread in threads:
            thread.join()
