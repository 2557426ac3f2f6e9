"""A watched directory: whose its adapters are, and when they are read again."""

import os
import shutil

import pytest
from fake_store import FakeFiles, Later, Now

from preft_jax.errors import AdapterError
from preft_jax.io.file_pair import CONFIG_FILE
from preft_jax.io.safetensors_io import write_file
from serve.store.directory import AdapterDirectory
from serve.store.host import AdapterStore
from serve.store.names import Registry, RegistryError

pytestmark = pytest.mark.host


@pytest.fixture
def root(tmp_path):
    root = (tmp_path / "watched").resolve()
    for name in ("ann", "bob", "free"):
        add(root, name)
    return root


def add(root, name):
    (root / name).mkdir(parents=True)
    (root / name / CONFIG_FILE).write_text("{}")


def make(tmp_path, root, files=None):
    files = files or FakeFiles()
    for name in ("ann", "bob", "free"):
        files.disk[str(root / name)] = (f"{name}-", 10)
    store = AdapterStore(files, Registry(tmp_path / "r.sqlite"), host_bytes=1000, loaders=Later(), deleter=Now())
    return store, AdapterDirectory(store, root)


def owners(store):
    return {adapter.name: adapter.owner for adapter in store.list()}


def own(store, root):
    for name in ("ann", "bob"):
        store.register(name, str(root / name), owner=name, replace=True)


@pytest.mark.parametrize("restarts", ["", "gone", "back", "gone, back"])
def test_a_private_adapter_keeps_its_owner_when_its_folder_comes_and_goes(tmp_path, root, restarts):
    store, watched = make(tmp_path, root)
    watched.scan()
    own(store, root)
    expected = {"ann": "ann", "bob": "bob", "free": None}
    for _ in range(3):
        shutil.rmtree(root / "ann")
        shutil.rmtree(root / "free")
        if "gone" in restarts:
            store, watched = make(tmp_path, root)
        assert watched.scan().removed == ["ann", "free"]
        assert owners(store) == {"bob": "bob"}
        add(root, "ann")
        add(root, "free")
        if "back" in restarts:
            store, watched = make(tmp_path, root)
        watched.scan()
        assert owners(store) == expected


def test_a_folder_that_was_emptied_and_filled_again_is_its_owners(tmp_path, root):
    store, watched = make(tmp_path, root)
    watched.scan()
    own(store, root)
    (root / "ann" / CONFIG_FILE).unlink()
    watched.scan()
    (root / "ann" / CONFIG_FILE).write_text("{ }")
    watched.scan()
    assert owners(store)["ann"] == "ann"


def test_an_adapter_that_the_admin_unloads_comes_back_as_everybodys(tmp_path, root):
    store, watched = make(tmp_path, root)
    watched.scan()
    own(store, root)
    store.unregister("ann")
    shutil.rmtree(root / "ann")
    watched.scan()
    add(root, "ann")
    watched.scan()
    assert owners(store)["ann"] is None


def test_another_owner_may_be_named_while_the_folder_is_gone(tmp_path, root):
    store, watched = make(tmp_path, root)
    watched.scan()
    own(store, root)
    shutil.rmtree(root / "ann")
    watched.scan()
    store.register("ann", str(root / "free"))
    assert owners(store)["ann"] == "ann", "the name is its owner's, whatever is loaded under it"
    store.register("ann", str(root / "free"), owner="eve", replace=True)
    assert owners(store)["ann"] == "eve"


def digest_of(store, name):
    return store.get(name).digest


def test_a_folder_that_was_replaced_by_older_files_while_the_server_was_down_is_read_again(tmp_path, root):
    """Copies may keep the times of their contents (``cp -a``)."""
    store, watched = make(tmp_path, root)
    watched.scan()
    store.close()
    shutil.rmtree(root / "ann")
    add(root, "ann")
    for path in (root / "ann" / CONFIG_FILE, root / "ann"):
        os.utime(path, (1e9, 1e9))
    store, watched = make(tmp_path, root)
    assert watched.scan() == (["ann"], [], {})
    store, watched = make(tmp_path, root)
    assert watched.scan() == ([], [], {})


def test_a_directory_that_was_moved_is_followed_where_it_is_now(tmp_path, root):
    store, watched = make(tmp_path, root)
    watched.scan()
    own(store, root)
    store.close()
    root = root.rename(root.with_name("elsewhere"))
    files = FakeFiles()
    store, watched = make(tmp_path, root, files)
    assert watched.scan() == (["ann", "bob", "free"], [], {})
    assert owners(store) == {"ann": "ann", "bob": "bob", "free": None}
    files.disk[str(root / "ann")] = ("ann-2-", 10)
    (root / "ann" / CONFIG_FILE).write_text("{ }")
    assert watched.scan().registered == ["ann"]
    assert digest_of(store, "ann") == "ann-2-"
    shutil.rmtree(root / "ann")
    assert watched.scan().removed == ["ann"]


@pytest.mark.parametrize("leaves", ["directory", "name"])
def test_a_name_that_stands_for_another_directory_is_refused_until_that_is_gone(tmp_path, root, leaves):
    files = FakeFiles()
    store, watched = make(tmp_path, root, files)
    add(tmp_path, "other")
    files.disk[str(tmp_path / "other")] = ("other-", 10)
    store.register("ann", tmp_path / "other")
    changes = watched.scan()
    assert changes.registered == ["bob", "free"]
    assert f"'ann' stands for the adapter in {tmp_path / 'other'}" in changes.refused["ann"]
    assert watched.scan() == ([], [], {}), "it is told once"
    assert digest_of(store, "ann") == "other-"
    if leaves == "directory":
        shutil.rmtree(tmp_path / "other")
    else:
        store.unregister("ann")
    assert watched.scan() == (["ann"], [], {})


def test_a_name_that_was_published_from_memory_keeps_what_it_has(tmp_path, root):
    store, watched = make(tmp_path, root)
    store.publish("ann", ("memory-", 10))
    assert "published from memory" in watched.scan().refused["ann"]
    assert digest_of(store, "ann") == "memory-"


class Full(FakeFiles):
    """Its place for rank pages has no room at first."""

    def __init__(self, place):
        super().__init__()
        self.place = place

    def keep(self, digest, known):
        write_file(self.place / digest, b"", error=AdapterError)
        return super().keep(digest, known)


def test_what_the_system_refused_is_tried_again(tmp_path, root):
    files = Full(tmp_path / "pages")
    _, watched = make(tmp_path, root, files)
    files.broken.add(str(root / "bob"))
    refused = watched.scan().refused
    assert refused.keys() == {"ann", "bob", "free"}
    assert "cannot be written" in refused["ann"]
    assert watched.scan() == ([], [], {}), "it is told once"
    (tmp_path / "pages").mkdir()
    files.broken.clear()
    assert watched.scan() == (["ann", "free"], [], {}), "an adapter that is bad itself is not read before it changes"


def test_a_name_that_could_not_be_written_is_tried_again(tmp_path, root, monkeypatch):
    _, watched = make(tmp_path, root)
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "put", refuse)
        assert watched.scan().refused == dict.fromkeys(("ann", "bob", "free"), "the disk is full")
    assert watched.scan().registered == ["ann", "bob", "free"]


def refuse(*_):
    raise RegistryError("the disk is full")


def test_an_adapter_that_was_unloaded_stays_away_until_its_folder_changes_or_a_restart(tmp_path, root):
    store, watched = make(tmp_path, root)
    watched.scan()
    for name in ("ann", "bob"):
        store.unregister(name)
    assert watched.scan() == ([], [], {})
    (root / "ann" / CONFIG_FILE).write_text("{ }")
    assert watched.scan() == (["ann"], [], {})
    store, watched = make(tmp_path, root)
    assert watched.scan() == (["bob"], [], {})
