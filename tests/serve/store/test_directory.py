"""A watched directory: whose its adapters are when their folders come and go."""

import shutil

import pytest
from fake_store import FakeFiles, Later, Now

from preft_jax.io.file_pair import CONFIG_FILE
from serve.store.directory import AdapterDirectory
from serve.store.host import AdapterStore
from serve.store.names import Registry

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


def make(tmp_path, root):
    files = FakeFiles()
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
