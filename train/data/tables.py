"""Datasets that HF ``datasets`` reads: parquet, Arrow, folders, and those of the Hub. The package is an extra."""

import importlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

from preft_jax.errors import did_you_mean
from preft_jax.text.messages import without_nulls
from train.data.errors import DataError

TABLES = {".parquet": "parquet", ".arrow": "arrow"}
"""Suffix of a table's file -> what HF ``datasets`` calls it."""

_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
"""What ``save_to_disk`` leaves in the folder of a dataset, and in one of several splits."""


def open_table(
    dataset: str, *, split: str | None, default: str, config: str | None
) -> tuple[str, Generator[tuple[int, dict[str, Any]]]]:
    """Return what a table is called for people, and its numbered rows; see ``files.open_rows``.

    Objects in Arrow's tables have the fields of all rows; so entries of null are left out, at every depth.

    Raises:
        DataError: see there.
    """
    library = _library(dataset)
    try:
        found = _open(library, Path(dataset), dataset, split, config)
    except Exception as error:
        where = "" if Path(dataset).exists() else "there is no such file or folder here, and "
        raise DataError(f"{dataset}: {where}HF datasets cannot load it: {_first_line(error)}") from error
    if not hasattr(found, "keys"):
        own = str(getattr(found, "split", None) or "train")
        if split is not None and split not in (own, "train") and "[" not in split and "+" not in split:
            raise DataError(f"{dataset} has the split {own!r} alone, and {split!r} is asked for; leave the split out")
        return dataset, _rows(dataset, found)
    splits = list(found.keys())
    chosen = split or (default if default in splits or len(splits) > 1 else splits[0])
    if chosen not in splits:
        raise DataError(
            f"{dataset} has no split {chosen!r}{did_you_mean(chosen, splits)}; it has {', '.join(splits)}; name "
            f"one with {'dataset_train_split' if default == 'train' else 'dataset_test_split'}"
        )
    name = f"{dataset} ({chosen})"
    return name, _rows(name, found[chosen])


def _library(dataset: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        what = "is no file of JSON or CSV" if Path(dataset).exists() else "is no file or folder here"
        raise DataError(
            f"{dataset} {what}, and other datasets are read with HF datasets, which is not installed; install it with "
            "`pip install 'preft-jax[datasets]'`, or give JSONL"
        ) from error


def _open(library: Any, path: Path, dataset: str, split: str | None, config: str | None) -> Any:
    if path.suffix in TABLES and not path.is_dir():
        # Streamed, which makes no copy of the file in a cache.
        return library.load_dataset(TABLES[path.suffix], data_files=dataset, split="train", streaming=True)
    if (path / _SAVED).is_file() or (path / _SAVED_SPLITS).is_file():
        return library.load_from_disk(dataset)
    part = split if split is not None and ("[" in split or "+" in split) else None
    return library.load_dataset(dataset, name=config, split=part)


def _rows(name: str, found: Any) -> Generator[tuple[int, dict[str, Any]]]:
    try:
        for number, row in enumerate(found, 1):
            yield number, without_nulls(row)
    except Exception as error:
        raise DataError(f"{name} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
