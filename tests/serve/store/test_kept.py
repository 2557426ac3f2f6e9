"""What is kept on disk of adapters, damaged in every way: noticed, made again where it can be, and told of."""

import logging
import random
import shutil
import sqlite3

import jax
import numpy as np
import pytest
from tensor_files import read_safetensors

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig, adapter_shapes
from preft_jax.config import PRESETS
from preft_jax.errors import AdapterError, ConfigError
from preft_jax.io.adapter_files import save_adapter
from preft_jax.io.safetensors_io import serialize_safetensors
from preft_jax.loading import Model
from serve.store.files import AdapterFiles
from serve.store.host import AdapterStore
from serve.store.names import Registry

CONFIG = PRESETS["tiny"]
KINDS = {
    "linears": AdapterConfig(rank=4),
    "some": AdapterConfig(rank=20, targets=("q", "down"), layers=(1,)),
    "direft": AdapterConfig(kind="direft", rank=2, orthonormal=False),
}


@pytest.fixture(scope="module")
def model():
    return Model(CONFIG, {"embed": np.zeros((1, 1), np.float32)}, None, "0" * 64)


def adapter(config, seed):
    rng = np.random.default_rng(seed)
    shapes = adapter_shapes(config, CONFIG)
    params = jax.tree.map(
        lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    return Adapter(config, params)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two adapters of each kind, as directories, by name."""
    root = tmp_path_factory.mktemp("sources")
    for seed, (name, config) in enumerate(KINDS.items()):
        for which in (0, 1):
            save_adapter(root / f"{name}{which}", adapter(config, 10 * seed + which))
    return root


def flip(data, rng):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def zero(data, rng):
    size = rng.choice((1, 16, 512, 4096))
    start = rng.randrange(max(1, len(data) - size))
    data[start : start + size] = bytes(len(data[start : start + size]))


def cut(data, rng):
    del data[rng.randrange(len(data)) :]


def letter(data, rng):
    """Change a letter of the header, which may leave it valid JSON."""
    end = 8 + int.from_bytes(data[:8], "little")
    data[rng.randrange(8, end)] = rng.choice(b"abcxyz0123456789")


def swap_halves(data, rng):
    middle = len(data) // 2
    data[:] = data[middle:] + data[:middle]


WAYS = (flip, zero, cut, letter, swap_halves)


def same(found, expected):
    assert found.sites == expected.sites
    assert found.slabs.keys() == expected.slabs.keys()
    for site, slabs in expected.slabs.items():
        for a, b in zip(found.slabs[site], slabs, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_rank_pages_are_always_noticed_and_made_again(kind, model, sources, tmp_path, caplog):
    files = AdapterFiles(model, tmp_path)
    source = str(sources / f"{kind}0")
    read = files.read(source)
    files.keep(read.digest, read.known)
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    same(files.load("", read.digest), read.known)
    rng, damaged = random.Random(kind), 0
    while damaged < 334:
        data = bytearray(whole)
        rng.choice(WAYS)(data, rng)
        if data == whole:
            continue
        damaged += 1
        kept.write_bytes(data)
        caplog.clear()
        if damaged % 8 == 1:
            same(files.load(source, read.digest), read.known)
            assert kept.read_bytes() == whole
        else:
            with pytest.raises(AdapterError, match="publish it again"):
                files.load("", read.digest)
            assert not kept.exists()
        (record,) = caplog.records
        assert record.getMessage() == "kept rank pages are damaged"


def test_other_files_in_place_of_rank_pages_are_noticed(model, sources, tmp_path, caplog):
    files, dtype16 = AdapterFiles(model, tmp_path), AdapterFiles(model, tmp_path / "16", dtype=np.float16)
    source = str(sources / "some0")
    read, other = files.read(source), files.read(str(sources / "some1"))
    half = dtype16.read(source)
    for store, one in ((files, read), (files, other), (dtype16, half)):
        store.keep(one.digest, one.known)
    kept, others = tmp_path / f"{read.digest}.float32", tmp_path / f"{other.digest}.float32"
    kept, others = (next(tmp_path.glob(path.name + "*")) for path in (kept, others))
    tensors = read_safetensors(kept, error=AdapterError, advice="")
    fakes = [
        others.read_bytes(), next((tmp_path / "16").glob("*.pages")).read_bytes(), b"", serialize_safetensors({}),
        serialize_safetensors(tensors), serialize_safetensors(tensors, {"crc32": "00000000"}),
        (sources / "some0" / "adapter_model.safetensors").read_bytes(),
    ]  # fmt: skip
    for number, fake in enumerate(fakes, 1):
        kept.write_bytes(fake)
        same(files.load(source, read.digest), read.known)
        assert len(caplog.records) == number


def test_rank_pages_that_no_engine_could_copy_are_refused_though_their_checksum_is_right(model, sources, tmp_path):
    files = AdapterFiles(model, tmp_path)
    read = files.read(str(sources / "some0"))
    slab = read.known.slabs["q"][0]
    for slabs in (
        {"x": [slab]}, {"q": [slab[:1]]}, {"q": [slab[:, :-1]]}, {"q": [slab.astype(np.float16)]}, {"linears": [slab]},
        {"down": [slab]}, {},
    ):  # fmt: skip
        sites = {site: read.known.sites["q"]._replace(groups=(0,) * len(some)) for site, some in slabs.items()}
        sites["q"] = read.known.sites["q"]._replace(groups=(0,))
        files.drop(read.digest)
        files.keep(read.digest, read.known._replace(sites=sites, slabs=slabs))
        with pytest.raises(AdapterError, match="no longer kept") as raised:
            files.load("", read.digest)
        assert "holds" in str(raised.value.__cause__)


def registered(model, sources, path, **options):
    """A registry of all sources, each with an owner, and its rows."""
    store = AdapterStore(AdapterFiles(model), Registry(path), host_bytes=10**8)
    for source in sorted(sources.iterdir()):
        store.register(source.name, source, owner=f"owner-of-{source.name}", pinned=source.name == "direft0", **options)
    store.register("gone", sources / "some1", owner="owner-of-gone")
    store.unregister("gone", keep_owner=True)
    rows = store.list()
    store.close()
    return {row.name: row for row in rows}


COLUMNS = {
    "path": "/elsewhere", "digest": "f" * 64, "config": '{"kind": "lora", "positions": "all"}', "num_bytes": 3,
    "owner": "somebody", "pinned": 1, "created": 5.0, "name": "other", "asked": "0" * 64, "whole": "0" * 64,
}  # fmt: skip


@pytest.mark.parametrize("column", COLUMNS)
def test_a_row_that_changed_is_read_again_or_stands_for_nothing(column, model, sources, tmp_path, caplog):
    path = tmp_path / "r.sqlite"
    before = registered(model, sources, path)
    with sqlite3.connect(path) as file:
        file.execute(f"UPDATE adapters SET {column} = ? WHERE name = 'some0'", (COLUMNS[column],))
    file.close()
    store = AdapterStore(AdapterFiles(model), Registry(path), host_bytes=10**8)
    found = {row.name: row for row in store.list()}
    texts = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    if column in ("digest", "config", "num_bytes", "whole"):
        assert found.pop("some0").digest == before["some0"].digest
        assert "the row of a registered adapter is damaged: it was read again" in texts
        assert store.get("some0").owner == "owner-of-some0"
    else:
        assert "the row of a registered adapter is damaged" in texts
        # A watched directory that brings it again must not make it everybody's, nor another's.
        assert store.register("other" if column == "name" else "some0", sources / "some0").owner == "\0"
    before.pop("some0")
    assert found == before
    assert Registry(path).owner("gone") == "owner-of-gone"
    store.close()
    assert set(before) <= {row.name for row in Registry(path).list()}


@pytest.mark.parametrize("change", ["owner = 'somebody'", "whole = 'x'", "name = 'other'"])
def test_a_name_whose_owner_is_not_known_any_more_is_the_admins(change, model, sources, tmp_path, caplog):
    registered(model, sources, tmp_path / "r.sqlite")
    file = sqlite3.connect(tmp_path / "r.sqlite")
    file.execute(f"UPDATE owners SET {change}")
    file.commit()
    file.close()
    registry = Registry(tmp_path / "r.sqlite")
    assert registry.owner("other" if "name" in change else "gone") == "\0"
    assert "the owner of a name is not known any more" in caplog.text
    registry.close()


def test_a_row_that_is_gone_or_came_from_elsewhere_is_noticed(model, sources, tmp_path, caplog):
    path = tmp_path / "r.sqlite"
    before = registered(model, sources, path)
    shutil.copy(path, tmp_path / "old.sqlite")
    store = AdapterStore(AdapterFiles(model), Registry(path), host_bytes=10**8)
    store.register("some0", sources / "some1", replace=True, owner="new")
    store.close()
    changes = (
        "DELETE FROM adapters WHERE name = 'some0'",
        f"ATTACH '{tmp_path}/old.sqlite' AS old",
        "INSERT OR REPLACE INTO adapters SELECT * FROM old.adapters WHERE name = 'some0'",
        "DELETE FROM checksums",
        "DELETE FROM owners",
    )
    for change in (changes[:1], changes[1:3], changes[3:4], changes[4:]):
        copy = shutil.copy(path, tmp_path / "copy.sqlite")
        file = sqlite3.connect(copy)
        for statement in change:
            file.execute(statement)
            file.commit()
        file.close()
        caplog.clear()
        assert {row.name for row in Registry(copy).list()} >= set(before) - {"some0"}
        assert "has not the rows that were written to it" in caplog.text


def test_a_damaged_registry_never_says_something_else_in_silence(model, sources, tmp_path, caplog):
    """Bits flipped, blocks zeroed, pages swapped: every name stands for what it did, or that it does not is said."""
    path = tmp_path / "r.sqlite"
    before = list(registered(model, sources, path).values())
    whole, copy = path.read_bytes(), tmp_path / "copy.sqlite"
    rng = random.Random(0)

    def swap_pages(data, rng):
        a, b = (4096 * rng.randrange(len(data) // 4096) for _ in range(2))
        data[a : a + 4096], data[b : b + 4096] = data[b : b + 4096], data[a : a + 4096]

    refused = said = aside = 0
    for number in range(160):
        data = bytearray(whole)
        (flip, zero, cut, swap_pages)[number % 4](data, rng)
        copy.write_bytes(data)
        caplog.clear()
        try:
            registry = Registry(copy)
        except ConfigError:
            refused += 1
            continue
        for row in registry.list():
            assert row in before
        assert registry.owner("gone") in ("owner-of-gone", "\0") or caplog.records
        if registry.list() != before:
            assert caplog.records or registry.damaged
            said += 1
        registry.close()
        aside += (tmp_path / "copy.sqlite.damaged").exists()
        for left in tmp_path.glob("copy.sqlite*"):
            left.unlink()
    assert refused > 10
    assert said > 10
    assert aside > 3


def test_the_registrys_log_holds_nothing_that_the_file_has_not(model, sources, tmp_path):
    """A process that is killed leaves a log; a damaged one is taken for one that was not finished."""
    path = tmp_path / "r.sqlite"
    store = AdapterStore(AdapterFiles(model), Registry(path), host_bytes=10**8)
    store.register("a", sources / "some0")
    store.register("b", sources / "some1")
    shutil.copy(path, tmp_path / "killed.sqlite")
    assert [row.name for row in Registry(tmp_path / "killed.sqlite").list()] == ["a", "b"]
    store.close()
