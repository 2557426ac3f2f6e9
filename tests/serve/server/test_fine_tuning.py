"""``/v1/fine_tuning/jobs`` over HTTP, with the official client and jobs that do what a test says."""

import dataclasses
import json
import os
import random
import signal
import threading

import api_server
import fake_tuning
import httpx
import openai
import pytest

from serve import api
from serve.jobs import JobSpec
from serve.server import app
from serve.store.uploads import Uploads

pytestmark = pytest.mark.host

ROWS = b'{"prompt": "a", "completion": "b"}\n'
JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "files"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return a server, its address, and a client for each key."""
    root = tmp_path_factory.mktemp("state") / "files"
    serving = fake_tuning.make_serving(root, api_server.USERS, api_server.ADMIN)
    keys = {"alice": api_server.ALICE, "bob": api_server.BOB, "nobody": api_server.NOBODY, "admin": api_server.ADMIN}
    with api_server.running(serving) as url:
        people = {name: api_server.client(url, key) for name, key in keys.items()}
        yield serving, url, people
        for one in people.values():
            one.close()


@pytest.fixture
def tuning(shared):
    """Return the server's jobs, none of which is there yet."""
    found = shared[0].tuning.jobs
    found.clear()
    return found


@pytest.fixture
def people(shared, tuning):
    return shared[2]


@pytest.fixture
def raw(shared, tuning):
    headers = {"Authorization": f"Bearer {api_server.ALICE}"}
    with httpx.Client(base_url=shared[1], headers=headers, timeout=60, trust_env=False) as found:
        yield found


@pytest.fixture(scope="module")
def files(shared):
    """Return the id of a file of each."""
    return {
        name: client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
        for name, client in shared[2].items()
    }


def refused(answer, status, code, param=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert len(error["message"]) < 500
    return error["message"]


def make(client, file, **fields):
    return client.fine_tuning.jobs.create(model="tiny", training_file=file, **fields)


def test_the_official_client_follows_a_job_to_its_end(people, tuning, files):
    jobs = people["alice"].fine_tuning.jobs
    numbers = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5}
    job = make(
        people["alice"], files["alice"], validation_file=files["alice"], suffix="lamps", seed=3, metadata={"a": "b"},
        method={"type": "supervised", "supervised": {"hyperparameters": numbers | {"rank": 4}}},
    )  # fmt: skip
    assert job.to_dict() == {
        "id": job.id, "object": "fine_tuning.job", "model": "tiny", "created_at": 1_700_000_000, "finished_at": None,
        "estimated_finish": None, "status": "validating_files", "error": None, "fine_tuned_model": None,
        "trained_tokens": None, "training_file": files["alice"], "validation_file": files["alice"],
        "result_files": [], "hyperparameters": numbers | {"rank": 4}, "seed": 3, "user_provided_suffix": "lamps",
        "method": {"type": "supervised", "supervised": {"hyperparameters": numbers | {"rank": 4}}},
        "organization_id": "alice", "integrations": [], "metadata": {"a": "b"},
        "step": 0, "total_steps": None, "priority": 0,
    }  # fmt: skip
    spec = tuning.get(job.id).spec
    assert spec.training_path.read_bytes() == spec.validation_path.read_bytes() == ROWS
    assert spec.uploaded
    tuning.begin(job.id)
    assert jobs.retrieve(job.id).status == "running"
    assert jobs.pause(job.id).status == "paused"
    assert jobs.resume(job.id).status == "queued"
    tuning.learn(job.id, 2.5)
    tuning.learn(job.id, float("inf"))
    events = list(jobs.list_events(job.id, limit=2))
    assert [event.message for event in events] == ["Step 2", "Step 1", "created"]
    assert (events[1].object, events[1].type, events[1].data) == (
        "fine_tuning.job.event", "metrics", {"step": 1, "train_loss": 2.5},
    )  # fmt: skip
    assert events[0].data["train_loss"] is None
    tuning.keep(job.id, "ft:tiny:lamps:1")
    (kept,) = jobs.checkpoints.list(job.id)
    assert (kept.object, kept.fine_tuning_job_id, kept.fine_tuned_model_checkpoint, kept.step_number) == (
        "fine_tuning.job.checkpoint", job.id, "ft:tiny:lamps:1", 2,
    )  # fmt: skip
    assert (kept.metrics.train_loss, kept.metrics.valid_loss, kept.metrics.step) == (0.5, None, 2)
    tuning.finish(job.id, "ft:tiny:lamps")
    done = jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.trained_tokens, done.finished_at) == (
        "succeeded", "ft:tiny:lamps", 20, 1_700_000_999,
    )  # fmt: skip
    for change in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(openai.BadRequestError, match="the job is succeeded") as caught:
            change(job.id)
        assert caught.value.code == "invalid_status"


def test_a_job_that_failed_says_why(people, tuning, files):
    job = make(people["alice"], files["alice"])
    error = {"code": "invalid_training_file", "message": "rows.jsonl: line 3", "param": "training_file"}
    tuning._set(job.id, status="failed", error=error, finished_at=1)
    assert people["alice"].fine_tuning.jobs.retrieve(job.id).error.to_dict() == error


def test_the_older_way_to_give_hyperparameters(people, tuning, files, raw):
    job = make(people["alice"], files["alice"], hyperparameters={"n_epochs": 5})
    assert job.method.supervised.hyperparameters.n_epochs == job.hyperparameters.n_epochs == 5
    assert tuning.get(job.id).spec.hyperparameters == {"n_epochs": 5}
    both = {
        "model": "tiny", "training_file": files["alice"], "hyperparameters": {"n_epochs": 1},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
    }  # fmt: skip
    assert "in one place" in refused(raw.post(JOBS, json=both), 400, "invalid_value", "hyperparameters")
    assert raw.post(JOBS, json=both | {"hyperparameters": {}}).json()["hyperparameters"] == {"n_epochs": 2}
    null = both | {"method": None, "hyperparameters": {"n_epochs": None, "rank": 2}, "integrations": []}
    assert raw.post(JOBS, json=null).json()["hyperparameters"] == {"rank": 2}


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"training_file": None}, 400, "missing_field", "training_file"),
        ({"training_file": "file-1"}, 404, "file_not_found", "training_file"),
        ({"training_file": "../../etc/passwd"}, 404, "file_not_found", "training_file"),
        ({"validation_file": "file-1"}, 404, "file_not_found", "validation_file"),
        ({"model": "gpt-4o"}, 404, "model_not_found", "model"),
        ({"method": {"type": "dpo", "dpo": {}}}, 400, "unsupported_field", "method.dpo"),
        ({"method": {"type": "dpo"}}, 400, "invalid_value", "method.type"),
        ({"method": {"type": "supervised", "other": 1}}, 400, "unknown_field", "method.other"),
        ({"integrations": [{"type": "wandb"}]}, 400, "unsupported_field", "integrations"),
        ({"n_epochs": 3}, 400, "unknown_field", "n_epochs"),
        ({"hyperparameters": {"n_epoch": 3}}, 400, "invalid_value", "hyperparameters"),
        ({"hyperparameters": {"n_epochs": [3]}}, 400, "invalid_value", None),
        ({"hyperparameters": {str(i): 1 for i in range(65)}}, 400, "invalid_value", "hyperparameters"),
        ({"hyperparameters": {"../x": 1}}, 400, "invalid_value", None),
        ({"suffix": "a/b"}, 400, "invalid_value", "suffix"),
        ({"suffix": "a" * 65}, 400, "invalid_value", "suffix"),
        ({"seed": -1}, 400, "invalid_value", "seed"),
        ({"seed": 2**31}, 400, "invalid_value", "seed"),
        ({"metadata": {str(i): "" for i in range(17)}}, 400, "invalid_value", "metadata"),
        ({"metadata": {"a": "b" * 513}}, 400, "invalid_value", None),
        ({"priority": 1}, 403, "admin_only", "priority"),
        ({"priority": 101}, 400, "invalid_value", "priority"),
    ],
)
def test_bodies_that_are_wrong_are_told(raw, files, tuning, fields, status, code, param):
    answer = raw.post(JOBS, json={"model": "tiny", "training_file": files["alice"]} | fields)
    refused(answer, status, code, param or answer.json()["error"]["param"])
    assert tuning.list() == []


def test_bodies_that_are_no_json_are_told(raw):
    refused(raw.post(JOBS, content=b"{", headers={"Content-Type": "application/json"}), 400, "bad_json")
    refused(raw.post(JOBS, content=b"[]", headers={"Content-Type": "application/json"}), 400, "invalid_body")
    refused(raw.post(JOBS, content=b"model=tiny"), 415, "not_json")


def test_another_tenants_job_does_not_exist(people, tuning, files):
    alices, bobs, nobodys, admins = (make(people[name], files[name]) for name in people)
    for name, own in (("alice", alices), ("bob", bobs), ("nobody", nobodys)):
        jobs = people[name].fine_tuning.jobs
        assert [one.id for one in jobs.list()] == [own.id]
        calls = (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list)
        for call in calls:
            for other in {alices.id, bobs.id, nobodys.id, admins.id, "ftjob-1"} - {own.id}:
                with pytest.raises(openai.NotFoundError, match="does not exist, or your key has no access"):
                    call(other)
    assert all(job.status == "validating_files" for job in tuning.list())
    with pytest.raises(openai.NotFoundError) as caught:
        make(people["bob"], files["alice"])
    assert (caught.value.code, caught.value.param) == ("file_not_found", "training_file")
    assert len(list(people["admin"].fine_tuning.jobs.list())) == 4
    assert people["admin"].fine_tuning.jobs.cancel(bobs.id).status == "cancelled"
    assert (nobodys.organization_id, admins.organization_id) == ("preft-jax", "preft-jax")
    assert make(people["admin"], files["bob"], extra_body={"priority": 5}).priority == 5


def test_a_job_of_nobody_is_everybodys_to_see_and_the_admins_to_change(people, tuning, tmp_path):
    job = tuning.create(JobSpec(training_file="finetune:x", training_path=tmp_path / "x"), owner=None)
    assert people["bob"].fine_tuning.jobs.retrieve(job.id).id == job.id
    with pytest.raises(openai.PermissionDeniedError, match="only the admin's key"):
        people["bob"].fine_tuning.jobs.cancel(job.id)
    assert people["admin"].fine_tuning.jobs.cancel(job.id).status == "cancelled"


@pytest.fixture
def served(shared, people, tuning, files, monkeypatch):
    """Pretend that adapters are served: one of a job of Alice's, one that the admin loaded for her, and others'."""
    job = make(people["alice"], files["alice"])
    tuning.finish(job.id, "ft:tiny:alice:1")
    owners = {"ft:tiny:alice:1": "alice", "loaded": "alice", "public": None, "bobs": "bob"}
    monkeypatch.setattr(shared[0].adapters, "owners", owners)


@pytest.mark.usefixtures("served")
def test_the_official_client_deletes_an_adapter_of_its_own(people, tuning):
    gone = people["alice"].models.delete("ft:tiny:alice:1")
    assert gone.to_dict() == {"id": "ft:tiny:alice:1", "object": "model", "deleted": True}
    assert tuning.deleted == ["ft:tiny:alice:1"]
    assert people["admin"].models.delete("ft:tiny:alice:1").deleted


def test_names_may_hold_slashes(shared, people, tuning, files, monkeypatch):
    """As the base model's does where it is a path, or an id of the Hub."""
    base, adapter = "org/tiny", "ft:org/tiny::1"
    monkeypatch.setattr(shared[0], "names", ("tiny", base))
    monkeypatch.setattr(shared[0].adapters, "owners", {adapter: "alice"})
    tuning.finish(make(people["alice"], files["alice"]).id, adapter)
    models = people["alice"].models
    assert [models.retrieve(name).id for name in (base, adapter)] == [base, adapter]
    assert models.delete(adapter).to_dict() == {"id": adapter, "object": "model", "deleted": True}
    assert tuning.deleted == [adapter]
    with pytest.raises(openai.PermissionDeniedError) as denied:
        models.delete(base)
    with pytest.raises(openai.NotFoundError) as missing:
        models.retrieve("org/nothing")
    assert (denied.value.code, missing.value.code) == ("not_deletable", "model_not_found")


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(
    ("who", "name", "error", "code"),
    [
        ("bob", "ft:tiny:alice:1", openai.NotFoundError, "model_not_found"),
        ("alice", "nothing", openai.NotFoundError, "model_not_found"),
        ("alice", "bobs", openai.NotFoundError, "model_not_found"),
        ("alice", "public", openai.PermissionDeniedError, "admin_only"),
        ("alice", "loaded", openai.PermissionDeniedError, "not_deletable"),
        ("admin", "public", openai.PermissionDeniedError, "not_deletable"),
        ("alice", "tiny", openai.PermissionDeniedError, "not_deletable"),
        ("admin", "tiny", openai.PermissionDeniedError, "not_deletable"),
    ],
)
def test_nothing_else_is_deleted(people, tuning, who, name, error, code):
    with pytest.raises(error) as caught:
        people[who].models.delete(name)
    assert (caught.value.code, caught.value.type) == (code, "invalid_request_error")
    assert caught.value.param == ("model" if code != "admin_only" else None)
    assert tuning.deleted == []


def test_limits_of_jobs_are_told(people, tuning, files, raw):
    for _ in range(4):
        make(people["alice"], files["alice"])
    answer = raw.post(JOBS, json={"model": "tiny", "training_file": files["alice"]})
    assert "there are 4 open jobs" in refused(answer, 429, "limit_reached")
    assert answer.headers["x-should-retry"] == "false"
    make(people["bob"], files["bob"])


def test_lists_have_pages_and_filters(people, tuning, files, raw):
    tuning.most = 100
    jobs = people["alice"].fine_tuning.jobs
    ids = [make(people["alice"], files["alice"], metadata={"n": str(i % 2), "": "x"}).id for i in range(4)]
    ids.append(make(people["alice"], files["alice"]).id)
    assert [one.id for one in jobs.list(limit=2)] == ids[::-1]
    page = raw.get(JOBS, params={"limit": 2, "after": ids[4]}).json()
    assert (page["object"], page["has_more"], page["first_id"], page["last_id"]) == ("list", True, ids[3], ids[2])
    assert raw.get(JOBS, params={"after": ids[0]}).json()["data"] == []
    assert [one.id for one in jobs.list(metadata={"n": "1"})] == [ids[3], ids[1]]
    assert [one.id for one in jobs.list(metadata={"n": "1", "": "x"}, limit=1)] == [ids[3], ids[1]]
    assert [one.id for one in jobs.list(metadata={"n": ""})] == []
    assert [one["id"] for one in raw.get(f"{JOBS}?metadata=null").json()["data"]] == [ids[4]]
    refused(raw.get(f"{JOBS}?after=ftjob-1"), 400, "invalid_value", "after")
    refused(raw.get(f"{JOBS}?limit=0"), 400, "invalid_value", "limit")
    refused(raw.get(f"{JOBS}?metadata=x"), 400, "unknown_field", "metadata")
    refused(raw.get(f"{JOBS}?metadata=null&metadata[a]=b"), 400, "unknown_field", "metadata")
    refused(raw.get(f"{JOBS}?metdata[a]=b"), 400, "unknown_field", "metdata[a]")
    refused(raw.get(f"{JOBS}/{ids[0]}/events?after=nothing"), 400, "invalid_value", "after")
    refused(raw.get(f"{JOBS}/{ids[0]}/checkpoints?order=asc"), 400, "unknown_field", "order")


def test_a_file_stays_while_a_job_has_yet_to_read_it(people, tuning):
    alice = people["alice"]
    file = alice.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
    held = alice.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
    job = make(alice, file, validation_file=held)
    for one in (file, held):
        with pytest.raises(openai.ConflictError, match=job.id) as caught:
            alice.files.delete(one)
        assert caught.value.response.headers["x-should-retry"] == "false"
    assert tuning.begin(job.id) == [ROWS.decode().strip()]
    alice.fine_tuning.jobs.pause(job.id)
    for one in (file, held):
        assert alice.files.delete(one).deleted
    other = alice.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
    job = make(alice, other)
    alice.fine_tuning.jobs.cancel(job.id)
    assert alice.files.delete(other).deleted


def test_a_file_that_was_damaged_on_the_disk_is_trained_on_by_nobody(shared, people, raw, tuning):
    file = people["alice"].files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
    uploads = shared[0].tuning.uploads
    uploads.path(uploads.get(file)).write_bytes(ROWS.upper())
    told = refused(raw.post(JOBS, json={"model": "tiny", "training_file": file}), 500, "disk_failed")
    assert "upload it again" in told
    assert tuning.list() == []


def test_jobs_and_files_are_there_after_a_restart(root):
    with api_server.running(fake_tuning.make_serving(root, api_server.USERS, api_server.ADMIN)) as url:
        client = api_server.client(url, api_server.ALICE)
        file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        client.close()
    jobs = fake_tuning.FakeFineTuning()
    with api_server.running(fake_tuning.make_serving(root, api_server.USERS, api_server.ADMIN, jobs=jobs)) as url:
        client = api_server.client(url, api_server.ALICE)
        assert client.files.list().data == [file]
        job = make(client, file.id)
        client.close()
    assert jobs.closed
    again = fake_tuning.FakeFineTuning(jobs)
    with api_server.running(fake_tuning.make_serving(root, api_server.USERS, api_server.ADMIN, jobs=again)) as url:
        client = api_server.client(url, api_server.ALICE)
        assert client.fine_tuning.jobs.retrieve(job.id) == job
        again.begin(job.id)
        assert client.files.delete(file.id).deleted
        client.close()


def test_without_keys_everybody_is_the_same(root):
    with api_server.running(fake_tuning.make_serving(root)) as url:
        one, two = api_server.client(url, "unused"), api_server.client(url, "other")
        file = one.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        job = make(two, file.id, extra_body={"priority": 3})
        assert (job.organization_id, job.priority) == ("preft-jax", 3)
        assert one.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        assert two.files.delete(file.id).deleted
        one.close()
        two.close()


GOOD = {
    "model": "tiny", "training_file": "file-", "validation_file": "file-", "suffix": "x", "seed": 1, "priority": 0,
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
    "metadata": {"a": "b"}, "integrations": [],
}  # fmt: skip
ODD = (None, True, -1, 2**70, 0.5, "", "x", "\ud800", "\0", [], [[]], {}, {"": None}, "file-" + "0" * 24, "a" * 5000)


def changed(chance, value):
    if isinstance(value, dict) and value and chance.random() < 0.8:
        name = chance.choice(list(value))
        if chance.random() < 0.2:
            return {other: item for other, item in value.items() if other != name} | {name + "x": value[name]}
        return value | {name: changed(chance, value[name])}
    return chance.choice(ODD)


def test_random_bodies_are_never_a_failure(raw, files, tuning, request):
    chance = random.Random(request.config.getoption("--seed"))
    tuning.most = 10**6
    good = GOOD | {"training_file": files["alice"], "validation_file": files["alice"]}
    for _ in range(200):
        body = good
        for _ in range(chance.randint(0, 3)):
            body = changed(chance, body)
        answer = raw.post(JOBS, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400, 403, 404), (body, answer.text)
        if answer.status_code == 200:
            assert raw.get(f"{JOBS}/{answer.json()['id']}").json() == answer.json()
    for path in ("%00", "%ff", "a" * 5000, "..", "%2e%2e%2fx", "ftjob-%F0%9F%98%80"):
        for what in ("", "/events", "/checkpoints"):
            assert raw.get(f"{JOBS}/{path}{what}").status_code in (200, 404)
        assert raw.post(f"{JOBS}/{path}/cancel").status_code in (404, 405)
        assert raw.get(f"/v1/files/{path}").status_code in (200, 404)
        assert raw.delete(f"/v1/files/{path}").status_code in (404, 405)


def test_uploads_are_read_once_more_before_they_are_trained_on(root):
    """The path that a job gets is that of the upload; nothing that a client sends is a path."""
    uploads = Uploads(root)
    incoming = uploads.begin("alice")
    incoming.write(ROWS)
    upload = incoming.finish("../../../etc/passwd", "fine-tune")
    assert uploads.path(upload) == root / upload.id / "content.jsonl"
    assert dataclasses.asdict(upload)["filename"] == "../../../etc/passwd"
    uploads.close()


def test_a_server_ends_while_a_program_of_its_jobs_is_compiled(root, monkeypatch, caplog):
    """Then the engine's thread has the jobs, and they cannot be stopped."""
    monkeypatch.setattr(app, "CLOSE_SECONDS", 0.01)
    compiled = threading.Event()
    serving = fake_tuning.make_serving(root)
    serving.engine.engine.warm_up = compiled.wait
    serving.tuning.jobs.close = compiled.wait
    with api_server.running(serving):
        pass
    assert "being compiled" in caplog.text
    compiled.set()
    api_server.until(lambda: not serving.engine.busy)


def test_the_program_ends_without_a_thread_that_compiles_for_jobs(root, monkeypatch):
    serving, statuses, make = fake_tuning.make_serving(root), [], api.make_server
    monkeypatch.setattr(api, "make_serving", lambda args: serving)
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def make_server(*args, **options):
        server = make(*args, **options)

        def end():
            api_server.until(lambda: server.started)
            server.should_exit = True

        threading.Thread(target=end).start()
        return server

    monkeypatch.setattr(api, "make_server", make_server)
    args = api.make_parser().parse_args(["--port", "0", "--enable-finetuning", "--state-dir", str(root)])
    serving.tuning.jobs.is_compiling = True
    assert api.run(args) == 0
    assert statuses == [0]
    assert serving.tuning.jobs.closed, "jobs are kept first"
