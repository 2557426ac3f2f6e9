"""Uploads on disk: whole or not there at all, bounded for each owner, and what a restart finds."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from preft_jax.errors import ConfigError, LimitError
from serve.store import uploads as module
from serve.store.uploads import DiskError, FileTooLargeError, UploadLimits, Uploads

pytestmark = pytest.mark.host

ROOT = Path(__file__).parents[3]
LIMITS = UploadLimits(file_bytes=1000, owner_bytes=1500, owner_files=3, at_once=2)


@pytest.fixture
def make(tmp_path):
    """Return what opens the uploads of one directory; the ones before are closed."""
    opened = []

    def opening(**options):
        while opened:
            opened.pop().close()
        opened.append(Uploads(tmp_path / "files", **options))
        return opened[-1]

    yield opening
    for found in opened:
        found.close()


def put(uploads, content=b"{}\n", owner="alice", filename="rows.jsonl", purpose="fine-tune"):
    incoming = uploads.begin(owner)
    try:
        incoming.write(content)
        return incoming.finish(filename, purpose)
    finally:
        incoming.close()


def left(uploads, tmp_path):
    """Return the names below the directory that belong to no upload."""
    known = {"lock", *(upload.id for upload in uploads.list())}
    return sorted({entry.name for entry in (tmp_path / "files").iterdir()} - known)


def test_what_was_uploaded_is_there_after_a_restart(make, tmp_path):
    uploads = make(clock=lambda: 1234.5)
    content = os.urandom(100_000)
    incoming = uploads.begin("alice")
    for start in range(0, len(content), 7777):
        incoming.write(content[start : start + 7777])
        assert uploads.list() == []
    first = incoming.finish("täglich.jsonl", "fine-tune")
    incoming.close()
    second = put(uploads, owner=None)
    assert (first.owner, first.filename, first.num_bytes, first.created_at) == ("alice", "täglich.jsonl", 100_000, 1234)
    assert first.sha256 == hashlib.sha256(content).hexdigest()
    again = make()
    assert again.list() == [second, first]
    assert again.get(first.id) == first
    assert again.path(first).read_bytes() == content
    again.verify(first)
    with again.open(first) as file:
        assert again.delete(first)
        assert file.read() == content
    assert not again.delete(first)
    assert again.get(first.id) is None
    assert make().list() == [second]
    assert left(again, tmp_path) == []


def test_nobody_else_on_the_machine_may_read_them(make, tmp_path):
    upload = put(make())
    for path in (tmp_path / "files", tmp_path / "files" / upload.id, *(tmp_path / "files" / upload.id).iterdir()):
        assert path.stat().st_mode & 0o077 == 0


def test_ids_are_in_the_order_of_uploads_whatever_the_clock_does(make):
    clock = iter([1000.0, 1000.0, 999.0, 5.0, 2000.0])
    uploads = make(clock=lambda: next(clock))
    found = [put(uploads).id for _ in range(4)]
    again = make(clock=lambda: 3.0)
    found.append(put(again).id)
    assert found == sorted(found)
    assert [upload.id for upload in again.list()] == found[::-1]


def test_a_directory_has_one_server(make, tmp_path):
    make()
    with pytest.raises(ConfigError, match="another process keeps uploads"):
        Uploads(tmp_path / "files")
    (tmp_path / "none").write_text("")
    with pytest.raises(ConfigError, match="give another directory"):
        Uploads(tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "told"),
    [({"purpose": "batch"}, "the purpose is 'batch'; allowed: fine-tune"), ({"filename": ""}, "printable characters"),
     ({"filename": "a\nb"}, "printable characters"), ({"filename": "a" * 256}, "printable characters"),
     ({"content": b""}, "the file is empty")],
)  # fmt: skip
def test_what_is_refused_leaves_nothing(make, tmp_path, options, told):
    uploads = make()
    with pytest.raises(ConfigError, match=told):
        put(uploads, **options)
    assert uploads.list() == []
    assert left(uploads, tmp_path) == []


def test_limits_are_each_owners_and_what_goes_makes_room(make, tmp_path):
    uploads = make(limits=LIMITS)
    with pytest.raises(FileTooLargeError, match="more than 1000 bytes"):
        put(uploads, b"x" * 1001)
    first = put(uploads, b"x" * 1000)
    with pytest.raises(LimitError, match="more than 1500 bytes"):
        put(uploads, b"x" * 501)
    put(uploads, b"x" * 1000, owner="bob")
    put(uploads, b"x" * 250)
    put(uploads, b"x" * 250)
    with pytest.raises(LimitError, match="there are 3 files"):
        uploads.begin("alice")
    assert uploads.delete(first)
    again = make(limits=UploadLimits(file_bytes=2000, owner_bytes=1500, owner_files=3))
    with pytest.raises(LimitError, match="more than 1500 bytes"):
        put(again, b"x" * 1001)
    put(again, b"x" * 1000)
    with pytest.raises(LimitError, match="there are 3 files"):
        again.begin("alice")
    assert left(again, tmp_path) == []


def test_what_is_under_way_counts(make):
    uploads = make(limits=LIMITS)
    one, two = uploads.begin("alice"), uploads.begin("alice")
    with pytest.raises(LimitError, match="2 uploads are under way"):
        uploads.begin("alice")
    uploads.begin("bob").close()
    one.write(b"x" * 900)
    with pytest.raises(LimitError, match="1500"):
        two.write(b"x" * 700)
    one.close()
    one.close()
    two.write(b"x" * 700)
    two.finish("a", "fine-tune")
    put(uploads, b"x" * 800)
    with pytest.raises(DiskError, match="given up"):
        one.write(b"x")


def test_an_owner_cannot_go_over_the_limit_with_many_uploads_at_once(make):
    uploads = make(limits=UploadLimits(file_bytes=1000, owner_bytes=5000, owner_files=100, at_once=100))
    refused = []

    def send():
        try:
            put(uploads, b"x" * 1000)
        except LimitError as error:
            refused.append(error)

    threads = [threading.Thread(target=send) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(upload.num_bytes for upload in uploads.list()) <= 5000
    assert len(refused) + len(uploads.list()) == 12


@pytest.mark.parametrize(
    ("code", "full", "told"), [(errno.ENOSPC, True, "disk is full"), (errno.EDQUOT, True, "disk is full"),
                               (errno.EIO, False, "Input/output error")],
)  # fmt: skip
@pytest.mark.parametrize("where", ["mkdir", "open", "fsync", "rename"])
def test_a_disk_that_fails_leaves_nothing(make, tmp_path, monkeypatch, where, code, full, told):
    uploads = make()
    kept = put(uploads)

    def fail(*args, **options):
        raise OSError(code, os.strerror(code), "/secret/path")

    owner = module.Path if where == "mkdir" else module if where == "open" else module.os
    monkeypatch.setattr(owner, where, fail, raising=where != "open")
    with pytest.raises(DiskError, match=told) as caught:
        put(uploads)
    assert caught.value.full is full
    assert "secret" not in str(caught.value)
    monkeypatch.undo()
    assert uploads.list() == [kept]
    assert left(uploads, tmp_path) == []
    put(uploads)


def test_a_disk_that_takes_a_part_only_leaves_nothing(make, tmp_path):
    """Here by the limit of a process's files."""
    code = """
        import resource, signal, sys
        from pathlib import Path
        from serve.store.uploads import DiskError, Uploads
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        incoming = Uploads(Path(sys.argv[1])).begin("alice")
        try:
            incoming.write(b"x" * 10000)
        except DiskError as error:
            incoming.close()
            print(error)
    """
    done = run(code, tmp_path / "files")
    assert "the upload cannot be kept: File too large" in done.stdout
    assert left(make(), tmp_path) == []


def run(code, *arguments, **options):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, **options)


def test_a_deletion_that_fails_changes_nothing(make, monkeypatch):
    uploads = make()
    upload = put(uploads)

    def fail(*args):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(module.os, "rename", fail)
    with pytest.raises(DiskError, match="cannot be deleted"):
        uploads.delete(upload)
    monkeypatch.undo()
    assert uploads.get(upload.id) == upload
    assert uploads.delete(upload)


KILLS = """
    import os, signal, sys, time
    from pathlib import Path
    from serve.store.uploads import Uploads

    root = Path(sys.argv[1])

    def upload_and_delete(out):
        uploads = Uploads(root)
        while True:
            incoming = uploads.begin("alice")
            for _ in range(20):
                incoming.write(os.urandom(500))
            os.write(out, incoming.finish("rows.jsonl", "fine-tune").id.encode())
            for upload in uploads.list()[5:]:
                uploads.delete(upload)

    for number in range(40):
        come, out = os.pipe()
        if (child := os.fork()) == 0:
            upload_and_delete(out)
        os.close(out)
        told = os.read(come, 29)
        time.sleep(0.0005 * number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(come, 2**16):
            told += more
        os.close(come)
        acknowledged = [told[i : i + 29].decode() for i in range(0, len(told), 29)]
        uploads = Uploads(root)
        found = uploads.list()
        for upload in found:
            assert upload.num_bytes == 10_000
            uploads.verify(upload)
        assert acknowledged
        assert set(acknowledged[-5:]) <= {upload.id for upload in found}
        assert {entry.name for entry in root.iterdir()} == {"lock", *(upload.id for upload in found)}
        uploads.close()
    print("fine")
"""


def test_kill_9_at_any_moment_leaves_whole_uploads_only(tmp_path):
    """Forty kills, each a little later after the first upload; those that were acknowledged are there."""
    assert run(KILLS, tmp_path / "files").stdout == "fine\n"


@pytest.mark.parametrize("damage", ["content", "about", "sum", "gone", "id", "shape"])
def test_what_is_damaged_is_told_and_not_served(make, tmp_path, caplog, damage):
    uploads = make()
    whole, upload = put(uploads), put(uploads, b"0123456789")
    folder = tmp_path / "files" / upload.id
    about = json.loads((folder / "about.json").read_text())
    if damage == "content":
        (folder / "content.jsonl").write_bytes(b"012345678")
    elif damage == "gone":
        (folder / "about.json").unlink()
    elif damage == "id":
        folder = folder.rename(folder.with_name("file-" + "0" * 24))
    elif damage == "shape":
        (folder / "about.json").write_text("[[[[[1]]]]]")
    else:
        about["about" if damage == "about" else "sum"] = about["about"] | {"owner": "bob"} if damage == "about" else "0"
        (folder / "about.json").write_text(json.dumps(about))
    again = make()
    assert again.list() == [whole]
    (record,) = caplog.records
    assert (record.getMessage(), record.facts["file"]) == ("upload refused", folder.name)


def test_a_changed_byte_is_found(make):
    uploads = make()
    upload = put(uploads, b"0123456789")
    uploads.path(upload).write_bytes(b"0123456780")
    with pytest.raises(DiskError, match="damaged"):
        uploads.verify(upload)
