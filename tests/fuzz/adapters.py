"""Mutated adapter directories: each one loads whole, or is an ``AdapterError``. ``python -m tests.fuzz.adapters``."""

import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import tracemalloc
import warnings
from pathlib import Path

import jax
import numpy as np

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

from adapter_dirs import CONFIG, FIXTURES, MODEL, TENSORS
from fuzz import program
from fuzz.mutate import change_bytes, change_tree, dump

from preft_jax.adapters.adapter import check_fits
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.init import random_adapter
from preft_jax.errors import AdapterError
from preft_jax.io.adapter_files import load_adapter, read_adapter, save_adapter
from preft_jax.io.file_pair import pending_name

KINDS = {
    "lora": AdapterConfig(rank=4, alpha=6),
    "pattern": AdapterConfig(
        rank=2, layers=(0, 2), targets=("q", "down"), rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 9.0}
    ),
    "direft": AdapterConfig(kind="direft", rank=3, positions="f3+l2"),
    "loreft": AdapterConfig(kind="loreft", rank=3, positions="f3+l2", share_weights=False),
    "all": AdapterConfig(kind="loreft", rank=2, positions="all", layers=(1,)),
}
PENDING = "pending tensors"
MOST_MEMORY = 2**26
"""Bytes that Python may hold at most while one directory is read; a valid one takes a hundredth."""


class Adapters:
    """Draws mutated directories and looks at what becomes of them."""

    def __init__(self, root, seed):
        self.rng = random.Random(seed)
        self.ends = collections.Counter()
        self._directory = root / "mutated"
        self._files = []
        for number, (name, config) in enumerate(KINDS.items()):
            save_adapter(root / name, random_adapter(config, MODEL, jax.random.key(number)))
            self._files.append(self._contents(root / name))
        self._files += [self._contents(path) for path in sorted(FIXTURES.iterdir()) if (path / TENSORS).exists()]
        self._digests = {}

    def step(self):
        """Draw one directory, load it and judge the end."""
        self._write()
        tracemalloc.start()
        try:
            end = self._load()
        finally:
            memory = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert memory < MOST_MEMORY, f"reading took {memory} bytes"
        self.ends[end] += 1

    def _contents(self, path):
        return {name: (path / name).read_bytes() for name in (CONFIG, TENSORS)}

    def _write(self):
        rng, files = self.rng, dict(self.rng.choice(self._files))
        for _ in range(rng.choice((1, 1, 1, 2))):
            change = rng.choice(
                (self._config, self._config, self._header, self._header, self._bytes, self._swap, self._values)
            )
            change(files)
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir()
        if PENDING in files:
            replaced = "" if files[TENSORS] is None else hashlib.sha256(files[TENSORS]).hexdigest()
            files[pending_name(files[CONFIG] or b"", replaced)] = files.pop(PENDING)
        for name, data in files.items():
            if data is not None:
                (self._directory / name).write_bytes(data)
        if rng.random() < 0.03:
            self._strange(rng.choice((CONFIG, TENSORS)))

    def _config(self, files):
        try:
            contents = json.loads(files[CONFIG])
        except (ValueError, TypeError, RecursionError):
            return
        files[CONFIG] = dump(change_tree(contents, self.rng), self.rng).encode()

    def _split(self, files):
        data = files[TENSORS] or b""
        length = int.from_bytes(data[:8], "little")
        try:
            return json.loads(data[8 : 8 + length]), data[8 + length :]
        except (ValueError, RecursionError):
            return None, b""

    def _header(self, files):
        header, body = self._split(files)
        if header is not None:
            raw = dump(change_tree(header, self.rng), self.rng).encode()
            length = self.rng.choice((len(raw),) * 9 + (0, 2**40, 2**63))
            files[TENSORS] = length.to_bytes(8, "little") + raw + body

    def _bytes(self, files):
        name = self.rng.choice((CONFIG, TENSORS))
        if files[name]:
            header = 2000 if name == TENSORS and self.rng.random() < 0.7 else None
            files[name] = change_bytes(files[name], self.rng, header)

    def _values(self, files):
        """Overwrite a number among the tensors."""
        header, body = self._split(files)
        if header is not None and len(body) > 8:
            at = 4 * self.rng.randrange(len(body) // 4)
            bad = self.rng.choice((np.nan, np.inf, -np.inf, 3e38, 1e-45, -0.0))
            start = len(files[TENSORS]) - len(body) + at
            files[TENSORS] = files[TENSORS][:start] + np.float32(bad).tobytes() + files[TENSORS][start + 4 :]

    def _swap(self, files):
        rng, other = self.rng, self.rng.choice(self._files)
        action = rng.randrange(6)
        if action <= 1:
            files[rng.choice((CONFIG, TENSORS))] = other[rng.choice((CONFIG, TENSORS))]
        elif action == 2:
            files[rng.choice((CONFIG, TENSORS))] = None
        elif action == 3:
            files[PENDING] = other[TENSORS]
        elif action == 4:
            files["adapter_model.bin"], files[TENSORS] = files[TENSORS], None
        else:
            files[TENSORS] = (files[TENSORS] or b"") + b"\0" * rng.randrange(100)

    def _strange(self, name):
        target = self._directory / name
        target.unlink(missing_ok=True)
        action = self.rng.randrange(4)
        if action == 0:
            os.mkfifo(target)
        elif action == 1:
            target.symlink_to("/dev/zero")
        elif action == 2:
            target.mkdir()
        else:
            target.write_bytes(b"{")
            os.truncate(target, 2**41)

    def _load(self):
        try:
            adapter = load_adapter(self._directory, MODEL)
        except AdapterError as error:
            message = str(error)
            assert len(message) < 8000, "an endless message"
            assert message.isprintable(), f"control characters in a message: {message!r}"
            self._read_alone()
            return "refused"
        check_fits(adapter, MODEL)
        leaves = jax.tree.leaves(adapter.params)
        assert all(leaf.dtype == np.float32 and np.isfinite(leaf).all() for leaf in leaves)
        again = load_adapter(self._directory, MODEL)
        assert again.digest == adapter.digest, "the same bytes have two digests"
        self._read_alone()
        return "loaded"

    def _read_alone(self):
        with contextlib.suppress(AdapterError):
            read_adapter(self._directory)


def open_files():
    """Return how many files this process has open, 0 where the system does not say."""
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0


def run(root, *, seed, until):
    """Mutate until ``until(number)`` says stop; returns what became of the directories."""
    fuzzer, number = Adapters(root, seed), 0
    before = open_files()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while not until(number):
            try:
                fuzzer.step()
            except BaseException as error:
                error.add_note(f"seed {seed}, directory {number}, kept in {root / 'mutated'}")
                raise
            number += 1
    assert open_files() == before, "files stay open"
    return fuzzer.ends


if __name__ == "__main__":
    program.main(
        "adapters", __doc__, "directories", lambda seed, until: run(Path(tempfile.mkdtemp()), seed=seed, until=until)
    )
