"""``python -m bench.tpu_compile``: compile the TPU kernels and whole programs with libtpu, without a TPU.

libtpu compiles for a described topology (``jax.experimental.topologies``), so this finds what only a TPU's compiler can
say: unsupported operations, kernels that overflow VMEM, programs that overflow HBM, pools that are copied. Nothing
runs; times are those of the compiler. FLOPs and bytes are XLA's own count, which knows nothing of what happens inside a
kernel. A row that fails makes the exit status 1.
"""

import argparse
import collections
import contextlib
import functools
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from rich.console import Console
from rich.table import Table

from bench.tpu_cases import AXIS, SELECTIONS, Case
from kernels import dispatch
from preft_jax.cli import hyphenated
from serve.bench.environment import environment
from serve.bench.output import emit

SCHEMA = "preft-jax/tpu-compile/1"
HBM_GIB = {"v5e": 16, "v6e": 32, "v5p": 95}
TARGETS = tuple(f"{kind}:{shape}" for kind in HBM_GIB for shape in ("1x1", "2x2"))
_CROWDED = 0.9


def topology(target: str) -> Any:
    """Return the described devices of ``v5e:1x1`` and the like."""
    kind, shape = target.split(":")
    if shape == "1x1":
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:1x1x1", chips_per_host_bounds=[1, 1, 1]
        )
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}")


def _shapes(tree: Any, specs: Any, mesh: Mesh) -> Iterable[str]:
    """Return each pool's shape on one chip as HLO writes it; its vectors ``c_PR`` are too small to matter."""
    names = {"bfloat16": "bf16", "float32": "f32", "int32": "s32"}
    for leaf, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True):
        shape = NamedSharding(mesh, spec).shard_shape(leaf.shape)
        if len(shape) > 2:
            yield f"{names[leaf.dtype.name]}[{','.join(map(str, shape))}]"


def pool_copies(hlo: str, shapes: set[str]) -> dict[str, int]:
    """Count the operations of an optimised program that copy an array of one of these shapes.

    Asynchronous copies (``copy-start``) are left out: with them the compiler moves arrays between HBM and VMEM.
    """
    copies = re.findall(r"= (\w+\[[\d,]*\])\S* copy\(", hlo)
    counted = collections.Counter(shape for shape in copies if shape in shapes)
    return dict(sorted(counted.items()))


def compile_case(case: Case, mesh: Mesh) -> dict[str, Any]:
    """Compile one case for a mesh and return its figures."""
    single = mesh.size == 1
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), case.specs)
    arguments = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        case.arguments,
        shardings,
    )
    function = functools.partial(case.function)  # new to jit, which must not answer with an earlier trace
    if not single and case.out_specs is not None:
        function = jax.shard_map(
            function, mesh=mesh, in_specs=case.specs, out_specs=case.out_specs, check_vma=False
        )  # fmt: skip
    start = time.perf_counter()
    with dispatch.preferring(case.implementation), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function, donate_argnums=case.donate).trace(*arguments)
        traced_at = time.perf_counter()
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    seconds = time.perf_counter() - traced_at
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    text = compiled.as_text() or ""
    assert memory is not None
    pools = {
        shape
        for tree, spec in zip(case.arguments, case.specs, strict=True)
        if any(tree is pool for pool in _each(case.pools))
        for shape in _shapes(tree, spec, mesh)
    }
    return {
        "trace_s": round(traced_at - start, 2),
        "compile_s": round(seconds, 2),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "xla_flops": cost.get("flops"),
        "xla_bytes": cost.get("bytes accessed"),
        "pallas_calls": text.count('custom_call_target="tpu_custom_call"'),
        "pool_copies": pool_copies(text, pools),
    }


def _each(pools: Any) -> list[Any]:
    """Return a case's pools, and what holds them, as the separate arguments they may be."""
    return [pools, *pools] if isinstance(pools, list) else [pools]


def run_target(target: str, selection: str, pattern: str, console: Console) -> list[dict[str, Any]]:
    """Compile a selection for one target."""
    devices = topology(target).devices
    mesh = Mesh(np.asarray(devices), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    hbm = HBM_GIB[target.split(":")[0]] * 2**30
    rows = []
    for case in SELECTIONS[selection](mesh.size):
        if not re.search(pattern, f"{case.model} {case.name}"):
            continue
        row: dict[str, Any] = {
            "target": target, "model": case.model, "case": case.name, "sharding": case.sharding,
            "implementation": case.implementation, "kernel_vmem_bytes": case.vmem_bytes,
        }  # fmt: skip
        if case.weight_bytes > _CROWDED * hbm:
            row |= {"status": "skipped", "reason": f"weights take {case.weight_bytes / 2**30:.1f} GiB of a chip's "
                    f"{hbm // 2**30} GiB"}  # fmt: skip
        else:
            try:
                row |= {"status": "ok"} | compile_case(case, mesh)
            except Exception as error:  # whatever the compiler raises is this row's result
                row |= {"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:2000]}"}
        if row["status"] == "ok" and case.implementation == "pallas_tpu" and not row["pallas_calls"]:
            row |= {"status": "failed", "reason": "no TPU kernel took these shapes: the program holds XLA's only"}
        if row["status"] == "ok" and row["argument_bytes"] + row["output_bytes"] - row["alias_bytes"] > hbm:
            row |= {"status": "failed", "reason": "arguments and outputs exceed HBM"}
        console.print(f"{target} {case.model} {case.name}: {row['status']} {row.get('reason', '')[:300]}")
        rows.append(row)
    return rows


def _mib(row: dict[str, Any], key: str) -> str:
    return f"{row[key] / 2**20:,.1f}" if row.get(key) is not None else ""


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the table for people; memory is of one chip, in MiB."""
    out = Table(title="compiled for TPU by libtpu, memory of one chip in MiB")
    columns = ("target", "model", "case", "status", "arguments", "temp", "output", "alias", "kernel VMEM", "GFLOP",
               "GB", "pool copies", "compile s", "over the chips")  # fmt: skip
    for column in columns:
        out.add_column(column)
    for row in rows:
        giga = [f"{row[key] / 1e9:.2f}" if row.get(key) else "" for key in ("xla_flops", "xla_bytes")]
        out.add_row(
            row["target"], row["model"], row["case"], row["status"], _mib(row, "argument_bytes"),
            _mib(row, "temp_bytes"), _mib(row, "output_bytes"), _mib(row, "alias_bytes"),
            _mib(row, "kernel_vmem_bytes"), *giga, str(sum(row.get("pool_copies", {}).values())),
            f"{row.get('compile_s', '')}", row["sharding"],
        )  # fmt: skip
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tpu_compile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS, help="default: all")
    parser.add_argument("--selection", choices=SELECTIONS, default="all", help="default: %(default)s")
    parser.add_argument("--case", default="", help="a regular expression that 'MODEL CASE' must match")
    parser.add_argument("--output-json", type=Path, default=None, help="also write the JSON line to this file")
    args = parser.parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    rows = [row for target in args.target for row in run_target(target, args.selection, args.case, console)]
    environ = environment()
    environ["versions"]["libtpu"] = _libtpu_version()
    Console(width=230).print(table(rows))
    counts = dict(collections.Counter(row["status"] for row in rows))
    figures = {"schema": SCHEMA, "selection": args.selection, "counts": counts, "rows": rows, **environ}
    emit(figures, args.output_json)
    return int(counts.get("failed", 0) > 0 or not rows)


def _libtpu_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    with contextlib.suppress(PackageNotFoundError):
        return version("libtpu")
    return None


if __name__ == "__main__":
    sys.exit(main())
