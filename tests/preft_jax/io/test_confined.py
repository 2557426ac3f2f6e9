"""Links that lead out of where files must lie, before and between the check and the opening."""

import os
import sys
import threading

import pytest

from preft_jax.errors import AdapterError
from preft_jax.io import confined
from preft_jax.io.adapter_limits import AdapterLimits
from preft_jax.io.confined import open_below
from preft_jax.io.file_pair import CONFIG_FILE, TENSORS_FILE, open_pair
from preft_jax.io.safetensors_io import serialize_safetensors

pytestmark = pytest.mark.host

EMPTY = serialize_safetensors({})


def adapter(path, content):
    path.mkdir(parents=True)
    (path / CONFIG_FILE).write_bytes(content)
    (path / TENSORS_FILE).write_bytes(EMPTY)


@pytest.fixture
def root(tmp_path):
    adapter(tmp_path / "root" / "users" / "ann", b"inside")
    adapter(tmp_path / "outside" / "ann", b"outside")
    return (tmp_path / "root").resolve()


def read(path, *roots):
    """Return the config that is read, or None if reading is refused."""
    try:
        with open_pair(path, AdapterLimits(roots=tuple(map(str, roots)))) as (raw, file):
            assert file.read() == {}
            return raw
    except AdapterError:
        return None


def test_links_below_the_roots_are_followed(root, tmp_path):
    adapter(tmp_path / "second" / "blobs", b"second")
    (root / "link").symlink_to(root / "users")
    (root / "relative").symlink_to("users/ann")
    (root / "over").symlink_to(tmp_path / "second" / "blobs")
    (root / "files").mkdir()
    for name in (CONFIG_FILE, TENSORS_FILE):
        (root / "files" / name).symlink_to(f"../users/ann/{name}")
    for path in ("users/ann", "link/ann", "relative", "files", "files/../users/ann"):
        assert read(root / path, root) == b"inside"
    assert read(root / "over", root, tmp_path / "second") == b"second"
    assert read(root / "over", root) is None


@pytest.mark.parametrize("place", ["users", "users/ann", f"users/ann/{CONFIG_FILE}", f"users/ann/{TENSORS_FILE}"])
@pytest.mark.parametrize("target", ["outside", "nowhere"])
def test_links_out_are_refused_with_the_same_words_wherever_they_lead(root, tmp_path, place, target):
    (root / place).rename(tmp_path / "away")
    (root / place).symlink_to((tmp_path / target / place.removeprefix("users/")) if "/" in place else tmp_path / target)
    with pytest.raises(OSError, match="leads out of the directories"):
        open_below(root / "users/ann" / (TENSORS_FILE if "tensors" in place else CONFIG_FILE), [root], os.O_RDONLY)
    assert read(root / "users" / "ann", root) is None


def test_what_is_no_file_there_is_refused(root, tmp_path):
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to(root / "loop")
    for path in ("pipe", "users", "loop", "none", ".", "..", "users/ann/none/x", f"users/ann/{CONFIG_FILE}/x"):
        with pytest.raises(OSError, match=r"."):
            os.close(open_below(root / path, [root], os.O_RDONLY | os.O_NONBLOCK))
    with pytest.raises(OSError, match="leads out"):
        open_below(f"{root}s", [root], os.O_RDONLY)


class Swapped:
    """A name below the root, and a link that leads out in its place."""

    def __init__(self, root, tmp_path, place):
        self.place, self.kept, self.link = root / place, tmp_path / "kept", tmp_path / "link"
        depth = place.count("/")
        outside = tmp_path / "outside"
        self.link.symlink_to([outside, outside / "ann", outside / "ann" / CONFIG_FILE][depth])

    def out(self):
        os.rename(self.place, self.kept)
        os.rename(self.link, self.place)

    def back(self):
        os.rename(self.place, self.link)
        os.rename(self.kept, self.place)


PLACES = ("users", "users/ann", f"users/ann/{CONFIG_FILE}")


@pytest.mark.parametrize("place", PLACES)
def test_a_link_put_there_after_the_check_is_not_followed(root, tmp_path, place, monkeypatch):
    swapped, realpath = Swapped(root, tmp_path, place), os.path.realpath

    def then_swap(path):
        found = realpath(path)
        swapped.out()
        return found

    monkeypatch.setattr(confined.os.path, "realpath", then_swap)
    with pytest.raises(PermissionError, match="leads out of"):
        open_below(root / "users" / "ann" / CONFIG_FILE, [root], os.O_RDONLY)
    monkeypatch.undo()
    assert read(root / "users" / "ann") == b"outside", "without roots it would have been followed"


@pytest.mark.parametrize("times", [300, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", PLACES)
def test_links_that_are_swapped_all_the_time_lead_nowhere(root, tmp_path, place, times):
    swapped, done, swaps = Swapped(root, tmp_path, place), threading.Event(), []

    def swap():
        while not done.is_set():
            swapped.out()
            swapped.back()
            swaps.append(None)

    thread, interval = threading.Thread(target=swap), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        found = set()
        while times > 0 or len(swaps) < 30:
            found.add(read(root / "users" / "ann", root))
            times -= 1
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert b"outside" not in found
    assert read(root / "users" / "ann", root) == b"inside"
