"""Models in Hugging Face directories: ``config.json``, one or several safetensors files, and the tokenizer.

Only safetensors are read. A directory that has nothing but ``pytorch_model.bin`` is refused: such files are pickles,
which can run code.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from preft_jax.config import ModelConfig, config_from_hf, config_to_hf
from preft_jax.device.mesh import SINGLE, Placement
from preft_jax.errors import ConfigError, ModelError
from preft_jax.io.safetensors_io import TensorFile, open_safetensors
from preft_jax.io.weights import (
    Slot,
    build_params,
    check_tensors,
    fp8_slots,
    raise_differences,
    read_fp8,
    tensor_slots,
    tensors_of,
)
from preft_jax.models.linear import Quantized
from preft_jax.models.registry import family
from preft_jax.quantize import PLAIN, Quantization
from preft_jax.text.tokenizer import load_tokenizer

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_ROWS = 4096
"""Rows of two tensors that are compared at a time."""

_log = logging.getLogger("preft.models")

STORED_DTYPES = ("F32", "F16", "BF16")
"""Dtypes, as safetensors names them, that weights may be stored in."""

_FP8 = "F8_E4M3"
"""That of linears, where ``quantization_config`` says so."""


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model directory."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist; give a directory with config.json, safetensors and tokenizer files, as "
            "save_pretrained writes it"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); restore the file") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a JSON {type(content).__name__}, not an object; restore the file")
    return content


def read_config(directory: Path) -> ModelConfig:
    """Read ``config.json``, and the end-of-text tokens that ``generation_config.json`` adds to it.

    Raises:
        ModelError: if a file is missing or damaged.
        ConfigError: if the model is of a kind that is not supported.
    """
    path = directory / "config.json"
    content = _read_json(path)
    try:
        config = config_from_hf(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} holds a value of the wrong type ({error}); restore the file") from error
    generation = directory / "generation_config.json"
    if not generation.is_file():
        return config
    eos = _read_json(generation).get("eos_token_id")
    more = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in more):
        raise ModelError(f"{generation} has eos_token_id {eos!r}; an integer or a list of integers is expected")
    return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more))))


def _index_shards(directory: Path) -> dict[str, str]:
    """Return ``{tensor name: file name}`` of a model that is split over several files."""
    path = directory / INDEX_FILE
    shards = _read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{path} has no 'weight_map' of tensor names to file names; restore the file")
    for name in set(shards.values()):
        if Path(name).name != name:
            raise ModelError(
                f"{path} names the file {name!r}, which is not beside it; only plain file names are allowed"
            )
    return shards


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model directory, sorted by name.

    Raises:
        ModelError: if there are none, or one that the index names is missing.
    """
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    if (directory / INDEX_FILE).is_file():
        paths = [directory / name for name in sorted(set(_index_shards(directory).values()))]
        for path in paths:
            if not path.is_file():
                raise ModelError(f"{path}, which {INDEX_FILE} names, does not exist; get the missing file")
        return paths
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    advice = f"; {pickles[0]} is a pickle and is not read: save the model again as safetensors" if pickles else ""
    raise ModelError(f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{advice}")


def _ignored(name: str, config: ModelConfig) -> bool:
    """Return whether a tensor repeats what is known otherwise: rotary frequencies, or the head of a tied model."""
    head = family(config.model_type).hf_names["lm_head"]
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == head)


class _Shards:
    """The open weight files of a model directory."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack):
        self.directory = directory
        self.files: dict[str, Any] = {}
        self._stack = stack
        self._paths: dict[str, Path] = {}
        self._opened: dict[Path, TensorFile] = {}
        for path in weight_files(directory):
            try:
                file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            except (OSError, safetensors.SafetensorError) as error:
                raise ModelError(f"{path} is not a whole safetensors file ({error}); get the file again") from error
            for name in file.keys():  # noqa: SIM118
                if name in self.files:
                    raise ModelError(f"{directory} holds the tensor {name!r} in two files; keep one of them")
                self.files[name] = file
                self._paths[name] = path

    def in_fp8(self, slots: Mapping[str, Slot]) -> list[str]:
        """Return the names of linears that are stored in FP8."""
        names = (name for name, slot in slots.items() if slot.transposed and name in self.files)
        return [name for name in names if self.files[name].get_slice(name).get_dtype() == _FP8]

    def shapes(self, config: ModelConfig, in_fp8: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that are weights, after checking their dtypes."""
        shapes, wrong = {}, []
        for name, file in self.files.items():
            if _ignored(name, config):
                continue
            entry = file.get_slice(name)
            shapes[name] = tuple(entry.get_shape())
            if entry.get_dtype() not in STORED_DTYPES and name not in in_fp8:
                wrong.append(f"dtype of {name}: {entry.get_dtype()}")
        allowed = f"allowed dtypes: {', '.join(STORED_DTYPES)}; save the model in one of them"
        raise_differences(str(self.directory), wrong, allowed)
        return shapes

    def differ(self, one: str, other: str) -> bool:
        """Return whether two matrices differ in shape, in a value, or in what may be stored; no whole one is read."""
        entries = [self.files[name].get_slice(name) for name in (one, other)]
        a, b = entries
        if (
            a.get_shape() != b.get_shape()
            or len(a.get_shape()) != 2
            or any(entry.get_dtype() not in STORED_DTYPES for entry in entries)
        ):
            return True
        count = a.get_shape()[0]
        parts = [(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS)]
        return not all(np.array_equal(*(e[i:j].astype(np.float32) for e in entries)) for i, j in parts)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in the dtype it is stored in."""
        if self.files[name].get_slice(name).get_dtype() != _FP8:
            return self.files[name].get_tensor(name)
        path = self._paths[name]  # The package has no FP8 in NumPy.
        if path not in self._opened:
            opened = open_safetensors(path, error=ModelError, advice="get the file again", max_header_bytes=2**27)
            self._opened[path] = self._stack.enter_context(opened)
        return self._opened[path].read_one(name)


def _tied_as_stored(config: ModelConfig, shards: _Shards, names: Mapping[str, str]) -> ModelConfig:
    """Return the config without tied embeddings if the weights have a head that is not the embedding."""
    both = names["embed"], names["lm_head"]
    if not config.tie_word_embeddings or not shards.files.keys() >= set(both) or not shards.differ(*both):
        return config
    _log.warning(
        "%s says tie_word_embeddings, but %s differs from %s: it is used, as in transformers 5; write "
        "tie_word_embeddings false to silence this, or remove the tensor to tie them",
        shards.directory / "config.json", both[1], both[0],
    )  # fmt: skip
    return dataclasses.replace(config, tie_word_embeddings=False)


def load_hf_model(
    directory: Path, dtype: Any, quantization: Quantization = PLAIN, placement: Placement = SINGLE
) -> tuple[ModelConfig, dict[str, Any], Any]:
    """Load ``(config, params, tokenizer)`` from a Hugging Face model directory, parameters in ``dtype``.

    Weights may be stored in float32, float16 or bfloat16; linears in FP8, where the config says so, and they stay in it
    (``models/compressed.py`` says which checkpoints). The tokenizer is ``None`` if the directory has no tokenizer.
    ``quantization`` is what becomes of the others, one after the other as they are read, ``placement`` where they go.

    Raises:
        ModelError: if a file is missing or damaged, or the tensors are not those of the config; with the differences.
        ConfigError: if the model is of a kind that is not supported.
    """
    config = read_config(directory)
    names = family(config.model_type).hf_names
    tokenizer = load_tokenizer(directory)
    with contextlib.ExitStack() as stack:
        shards = _Shards(directory, stack)
        config = _tied_as_stored(config, shards, names)
        slots = tensor_slots(config, names)
        in_fp8 = shards.in_fp8(slots) if _read_json(directory / "config.json").get("quantization_config") else ()
        found = shards.shapes(config, in_fp8)
        check_tensors({**slots, **fp8_slots(slots, in_fp8, found)}, found, str(directory))

        def read(name: str) -> np.ndarray | Quantized:
            return read_fp8(shards.read, name) if name in in_fp8 else shards.read(name)

        return config, build_params(config, slots, read, dtype, quantization, placement), tokenizer


def save_hf_model(
    path: str | os.PathLike[str], config: ModelConfig, params: Mapping[str, Any], tokenizer: Any = None
) -> None:
    """Write a model as a Hugging Face directory: ``config.json``, ``model.safetensors`` and tokenizer files.

    The directory appears whole, by a rename, or not at all.

    Args:
        path: the directory, which must not exist, or be empty.
        config: shape of the model.
        params: the parameter tree; stored in the dtype it has.
        tokenizer: a transformers tokenizer, or ``None``.

    Raises:
        ModelError: if the directory is not empty or cannot be written.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists already; give a directory that does not exist or is empty")
    names = family(config.model_type).hf_names
    tensors = tensors_of(params, tensor_slots(config, names))
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        dtype = str(tensors[names["embed"]].dtype)
        (temporary / "config.json").write_text(json.dumps(config_to_hf(config, dtype), indent=2, sort_keys=True) + "\n")
        safetensors.numpy.save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        os.replace(temporary, target)
    except OSError as error:
        raise ModelError(f"cannot write the model to {target}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
