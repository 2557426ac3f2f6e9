"""Compare committed fixtures with ones made again: ``python tests/oracle/compare.py COMMITTED REMADE``.

Arrays must agree within the tolerances below, which allow for another processor's order of summation; greedy
continuations must agree up to a token whose margin is below ``MARGIN``; everything else must be equal. Exit status 1 if
anything differs.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch

RTOL, ATOL = 1e-4, 2e-3
"""Of float arrays and JSON numbers: float32 logits of 30 layers differ by about 2e-4 between implementations."""
MARGIN = 1e-2
"""Greedy tokens may differ from where the best two logits were closer than this."""
BF16_FACTOR = 2.0
"""Rounding errors of bfloat16 depend on the processor's kernels: their maximum may differ by this factor."""
IGNORED_KEYS = ("transformers_version", "peft_version", "torch_version")
IGNORED_FILES = ("README.md", ".preft-sha256.json")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an npz or safetensors file, bfloat16 as float32."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict(arrays)
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in safetensors.torch.load_file(path).items()
    }


def differing_arrays(committed: Path, remade: Path) -> Iterator[str]:
    """Yield what differs between two files of arrays."""
    old, new = read_arrays(committed), read_arrays(remade)
    if old.keys() != new.keys():
        yield f"names {sorted(old.keys() ^ new.keys())} are in one file only"
    for name in old.keys() & new.keys():
        a, b = old[name], new[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            yield f"{name}: {a.dtype}{list(a.shape)} against {b.dtype}{list(b.shape)}"
        elif "bf16" in name and "error" in name:
            if not 1 / BF16_FACTOR <= float(b) / float(a) <= BF16_FACTOR:
                yield f"{name}: {float(a):.3g} against {float(b):.3g}"
        elif np.issubdtype(a.dtype, np.floating):
            if not np.allclose(a, b, rtol=RTOL, atol=ATOL, equal_nan=True):
                yield f"{name}: largest difference {np.abs(a - b).max():.3g}"
        elif not np.array_equal(a, b):
            yield f"{name}: {int((a != b).sum())} of {a.size} values differ"


def differing_json(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Yield where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        if "margins" in old and "margins" in new:
            yield from differing_continuation(old, new, where)
            return
        for key in sorted((old.keys() | new.keys()) - set(IGNORED_KEYS)):
            yield from differing_json(old.get(key), new.get(key), f"{where}/{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differing_json(a, b, f"{where}/{index}")
    elif isinstance(old, float) and isinstance(new, int | float):
        if not math.isclose(old, new, rel_tol=RTOL, abs_tol=ATOL):
            yield f"{where}: {old} against {new}"
    elif old != new:
        yield f"{where}: {old!r} against {new!r}"


def differing_continuation(old: dict[str, Any], new: dict[str, Any], where: str) -> Iterator[str]:
    """Yield the first token that differs though its margin leaves no doubt."""
    for index, (a, b) in enumerate(zip(old["token_ids"], new["token_ids"], strict=False)):
        if a != b:
            margin = old["margins"][index]
            if margin >= MARGIN:
                yield f"{where}: token {index} is {b}, not {a}, at a margin of {margin}"
            return
    if len(old["token_ids"]) != len(new["token_ids"]):
        yield f"{where}: {len(new['token_ids'])} tokens, not {len(old['token_ids'])}"


def differing_files(committed: Path, remade: Path) -> Iterator[str]:
    """Yield what differs between two files of the same name."""
    if committed.suffix in (".npz", ".safetensors"):
        yield from differing_arrays(committed, remade)
    elif committed.suffix == ".json":
        yield from differing_json(json.loads(committed.read_text()), json.loads(remade.read_text()))
    elif committed.read_bytes() != remade.read_bytes():
        yield "the bytes differ"


def main() -> int:
    """Compare two directories, print what differs, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("committed", type=Path)
    parser.add_argument("remade", type=Path)
    options = parser.parse_args()

    def names(root: Path) -> set[Path]:
        return {path.relative_to(root) for path in root.rglob("*") if path.is_file() and path.name not in IGNORED_FILES}

    old, new = names(options.committed), names(options.remade)
    problems = [f"{name}: in one directory only" for name in sorted(old ^ new)]
    for name in sorted(old & new):
        problems += [f"{name}: {what}" for what in differing_files(options.committed / name, options.remade / name)]
    for problem in problems:
        print(f"{options.committed}: {problem}")
    print(f"{options.committed}: {len(old)} files compared, {len(problems)} differences")
    return 1 if problems or not old else 0


if __name__ == "__main__":
    sys.exit(main())
