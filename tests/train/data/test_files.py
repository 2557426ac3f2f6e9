"""Datasets: the same rows from every kind of file, folder and name, and what cannot be read named with its line."""

import bz2
import gzip
import json
import lzma
import sys
import types

import pytest

from train.data.errors import DataError
from train.data.files import open_rows

pytestmark = pytest.mark.host

ROWS = [{"prompt": "a, b", "completion": "c\nd"}, {"prompt": "é", "completion": "f"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'prompt,completion\n"a, b","c\nd"\né,f\n'


def read(dataset, **where):
    return [row for _, row in open_rows(dataset, **where).numbered]


def numbers(dataset):
    return [number for number, _ in open_rows(dataset).numbered]


@pytest.mark.parametrize(
    ("name", "data", "lines"),
    [
        ("rows.jsonl", LINES, [1, 2]),
        ("rows.ndjson", "\ufeff\n" + LINES, [2, 3]),
        ("rows", LINES, [1, 2]),
        ("rows.json", json.dumps(ROWS), [1, 1]),
        ("rows.json", json.dumps(ROWS, indent=1), [2, 6]),
        ("rows.jsonl", "\n[" + ",\n".join(map(json.dumps, ROWS)) + "]\n", [2, 3]),
        ("rows.csv", CSV, [2, 4]),
        ("rows.tsv", CSV.replace(",", "\t").replace("a\t", "a,"), [2, 4]),
        ("rows.jsonl.gz", gzip.compress(LINES.encode(), mtime=0), [1, 2]),
        ("rows.json.bz2", bz2.compress(json.dumps(ROWS).encode()), [1, 1]),
        ("rows.csv.xz", lzma.compress(CSV.encode()), [2, 4]),
    ],
)
def test_the_same_rows_come_from_every_kind_of_file_with_their_lines(name, data, lines, tmp_path):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    assert read(path) == ROWS
    assert numbers(str(path)) == lines
    assert open_rows(path).where(3) == f"{path}:3"


def test_cells_of_csv_are_json_where_the_column_needs_it_and_absent_where_they_are_empty(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('messages,id,completion\n"[{""role"": ""user"", ""content"": ""a""}]",,\n')
    assert read(path) == [{"messages": [{"role": "user", "content": "a"}], "completion": ""}]


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("rows.json", '{\n "prompt": "a"\n}\n', ":1: this is not JSON .* `jq -c . rows.json > rows.jsonl`"),
        ("rows.jsonl", '{"a": 1},\n{"a": 2}\n', ":1: this is not JSON .*; take away the comma"),
        ("rows.jsonl", "{bad\n", ":1: this is not JSON .*each line is one object$"),
        ("rows.json", '[\n{"a": 1},\n{"a": }]', ":3: this is not JSON"),
        ("rows.json", '[{"a": 1}\n{"a": 2}]', ":2: this is not JSON"),
        ("rows.json", '[{"a": 1},\n', ":2: this is not JSON"),
        ("rows.json", '[{"a": 1}] {}', ":1: this is not JSON"),
        ("rows.json", "[" * 100_000, ":1: this is not JSON"),
        ("rows.csv", "prompt,completion\na,b,c\n", ":2: has 3 cells and the header 2"),
        ("rows.csv", 'prompt,completion\na,"b\n', ":2: this is not CSV"),
        ("rows.csv", "messages\n[{'role': 'user'}]\n", ":2: 'messages' is not JSON .*to_json"),
        ("rows.jsonl.gz", LINES.encode(), " cannot be read: Not a gzipped file"),
        ("rows.jsonl.gz", gzip.compress(LINES.encode() * 99, mtime=0)[:-20], " cannot be read: "),
        ("rows.jsonl.xz", b"xyz" * 9, " cannot be read: "),
        ("rows.jsonl", b"\xff", " cannot be read: "),
        ("rows.xlsx", b"PK", ": files of .xlsx are not read; give JSONL"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(name, data, told, tmp_path):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(DataError, match=str(path) + told):
        read(path)


def test_a_file_has_no_splits(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(LINES)
    assert read(path, split="train", config="en") == read(path, default="test") == ROWS
    with pytest.raises(DataError, match=r"no splits, and 'test' is asked for; .* eval_dataset"):
        open_rows(path, split="test")


class Library(types.ModuleType):
    """HF ``datasets``, as far as it is called."""

    def __init__(self, found):
        super().__init__("datasets")
        self.found, self.calls = found, []

    def load_dataset(self, *args, **options):
        self.calls.append((args, options))
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


HUB = {"train": ROWS, "test": [{**ROWS[0], "id": None, "more": [{"x": None, "y": 1}]}]}


@pytest.mark.parametrize(
    ("where", "rows", "call"),
    [
        ({}, ROWS, {"name": None, "split": None}),
        ({"split": "test"}, [{**ROWS[0], "more": [{"y": 1}]}], {"name": None, "split": None}),
        ({"default": "test", "config": "en"}, [{**ROWS[0], "more": [{"y": 1}]}], {"name": "en", "split": None}),
    ],
)
def test_a_name_of_the_hub_is_loaded_with_its_split(where, rows, call, monkeypatch):
    library = Library(HUB)
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert read("owner/rows", **where) == rows
    assert library.calls == [(("owner/rows",), call)]
    assert open_rows("owner/rows").where(2) == "owner/rows (train), row 2"


def test_a_part_of_a_split_and_a_table_without_splits(monkeypatch):
    library = Library(ROWS)
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert read("rows", split="train[:2]") == ROWS
    assert library.calls[0][1]["split"] == "train[:2]"
    assert read("rows.parquet") == ROWS
    assert library.calls[1] == (("parquet",), {"data_files": "rows.parquet", "split": "train", "streaming": True})
    with pytest.raises(DataError, match="has the split 'train' alone"):
        read("rows", split="test")


@pytest.mark.parametrize(
    ("library", "split", "told"),
    [
        (None, None, r"owner/rows is no file or folder here, .* `pip install 'preft-jax\[datasets\]'`"),
        (Library(HUB), "trian", "no split 'trian' .did you mean 'train'.*; it has train, test; .*dataset_train_split"),
        (Library(ConnectionError("down\nmore")), None, "no such file .* cannot load it: ConnectionError: down$"),
        (Library({"train": (1 / 0 for _ in "a")}), None, r"owner/rows .train. cannot be read: ZeroDivisionError"),
    ],
)  # fmt: skip
def test_what_the_hub_does_not_give_is_said(library, split, told, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(DataError, match=told):
        read("owner/rows", split=split)


@pytest.mark.parametrize("name", ["data/rows.jsonl", "rows.csv", "data/rows.json.gz", "/none/rows"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=f"{name} cannot be read: .*No such file"):
        read(name)


@pytest.fixture
def library(tmp_path, monkeypatch):
    found = pytest.importorskip("datasets", reason="HF datasets is an extra: install preft-jax[datasets]")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return found


CHATS = [
    {
        "messages": [
            {"role": "user", "content": "a", "name": None},
            {"role": "assistant", "content": "b", "weight": 1},
        ],
        "tools": None,
    },
    {"messages": [{"role": "user", "content": "c"}], "tools": [{"type": "function", "function": {"name": "f"}}]},
]


def test_tables_give_the_rows_that_were_written_without_arrows_nulls(library, tmp_path):
    table = library.Dataset.from_list(CHATS)
    expected = json.loads(json.dumps(CHATS))
    del expected[0]["messages"][0]["name"], expected[0]["tools"]
    table.to_parquet(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == expected
    table.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == expected
    library.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "splits")
    assert read(tmp_path / "splits") == expected
    assert read(tmp_path / "splits", default="test") == expected[1:]
    with pytest.raises(DataError, match="no split 'validation'; it has train, test"):
        read(tmp_path / "splits", split="validation")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"broken\.parquet"):
        read(tmp_path / "broken.parquet")


def test_a_folder_of_data_files_has_their_splits(library, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text(LINES)
    (folder / "test.jsonl").write_text(LINES.splitlines()[1])
    assert read(folder) == ROWS
    assert read(folder, split="test") == ROWS[1:]
    assert read(folder, split="train[:1]") == ROWS[:1]
