"""``/v1/files`` over HTTP, with the official client: shapes, tenants, limits, and uploads that go wrong."""

import errno
import json
import os
import random
import socket

import api_server
import fake_tuning
import httpx
import openai
import pytest

from serve.server import files as module
from serve.server import form as form_module
from serve.store import uploads as store
from serve.store.uploads import UploadLimits

pytestmark = pytest.mark.host

LIMITS = UploadLimits(file_bytes=2**21, owner_bytes=3 * 2**21, owner_files=5, at_once=2)
ROWS = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("state") / "files"


@pytest.fixture(scope="module")
def serving(root):
    return fake_tuning.make_serving(root, api_server.USERS, api_server.ADMIN, limits=LIMITS, seconds=30.0)


@pytest.fixture(scope="module")
def url(serving):
    with api_server.running(serving, request_seconds=1) as found:
        yield found
    assert serving.tuning.jobs.closed


@pytest.fixture(scope="module")
def people(url):
    """Return a client for each key."""
    keys = {"alice": api_server.ALICE, "bob": api_server.BOB, "nobody": api_server.NOBODY, "admin": api_server.ADMIN}
    found = {name: api_server.client(url, key) for name, key in keys.items()}
    yield found
    for one in found.values():
        one.close()


@pytest.fixture
def raw(url):
    headers = {"Authorization": f"Bearer {api_server.ALICE}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as found:
        yield found


@pytest.fixture(autouse=True)
def _leaves_nothing(serving, root):
    yield
    uploads = serving.tuning.uploads
    api_server.until(lambda: not uploads._receiving.total())
    api_server.until(lambda: len(list(root.iterdir())) == len(uploads.list()) + 1)  # and the lock
    for upload in uploads.list():
        uploads.delete(upload)


def put(client, content=ROWS, name="rows.jsonl"):
    return client.files.create(file=(name, content), purpose="fine-tune")


def refused(answer, status, code, param=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert len(error["message"]) < 400
    return error["message"]


def test_the_official_client_works(people):
    alice = people["alice"]
    content = os.urandom(2**20 + 12345)
    made = put(alice, content, "Zeilen – täglich.jsonl")
    assert made.to_dict() == {
        "id": made.id, "object": "file", "bytes": len(content), "created_at": made.created_at, "purpose": "fine-tune",
        "filename": "Zeilen – täglich.jsonl", "status": "processed", "status_details": None, "expires_at": None,
    }  # fmt: skip
    assert alice.files.retrieve(made.id) == made
    answer = alice.files.content(made.id)
    assert answer.read() == content
    assert answer.response.headers["content-disposition"].startswith("attachment; filename*=UTF-8''Zeilen%20")
    assert answer.response.headers["content-type"] == "application/octet-stream"
    assert alice.files.list().data == [made]
    assert alice.files.wait_for_processing(made.id) == made
    gone = alice.files.delete(made.id)
    assert gone.to_dict() == {"id": made.id, "object": "file", "deleted": True}
    for call in (alice.files.retrieve, alice.files.content, alice.files.delete):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            call(made.id)


def test_another_tenants_file_does_not_exist(people):
    alices, bobs, nobodys = (put(people[name]) for name in ("alice", "bob", "nobody"))
    for name, own in (("alice", alices), ("bob", bobs), ("nobody", nobodys)):
        client = people[name]
        assert client.files.list().data == [own]
        for other in {alices.id, bobs.id, nobodys.id} - {own.id}:
            for call in (client.files.retrieve, client.files.content, client.files.delete):
                with pytest.raises(openai.NotFoundError) as caught:
                    call(other)
                with pytest.raises(openai.NotFoundError) as nothing:
                    call("file-" + "0" * 24)
                told = caught.value.body["message"].replace(other, "file-" + "0" * 24)
                assert caught.value.body | {"message": told} == nothing.value.body
    assert {one.id for one in people["admin"].files.list()} == {alices.id, bobs.id, nobodys.id}
    assert people["admin"].files.content(bobs.id).read() == ROWS
    assert people["admin"].files.delete(bobs.id).deleted
    assert people["bob"].files.list().data == []


def test_pages_follow_each_other_also_when_what_they_begin_behind_is_deleted(people):
    alice = people["alice"]
    ids = [put(alice, name=f"{i}.jsonl").id for i in range(5)]
    assert [one.id for one in alice.files.list(limit=2)] == ids[::-1]
    assert [one.id for one in alice.files.list(limit=2, order="asc")] == ids
    page = alice.files.list(limit=5)
    assert not page.has_more
    page = alice.files.list(limit=2, after=ids[3])
    assert ([one.id for one in page.data], page.has_more) == ([ids[2], ids[1]], True)
    assert alice.files.list(purpose="assistants").data == []
    seen = []
    for one in alice.files.list(limit=2):
        seen.append(one.id)
        alice.files.delete(one.id)
    assert seen == ids[::-1]


def test_limits_are_told(people, raw):
    message = refused(raw.post("/v1/files", files={"purpose": (None, "fine-tune"), "file": ("a", bytes(2**21 + 1))}),
                      413, "file_too_large", "file")  # fmt: skip
    assert "more than 2097152 bytes" in message
    for _ in range(3):
        put(people["alice"], bytes(2**21))
    form = {"purpose": (None, "fine-tune"), "file": ("a", b"x")}
    answer = raw.post("/v1/files", files=form)
    assert "more than 6291456 bytes" in refused(answer, 429, "limit_reached")
    assert answer.headers["x-should-retry"] == "false"
    put(people["bob"], bytes(2**21))
    people["alice"].files.delete(people["alice"].files.list().data[0].id)
    for _ in range(3):
        put(people["alice"])
    assert "there are 5 files" in refused(raw.post("/v1/files", files=form), 429, "limit_reached")


HEAD = b"--b\r\nContent-Disposition: form-data; "
PURPOSE = HEAD + b'name="purpose"\r\n\r\nfine-tune\r\n'
FILE = HEAD + b'name="file"; filename="a"\r\n\r\nx\r\n'
END = b"--b--\r\n"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (PURPOSE + END, "missing_field", "file"),
        (FILE + END, "missing_field", "purpose"),
        (PURPOSE + FILE, "invalid_form", None),
        (b"", "invalid_form", None),
        (b"{}", "invalid_form", None),
        (END, "missing_field", "file"),
        (HEAD + b'name="purpose"\r\n\r\nassistants\r\n' + FILE + END, "invalid_value", "purpose"),
        (PURPOSE + HEAD + b'name="file"; filename=""\r\n\r\nx\r\n' + END, "invalid_value", "file"),
        (PURPOSE + HEAD + b'name="file"\r\n\r\nx\r\n' + END, "invalid_value", "file"),
        (PURPOSE + HEAD + b'name="file"; filename="a"\r\n\r\n\r\n' + END, "invalid_value", "file"),
        (PURPOSE + FILE + FILE + END, "invalid_value", "file"),
        (PURPOSE + PURPOSE + FILE + END, "invalid_value", "purpose"),
        (HEAD + b'name="purpos"\r\n\r\nfine-tune\r\n' + FILE + END, "unknown_field", "purpos"),
        (HEAD + b'name="expires_after[seconds]"\r\n\r\n3600\r\n' + END, "unsupported_field", "expires_after"),
        (HEAD + b'name="purpose"\r\n\r\n' + b"a" * 2000 + b"\r\n" + END, "invalid_value", "purpose"),
        (b"--b\r\n" + b"A: b\r\n" * 20 + b"\r\nx\r\n" + END, "invalid_form", None),
        (b"--b\r\nA: " + b"b" * 2**15 + b"\r\n\r\nx\r\n" + END, "invalid_form", None),
        (b"--b\r\n\r\nx\r\n" + END, "invalid_form", None),
        (PURPOSE + FILE + END + b"z" * 2**17, "invalid_form", None),
    ],
)
@pytest.mark.parametrize("size", [10**6, 7])
def test_forms_that_are_wrong_are_told(raw, monkeypatch, body, code, param, size):
    monkeypatch.setattr(module, "_PIECE", 1)
    parts = (body[i : i + size] for i in range(0, len(body), size))
    answer = raw.post("/v1/files", content=parts, headers={"Content-Type": "multipart/form-data; boundary=b"})
    refused(answer, 400, code, param)


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [("application/json", 415, "not_multipart"), ("", 415, "not_multipart"),
     ("multipart/form-data", 400, "invalid_form"), ("multipart/form-data; boundary=", 400, "invalid_form"),
     ("multipart/form-data; boundary=" + "a" * 300, 400, "invalid_form"), ("multipart/mixed; boundary=b", 415,
     "not_multipart")],
)  # fmt: skip
def test_what_is_no_form_is_told(raw, kind, status, code):
    refused(raw.post("/v1/files", content=PURPOSE + FILE + END, headers={"Content-Type": kind}), status, code)


def test_a_purpose_may_come_behind_the_file(raw):
    headers = {"Content-Type": 'multipart/form-data; boundary="b"'}
    answer = raw.post("/v1/files", content=FILE + PURPOSE + END, headers=headers)
    assert (answer.status_code, answer.json()["bytes"]) == (200, 1)


def test_queries_that_are_wrong_are_told(raw):
    for query, param in (("limit=0", "limit"), ("limit=x", "limit"), ("limit=10001", "limit"), ("order=up", "order")):
        refused(raw.get(f"/v1/files?{query}"), 400, "invalid_value", param)
    assert "did you mean 'order'" in refused(raw.get("/v1/files?ordr=asc"), 400, "unknown_field", "ordr")
    refused(raw.post("/v1/files?x=1", content=b""), 400, "unknown_field", "x")
    assert raw.get("/v1/files?after=%00").json()["data"] == []


def test_without_a_key_the_body_is_not_waited_for(url):
    with socket.create_connection(tuple(url[7:].split(":"))) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\nabc"
        )
        answer = b""
        while more := connection.recv(2**16):
            answer += more
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close" in answer.lower()


def start_upload(url, length, *parts):
    connection = socket.create_connection(tuple(url[7:].split(":")))
    connection.settimeout(60)
    connection.sendall(
        f"POST /v1/files HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {api_server.ALICE}\r\n"
        f"Content-Length: {length}\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n".encode()
        + b"".join(parts)
    )
    return connection


def half(url):
    return start_upload(url, 2**20, PURPOSE, HEAD + b'name="file"; filename="a"\r\n\r\n', bytes(2**19))


def test_half_an_upload_is_never_seen(url, people, serving, root):
    """The client goes away in the middle; what was written until then goes, too."""
    uploads = serving.tuning.uploads
    with half(url):
        api_server.until(lambda: any(entry.name.startswith(".incoming") for entry in root.iterdir()))
        assert people["alice"].files.list().data == []
    api_server.until(lambda: not uploads._receiving.total())
    assert {entry.name for entry in root.iterdir()} == {"lock"}
    assert uploads._bytes["alice"] == 0


def test_only_so_many_at_once(url, serving, raw):
    form = {"purpose": (None, "fine-tune"), "file": ("a", ROWS)}
    with half(url), half(url):
        api_server.until(lambda: serving.tuning.uploads._receiving["alice"] == 2)
        assert "2 uploads are under way" in refused(raw.post("/v1/files", files=form), 429, "limit_reached")
    api_server.until(lambda: not serving.tuning.uploads._receiving.total())
    assert raw.post("/v1/files", files=form).status_code == 200


def test_an_upload_may_take_longer_than_other_bodies(url, people):
    """Others have one second here; the connection of this one is idle for longer than that."""
    content = bytes(1000)
    parts = PURPOSE, HEAD + b'name="file"; filename="a"\r\n\r\n', content, b"\r\n", END
    with start_upload(url, sum(map(len, parts)), *parts[:2]) as upload:
        with socket.create_connection(tuple(url[7:].split(":"))) as other:
            other.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n")
            other.settimeout(60)
            while other.recv(2**16):  # It is answered (there is no key), or dropped after its second.
                pass
            other.close()
        with socket.create_connection(tuple(url[7:].split(":"))) as silent:
            silent.settimeout(60)
            assert silent.recv(1) == b""  # dropped after a second
        upload.sendall(b"".join(parts[2:]))
        assert upload.recv(2**16).startswith(b"HTTP/1.1 200 ")
    assert people["alice"].files.list().data[0].bytes == 1000


def test_an_upload_that_takes_too_long_is_told(tmp_path):
    serving = fake_tuning.make_serving(tmp_path / "files", api_server.USERS, api_server.ADMIN, seconds=0.5)
    with api_server.running(serving) as url, half(url) as connection:
        assert connection.recv(2**16).startswith(b"HTTP/1.1 408 ")
        api_server.until(lambda: not serving.tuning.uploads._receiving.total())
    assert {entry.name for entry in (tmp_path / "files").iterdir()} == {"lock"}


@pytest.mark.parametrize(
    ("code", "status", "name"), [(errno.ENOSPC, 507, "disk_full"), (errno.EIO, 500, "disk_failed")]
)
def test_a_full_disk_is_told_and_leaves_nothing(raw, people, monkeypatch, code, status, name):
    real = store.Incoming.write

    def fail(self, data):
        with store._disk_errors("the upload cannot be kept"):
            if self.num_bytes > 2**19:
                raise OSError(code, os.strerror(code), "/secret")
        real(self, data)

    monkeypatch.setattr(store.Incoming, "write", fail)
    answer = raw.post("/v1/files", files={"purpose": (None, "fine-tune"), "file": ("a", bytes(2**20 + 2**19))})
    assert "secret" not in refused(answer, status, name)
    assert answer.json()["error"]["type"] == "server_error"
    monkeypatch.undo()
    assert put(people["alice"]).bytes == len(ROWS)


def test_random_forms_are_never_a_failure(url, raw, request):
    """Bytes of a good form are changed, cut and doubled; each answer is a file or an error of the client's."""
    chance = random.Random(request.config.getoption("--seed"))
    good = PURPOSE + FILE + END
    for _ in range(150):
        body = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(body))
            change = chance.randrange(4)
            if change == 0:
                body[at] = chance.randrange(256)
            elif change == 1:
                del body[at : at + chance.randint(1, 9)]
            elif change == 2:
                body[at:at] = body[chance.randrange(len(body)) :][: chance.randint(1, 40)]
            else:
                body[at:at] = bytes(chance.choices(b'\r\n-";=\0\xff', k=3))
            body = body or bytearray(b"x")
        answer = raw.post("/v1/files", content=bytes(body), headers={"Content-Type": "multipart/form-data; boundary=b"})
        if answer.status_code == 200:
            assert raw.delete(f"/v1/files/{answer.json()['id']}").status_code == 200
        else:
            assert answer.status_code == 400, (bytes(body), answer.text)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_form_that_was_given_up_takes_nothing_more():
    class Never:
        def begin(self):
            raise AssertionError("it was given up")

    form = form_module.UploadForm("multipart/form-data; boundary=b", Never().begin)
    form.close()
    form.feed(FILE)


def test_a_server_without_fine_tuning_says_how_to_switch_it_on():
    with api_server.running(fake_tuning.make_serving(None)) as url:
        client = api_server.client(url, "unused")
        calls = (
            lambda: put(client),
            client.files.list,
            lambda: client.files.retrieve("file-1"),
            client.fine_tuning.jobs.list,
            lambda: client.fine_tuning.jobs.create(model="tiny", training_file="file-1"),
            lambda: client.fine_tuning.jobs.cancel("ftjob-1"),
        )
        for call in calls:
            with pytest.raises(openai.NotFoundError, match="--enable-finetuning"):
                call()
        schema = httpx.get(f"{url}/openapi.json", trust_env=False).json()
        assert not [path for path in schema["paths"] if "files" in path or "fine_tuning" in path]
        assert json.dumps(schema)
        client.close()
