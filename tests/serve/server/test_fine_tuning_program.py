"""The program with fine-tuning, from an upload to the adapter's answer, with a kill in the middle."""

import json
import signal
import socket
import threading

import api_program
import api_server
import openai
import pytest

OPTIONS = ("--max-model-len", "128", "--bank-pages", "5")
ROWS = b"".join(
    json.dumps({"prompt": f"{word}?", "completion": "no"}).encode() + b"\n" for word in ("one", "two", "three", "four")
)
NUMBERS = {"max_steps": 6, "batch_size": 2, "rank": 4, "max_length": 32, "learning_rate": 0.05, "save_steps": 3}


def answer(client, model):
    found = client.completions.create(model=model, prompt="five?", max_tokens=4, temperature=0, logprobs=0).choices[0]
    return found.text, found.logprobs.token_logprobs


def half_an_upload(url):
    """Return a connection over which half of a file came."""
    connection = socket.create_connection(tuple(url[7:].split(":")))
    connection.sendall(
        b"POST /v1/files HTTP/1.1\r\nHost: a\r\nContent-Length: 999999\r\nAuthorization: Bearer "
        + api_server.ALICE.encode()
        + b"\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n"
        + b'--b\r\nContent-Disposition: form-data; name="file"; filename="half"\r\n\r\n'
        + bytes(400_000)
    )
    return connection


class Load:
    """Asks the base model the same again and again; ``answers`` are all that it said."""

    def __init__(self, client):
        self._client, self._end = client, threading.Event()
        self.answers = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._end.is_set():
            try:
                self.answers.append(answer(self._client, "tiny"))
            except openai.APIConnectionError:  # It was killed.
                return

    def end(self):
        self._end.set()
        self._thread.join()


def begin(program, client, state):
    """Upload, create a job while a load runs, and kill the program when it has learned something."""
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    load = Load(client)
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, suffix="mine", extra_body={"hyperparameters": NUMBERS}
    )
    with half_an_upload(program.url):
        api_server.until(lambda: any(path.name.startswith(".incoming") for path in (state / "files").iterdir()))
        api_server.until(lambda: client.fine_tuning.jobs.retrieve(job.id).step >= 1)
        program.process.send_signal(signal.SIGKILL)
        program.process.wait()
    load.end()
    assert load.answers
    return file, job, load.answers


@pytest.mark.slow
def test_from_an_upload_to_the_adapters_answer(tmp_path):
    state = tmp_path / "finetuning"
    (tmp_path / "bad.jsonl").write_bytes(ROWS + b'{"prompt": 1}\n')
    (tmp_path / "jobs.yaml").write_text("jobs: [{name: given, training_file: bad.jsonl}]")
    options = (*OPTIONS, "--state-dir", str(tmp_path), "--finetune", str(tmp_path / "jobs.yaml"))
    with api_program.Program(*options) as program:
        program.until_ready()
        client = api_server.client(program.url, api_server.ALICE)
        (given,) = program.events("fine-tuning job")
        assert (given["name"], given["new"]) == ("given", True)
        api_server.until(lambda: client.fine_tuning.jobs.retrieve(given["job"]).status == "failed")
        assert ":5: " in client.fine_tuning.jobs.retrieve(given["job"]).error.message
        base = answer(client, "tiny")
        file, job, answers = begin(program, client, state)
        client.close()
    with api_program.Program(*options) as program:
        program.until_ready()
        client = api_server.client(program.url, api_server.ALICE)
        jobs = client.fine_tuning.jobs
        (again,) = program.events("fine-tuning job")
        assert (again["job"], again["new"], again["status"]) == (given["job"], False, "failed")
        assert client.files.list().data == [file]
        assert {path.name for path in (state / "files").iterdir()} == {"lock", file.id}
        load = Load(client)
        api_server.until(lambda: jobs.retrieve(job.id).status not in ("queued", "running"))
        load.end()
        done = jobs.retrieve(job.id)
        assert (done.status, done.error, done.trained_tokens > 0) == ("succeeded", None, True)
        steps = {event.data["step"] for event in jobs.list_events(job.id) if event.type == "metrics"}
        assert steps == set(range(1, 7))
        names = {model.id for model in client.models.list()}
        kept = [one.fine_tuned_model_checkpoint for one in jobs.checkpoints.list(job.id)]
        assert len(kept) == 2
        assert {done.fine_tuned_model, *kept} <= names
        assert answer(client, done.fine_tuned_model)[1] != base[1]
        assert all(found == base for found in (*answers, *load.answers))
        with program.client(api_server.ADMIN) as admin:
            assert done.fine_tuned_model in {model["id"] for model in admin.get("/v1/models").json()["data"]}
        assert client.files.delete(file.id).deleted
        client.close()
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == 0
    assert {path.name for path in (state / "files").iterdir()} == {"lock"}
