"""``python -m bench.kills``: a server that fine-tunes is killed (SIGKILL) at random moments, again and again.

It starts ``python -m serve.api`` with fine-tuning on a directory of its own. Meanwhile files are uploaded and deleted,
jobs created, and models asked. After each kill the directory is read, and after each start the server is asked:

- a job goes on from its newest state, which is at most ``--checkpoint-steps`` updates old;
- each adapter that has a name is whole, and answers as it did before;
- each upload that was answered is there, each other one is there whole or not at all.

All jobs learn the same, one at a time. In the end each must have succeeded, with one and the same adapter. The exit
status is 1 if anything of this is not so.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

import preft_jax
from bench.judging import judge
from bench.kills_traffic import ROWS, Book, Client, ask, create, traffic, upload
from preft_jax.errors import AdapterError, ConfigError, PreftError
from serve import api
from serve.bench.environment import environment
from serve.store.files import AdapterFiles
from serve.store.names import Registry

SCHEMA = "preft-jax/kills/1"
KEY = "killed-key-1"
_PATIENCE = 600.0


class KillsError(PreftError):
    """A server that does not start, or does not end what it began."""


_forks = multiprocessing.get_context("forkserver")
"""Processes that have imported everything: a server then starts in the time of its own work."""


def serve_here(argv: Sequence[str], log: Path) -> None:
    """Be ``serve.api``; its log goes to a file."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    sys.exit(api.main(argv))


class Server:
    """``serve.api`` with fine-tuning in a process of its own; ``log``: where its log goes."""

    def __init__(self, state: Path, log: Path):
        argv = [
            *("--port", "0", "--model", "tiny", "--max-model-len", "64", "--max-num-seqs", "2", "--bank-pages", "5"),
            *("--api-key", f"ann={KEY}", "--state-dir", str(state), "--enable-finetuning", "--finetune-share", "0.6"),
            *("--max-finetune-jobs", "1"),
        ]
        self.log = log
        log.touch()
        self._process = _forks.Process(target=serve_here, args=(argv, log))
        self._process.start()

    def url(self) -> str | None:
        """Return its address once it listens.

        Raises:
            KillsError: if it has ended.
        """
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                if url := json.loads(line).get("url"):
                    return url
        if not self._process.is_alive():
            raise KillsError(f"the server ended with status {self._process.exitcode}; {self.log} says why")
        return None

    def is_ready(self) -> bool:
        """Whether it takes requests."""
        url = self.url()
        try:
            return url is not None and httpx.get(f"{url}/ready", trust_env=False, timeout=60).status_code == 200
        except httpx.HTTPError:
            return False

    def until_ready(self) -> str:
        """Wait until it takes requests; return its address."""
        end = time.monotonic() + _PATIENCE
        while not self.is_ready():
            if time.monotonic() > end:
                raise KillsError(f"the server is not ready after {_PATIENCE:g} s; {self.log} says why")
            time.sleep(0.05)
        return self.url() or ""

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.join()


class Disk:
    """What lies in a server's directory while no server runs, and what that means for jobs.

    Args:
        state: the directory.
        book: gets faults and counts.
        model: the base model.
    """

    def __init__(self, state: Path, book: Book, model: preft_jax.Model):
        self._state = state
        self._book = book
        self._files = AdapterFiles(model)
        # Of each job, the update that it must go on after, and how often it had begun when that was known.
        self._expected: dict[str, tuple[int, int]] = {}
        self.most_lost = 0

    def check(self) -> None:
        """Note what must be there after the next start, and what is wrong."""
        for path in sorted((self._state / "finetuning" / "jobs").glob("ftjob-*")):
            record = json.loads((path / "record.json").read_text())["record"]
            if record["status"] in ("queued", "running"):
                self._check_job(path)
            elif record["status"] != "succeeded" and record["status"] != "validating_files":
                self._book.faults.append(f"{path.name} is {record['status']}: {record['error']}")
        self._check_adapters()

    def _check_job(self, path: Path) -> None:
        events = [json.loads(line) for line in (path / "events.jsonl").read_bytes().splitlines() if _is_whole(line)]
        begun = [event["message"] for event in events if event["message"].startswith("Fine-tuning job started")]
        learned = max((event["data"]["step"] for event in events if "train_loss" in event["data"]), default=0)
        step, times = self._expected.get(path.name, (0, 0))
        if len(begun) > times:
            self._book.counts["jobs_gone_on"] += bool(step)
            if begun[-1] != f"Fine-tuning job started{f', going on after step {step}' if step else ''}":
                self._book.faults.append(f"{path.name}: {begun[-1]}, and its state is of step {step}")
        states = [int(one.name) for one in path.glob("state/*") if one.name.isdigit()]
        kept = max(states, default=0)
        if kept < step:
            self._book.faults.append(f"{path.name} had a state of step {step}, and has one of {kept}")
        self.most_lost = max(self.most_lost, learned - kept)
        self._expected[path.name] = kept, len(begun)

    def _check_adapters(self) -> None:
        """Read the adapter behind each name; the registry is a copy, so that the server's is as it was left."""
        with tempfile.TemporaryDirectory() as folder:
            for path in self._state.glob("adapters.sqlite*"):
                shutil.copy(path, folder)
            registry = Registry(Path(folder) / "adapters.sqlite")
            self._book.faults += [f"the registry has a damaged row of {one.name}" for one in registry.damaged]
            for adapter in registry.list():
                self._book.counts["adapters_read"] += 1
                try:
                    digest = self._files.read(adapter.path).digest
                except AdapterError as error:
                    self._book.faults.append(f"{adapter.name} is not whole: {error}")
                    continue
                if digest != adapter.digest:
                    self._book.faults.append(f"{adapter.name} is another adapter than was registered")
            registry.close()

    def digests(self) -> dict[str, str]:
        """Return the digests of all adapters by name."""
        registry = Registry(self._state / "adapters.sqlite")
        found = {adapter.name: adapter.digest for adapter in registry.list()}
        registry.close()
        return found


def _is_whole(line: bytes) -> bool:
    """Whether a line of events was not cut."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def check_started(url: str, book: Book) -> None:
    """Compare what a server shows after its start with what it has answered before."""
    with Client(url, KEY) as client:
        files = {file["id"]: file for file in client.items("/v1/files")}
        book.faults += [f"{name} was uploaded and is gone" for name in book.files.keys() - book.leaving - files.keys()]
        book.faults += [f"{name} was deleted and is there" for name in book.deleted & files.keys()]
        book.counts["unanswered_uploads_found"] += len(files.keys() - book.files.keys())
        for name in files:
            found = hashlib.sha256(client.ask("GET", f"/v1/files/{name}/content").content).hexdigest()
            if found not in book.begun or book.files.get(name, found) != found:
                book.faults.append(f"{name} is not what was uploaded")
            book.files.setdefault(name, found)
        jobs = {job["id"]: job for job in client.items("/v1/fine_tuning/jobs")}
        book.faults += [f"{name} was created and is gone" for name in book.jobs - jobs.keys()]
        book.jobs |= jobs.keys()
        models = set(client.models())
        for job in jobs.values():
            if job["status"] == "succeeded" and job["fine_tuned_model"] not in models:
                book.faults.append(f"{job['id']} has succeeded and its adapter is not served")
        for model in (book.rng.choice(sorted(models)), max(models)):
            book.check_answer(model, *client.answer(model))


def finish(url: str, book: Book) -> None:
    """Wait until all jobs have ended."""
    end = time.monotonic() + _PATIENCE
    with Client(url, KEY) as client:
        jobs = client.items("/v1/fine_tuning/jobs")
        while not all(job["finished_at"] for job in jobs):
            if time.monotonic() > end:
                raise KillsError(f"jobs have not ended after {_PATIENCE:g} s")
            time.sleep(0.5)
            jobs = client.items("/v1/fine_tuning/jobs")
    book.faults += [f"{job['id']} is {job['status']}: {job['error']}" for job in jobs if job["status"] != "succeeded"]
    book.counts["jobs_succeeded"] = sum(job["status"] == "succeeded" for job in jobs)


def kill_again_and_again(folder: Path, args: argparse.Namespace, book: Book) -> dict[str, Any]:
    """Run the server, kill it as often as is asked for, let it end its jobs, and return the figures."""
    state = folder / "state"
    disk = Disk(state, book, preft_jax.load_model("tiny", dtype="float32"))
    hyperparameters = {
        "max_steps": args.steps, "save_steps": args.checkpoint_steps, "batch_size": 2, "rank": 4, "max_length": 32,
        "learning_rate": 3e-3,
    }  # fmt: skip
    actions = [upload, functools.partial(create, hyperparameters=hyperparameters, open_jobs=2), ask]
    while (kills := book.counts["kills"]) <= args.kills:
        server = Server(state, folder / f"life-{kills}.jsonl")
        try:
            if 0 < kills < args.kills and book.rng.random() < args.starting:
                time.sleep(book.rng.uniform(0, args.starting_seconds))
                book.counts["kills_while_starting"] += not server.is_ready()
            else:
                url = server.until_ready()
                if not book.files:
                    with Client(url, KEY) as client:
                        book.begun.add(own := hashlib.sha256(ROWS).hexdigest())
                        book.files[client.upload(ROWS)] = own
                check_started(url, book)
                if kills in (0, args.kills):
                    if not kills:  # A job that ends first, so that later ones find their programs.
                        with Client(url, KEY) as client:
                            create(client, book, hyperparameters, 1)
                    finish(url, book)
                if kills == args.kills:
                    break
                with traffic(url, KEY, book, actions):
                    time.sleep(book.rng.uniform(0, args.running_seconds))
                    server.kill()
        finally:
            server.kill()
        book.counts["kills"] += 1
        disk.check()
        print(f"kill {book.counts['kills']}: {len(book.faults)} faults, {dict(book.counts)}", flush=True)
    last = {digest for name, digest in disk.digests().items() if ":ckpt-step-" not in name}
    if len(last) != 1:
        book.faults.append(f"the jobs learned the same and have {len(last)} adapters")
    return {"most_updates_lost": disk.most_lost, "last_adapters": len(last)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Kill, and return the figures that the JSON line holds."""
    for name in ("kills", "steps", "checkpoint_steps", "running_seconds"):
        if not getattr(args, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give a number above 0")
    args.seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    book = Book(random.Random(args.seed))
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="preft-kills-"))
    # The servers' own cache of programs, for a killed process may leave part of an entry.
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "programs"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    _forks.set_forkserver_preload(["bench.kills_traffic", "rich.table", "serve.api", "train.service.service"])
    found = kill_again_and_again(folder, args, book)
    if found["most_updates_lost"] > args.checkpoint_steps:
        book.faults.append(f"a job lost {found['most_updates_lost']} updates")
    kept = not book.faults
    if kept:
        shutil.rmtree(folder)
    else:
        print(f"what the server left is in {folder}", file=sys.stderr)
    figures = {**book.counts, **found, "faults": book.faults, "kept": kept, "seconds": round(time.monotonic() - start)}
    options = {name: value for name, value in vars(args).items() if name != "output_json"}
    return {"schema": SCHEMA, "options": options, "figures": figures, **environment()}


def print_table(found: dict[str, Any], console: Console) -> None:
    """Print the figures."""
    table = Table(title=f"{found['figures']['kills']} kills")
    table.add_column("what")
    table.add_column("number", justify="right")
    for name, value in found["figures"].items():
        table.add_row(name.replace("_", " "), str(len(value) if isinstance(value, list) else value))
    console.print(table)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kills", type=int, default=100, help="how many (default: %(default)s)")
    add("--steps", type=int, default=100, help="updates of each job (default: %(default)s)")
    add("--checkpoint-steps", type=int, default=20, help="updates between checkpoints (default: %(default)s)")
    add("--running-seconds", type=float, default=10.0, help="at most, from ready to the kill (default: %(default)s)")
    add("--starting", type=float, default=0.2, help="share of kills while it starts (default: %(default)s)")
    add("--starting-seconds", type=float, default=8.0, help="at most, of those (default: %(default)s)")
    add("--seed", type=int, default=None, help="of the moments and of the traffic (default: a new one)")
    add("--output-json", type=Path, default=None, help="also write the JSON line here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return judge(make_parser(), argv, run, print_table)


if __name__ == "__main__":
    sys.exit(main())
