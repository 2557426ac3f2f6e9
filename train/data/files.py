"""Where rows come from: files of JSON lines, JSON arrays and CSV, compressed or not, read by Python alone; tables.

Tables (parquet, Arrow, folders of ``save_to_disk``, folders of data files, datasets of the Hub) are read with HF
``datasets``, see ``train.data.tables``. Every row has a number, by which errors name it: of a text file its line.
"""

import bz2
import csv
import dataclasses
import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from train.data.errors import DataError
from train.data.tables import TABLES, open_table

_OPENERS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

_DELIMITERS = {".csv": ",", ".tsv": "\t"}

_OTHERS = (".zip", ".zst", ".tar", ".xlsx", ".xls", ".pkl", ".pickle", ".pt", ".bin", ".db", ".txt", ".yaml", ".yml")

_FILES = (*_OPENERS, *_DELIMITERS, *_OTHERS, ".jsonl", ".json", ".ndjson")[1:]
"""Suffixes of what is a file and no name of the Hub, also where it is not there."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*|[A-Za-z0-9][\w-]*")

_JSON_COLUMNS = ("messages", "conversations", "conversation", "tools", "functions")
"""Columns whose cells in a CSV file are JSON."""

_ANSWERS = ("completion", "output", "response")
"""Columns whose cells in a CSV file are texts also where they are empty; other cells that are empty are absent."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a dataset, to be read once.

    Attributes:
        name: of the dataset, for people.
        numbered: number and content of each row.
        by_line: whether numbers are lines of a file; otherwise they count rows from 1.
    """

    name: str
    numbered: Generator[tuple[int, Any]]
    by_line: bool

    def where(self, number: int) -> str:
        """Return how an error names a row."""
        return f"{self.name}:{number}" if self.by_line else f"{self.name}, row {number}"


def open_rows(
    dataset: str | Path, *, split: str | None = None, default: str = "train", config: str | None = None
) -> Rows:
    """Return the rows of a dataset.

    Args:
        dataset: a file, a folder, or a dataset's name on the Hub.
        split: of a dataset that has several; ``train[:100]`` and so on are allowed where HF ``datasets`` allows them.
        default: the split that is meant where ``split`` is None.
        config: the configuration of a dataset that has several; files have none.

    Raises:
        DataError: if there is no such dataset or split, or what reads it is not installed; while rows are read, for one
            that cannot be.
    """
    path = Path(dataset)
    on_hub = not path.exists() and path.suffix not in _FILES and _HUB_ID.fullmatch(str(dataset))
    if path.is_dir() or path.suffix in TABLES or on_hub:
        name, rows = open_table(str(dataset), split=split, default=default, config=config)
        return Rows(name, rows, by_line=False)
    if split not in (None, "train"):
        raise DataError(
            f"{path} is a file, which has no splits, and {split!r} is asked for; give its rows as a file of their own, "
            "as eval_dataset if they are held out"
        )
    return Rows(str(path), _of_file(path), by_line=True)


def _of_file(path: Path) -> Generator[tuple[int, Any]]:
    compressed = path.suffix if path.suffix in _OPENERS else ""
    kind = (path.with_suffix("") if compressed else path).suffix
    if kind in _OTHERS:
        raise DataError(f"{path}: files of {kind} are not read; give JSONL, JSON, CSV or parquet (JSONL may be .gz)")
    try:
        with _OPENERS[compressed](
            path, "rt", encoding="utf-8-sig", newline="" if kind in _DELIMITERS else None
        ) as file:
            if kind in _DELIMITERS:
                yield from _of_csv(path, file, _DELIMITERS[kind])
            else:
                yield from _of_json(path, file)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; give a JSONL file in UTF-8") from error


def _of_json(path: Path, file: Any) -> Iterator[tuple[int, Any]]:
    """Yield the values of JSON lines, or those of one array, which the first character tells."""
    number, first = next(((number, line) for number, line in enumerate(file, 1) if line.strip()), (0, ""))
    if first.lstrip().startswith("["):
        yield from _of_array(path, number, first + file.read())
    elif first:
        yield number, _parsed(path, number, first)
        for following, line in enumerate(file, number + 1):
            if line.strip():
                yield following, _parsed(path, following, line)


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}:{number}: this is not JSON ({error}); each line is one object{_advice(path, line.rstrip())}"
        ) from error


def _advice(path: Path, line: str) -> str:
    """Return how a file becomes one of JSON lines, as far as a line of it tells."""
    if line.endswith(("{", "[")):
        return f"; of objects over several lines `jq -c . {path.name} > rows.jsonl` makes such"
    if line.endswith("},"):
        return "; take away the comma behind it, or make the file an array"
    return ""


def _of_array(path: Path, number: int, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the values of an array, each with the line on which it begins."""
    decoder, at, counted = json.JSONDecoder(), text.index("[") + 1, 0
    blank = re.compile(r"\s*")

    def line() -> int:
        nonlocal number, counted
        number, counted = number + text.count("\n", counted, at), at
        return number

    def skip() -> str:
        nonlocal at
        match = blank.match(text, at)
        at = match.end() if match else at
        return text[at : at + 1]

    if skip() == "]":
        return
    while True:
        skip()
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line()}: this is not JSON ({error}); the file is an array of objects") from error
        yield line(), value
        at = end
        after = skip()
        at += 1
        if after != ",":
            break
    if after != "]" or skip():
        raise DataError(f"{path}:{line()}: this is not JSON; behind a row of the array stands neither ',' nor its end")


def _of_csv(path: Path, file: Any, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a CSV file under its header, each with the line on which it begins."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    last = 0
    try:
        for cells in reader:
            number, last = last + 1, reader.line_num
            if not cells:
                continue
            if header is None:
                header = cells
                continue
            if len(cells) != len(header):
                raise DataError(f"{path}:{number}: has {len(cells)} cells and the header {len(header)}; quote commas")
            pairs = zip(header, cells, strict=True)
            yield number, {name: _cell(path, number, name, cell) for name, cell in pairs if cell or name in _ANSWERS}
    except csv.Error as error:
        raise DataError(f"{path}:{last + 1}: this is not CSV ({error})") from error


def _cell(path: Path, number: int, name: str, cell: str) -> Any:
    if name not in _JSON_COLUMNS:
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}:{number}: {name!r} is not JSON ({error}), as it is in CSV; give JSONL instead, such as pandas' "
            "to_json(orient='records', lines=True) writes"
        ) from error
