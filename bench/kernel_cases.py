"""The one list of kernel cases, which tests and benchmarks share: ``CASES``, and ``select`` to take some of it.

Tags say what a case is for; see ``edit_case.EditCase``.
"""

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence

from bench.attention_case import AttentionCase
from bench.edit_case import EditCase

Case = EditCase | AttentionCase

MIXED = {
    "lengths": (5, 1, 40, 3, 30, 17, 9),
    "ranks": (16, 4, 48, 0, 256, 8, 33),
    "base_fraction": 0.3,
    "mask": "random",
    "padding": 20,
}
"""Requests of one token and of several tiles, ranks of 4 to 256, requests and adapters without pages, padding.

At ``block`` a fused kernel may refuse as many pages in a tile as this makes.
"""

FILLED = {"lengths": (64,) * 4, "tile": 32}
"""Tiles that belong to one request each."""

CROWD = {"lengths": (1, 2, 3, 4, 5, 6, 7) * 4 + (3,) * 5, "tile": 128, "ranks": (16, 32, 4), "mask": "random"}
"""33 requests in one tile."""


def _operations(model: str) -> list[EditCase]:
    """Return each operation once, with all that it can have."""

    def case(op: str, sites: str = "", edits: str = "", *, block: bool = False, label: str = "") -> EditCase:
        name = "/".join([op, model, label or "+".join(sites.split() or edits.split() or ["block"])])
        return EditCase(
            name=name, op=op, tags=("test",), model=model, sites=tuple(sites.split()), edits=tuple(edits.split()),
            block=block,
        )  # fmt: skip

    return [
        case("shrink", "q k v"),
        case("shrink", "down"),
        case("expand", "v"),
        case("expand", "gate"),
        case("lowrank_edit", "q"),
        case("lowrank_edit", "down"),
        case("lowrank_edit", "block"),
        case("norm_shrink", "gate up", "o", label="o->gate+up"),
        case("norm_shrink", "q k v", "down", block=True, label="down+block->q+k+v"),
        case("norm_shrink", "", "", block=True, label="block"),
        case("norm_shrink", "", "down", label="down"),
        case("norm_shrink", "q", label="q"),
        case("norm_shrink", "", label="plain"),
        case("rope_kv", edits="q k v"),
        case("rope_kv", edits="k"),
        case("silu_mul_shrink", "down", "gate up", label="gate+up->down"),
        case("silu_mul_shrink", "", "up", label="up"),
        case("silu_mul_shrink", "down", label="down"),
        case("silu_mul_shrink", "", label="plain"),
        case("backward", "v"),
        case("backward", "gate"),
        case("backward", "down"),
    ]


def _with(cases: Iterable[EditCase], label: str, **changes: object) -> list[EditCase]:
    return [dataclasses.replace(case, name=f"{case.name}/{label}", **changes) for case in cases]  # type: ignore[arg-type]


def _edit_tests() -> list[EditCase]:
    """Return the cases of correctness: every operation on mixed batches, and the edges on a few."""
    narrow, small, qwen = _operations("narrow"), _operations("smollm2-135m"), _operations("qwen2.5-0.5b")
    few = _labelled(narrow, "q+k+v", "q", "v", "o->gate+up", "gate+up->down", "gate")
    full = _labelled(narrow, "q+k+v", "q", "block", "down+block->q+k+v", "gate")
    bf16 = {"dtype": "bfloat16"}
    edge = {"lengths": (20, 12), "min_entries": 2}
    found = _with(narrow, "mixed", **MIXED)
    found += _with(small, "mixed/bf16", **MIXED, tile=64, **bf16)
    found = [dataclasses.replace(c, tags=("test", "odd")) if c.block else c for c in found]
    found += _with([c for c in narrow if c.block], "mixed-to-48", **MIXED | {"ranks": (16, 4, 48, 0, 33, 8)})
    found += _with([c for c in small if c.block], "mixed-to-32/bf16", **MIXED | {"ranks": (16, 4, 32)}, tile=32, **bf16)
    found += _with(few, "mixed/bf16", **MIXED, **bf16)
    found += _with(_labelled(qwen, "q+k+v", "q", "v", "down+block->q+k+v", "gate+up->down", "gate"), "filled/bf16",
                   **FILLED, **bf16)  # fmt: skip
    heads = {"head_norm": True}
    found += _with([c for c in narrow if c.op == "rope_kv"], "head-norm", **MIXED, **heads)
    found += _with(_labelled([c for c in small if c.op == "rope_kv"], "q+k+v"), "head-norm/bf16", **MIXED, **heads,
                   tile=64, **bf16)  # fmt: skip
    found += _with(few, "crowd", **CROWD) + _with(_labelled(narrow, "q", "gate"), "crowd/bf16", **CROWD, **bf16)
    found += _with(full, "f7+l7", lengths=(40, 6, 1, 70), groups=2, mask="f7+l7", ranks=(16, 4), padding=3)
    found += _with(full, "groups/bf16", lengths=(19, 30), groups=2, mask="random", ranks=(8, 40), tile=32, **bf16)
    found += _with(few, "one-token/bf16", lengths=(1,), **bf16)
    found += _with(_labelled(narrow, "v"), "one-token/tile-1", lengths=(1,), tile=1, tags=("test", "odd"))
    found += _with(few, "all-masked", mask="none", **edge)
    found += _with(few, "base-only", base_fraction=1.0, **edge)
    found += _with(few, "null-pages", ranks=(0,), **edge, spare_pages=5)
    # Rows enough that a norm is not cut into parts.
    norms = [c for c in narrow if c.op == "norm_shrink"]
    found += _with(_labelled(norms, "o->gate+up", "down+block->q+k+v"), "many-rows", lengths=(60, 4) * 66, tile=64,
                   ranks=(16,))  # fmt: skip
    found += _with(few, "shared-adapter/bf16", adapters=1, ranks=(24,), lengths=(30, 2, 50), tile=64, **bf16)
    found += _with(_labelled(narrow, "v"), "no-spare-pages", adapters=1, spare_pages=0, lengths=(32,))
    found += _with(few, "tile-128/bf16", lengths=(300, 20), tile=128, **bf16)
    found += [
        dataclasses.replace(c, name=c.name.replace("narrow", "llama3-8b") + "/filled/bf16", model="llama3-8b",
                            lengths=(64, 40, 24), adapters=2, ranks=(16, 32), tile=64, spare_pages=1, **bf16)
        for c in few
    ]  # fmt: skip
    return found


def _labelled(cases: Iterable[EditCase], *labels: str) -> list[EditCase]:
    return [case for case in cases if case.name.split("/", 2)[2] in labels]


def _decode_tests() -> list[EditCase]:
    def case(label: str, model: str = "narrow", site: str = "qkv", **changes: object) -> EditCase:
        changes = {"lengths": (1,) * 7, "tags": ("test",), **changes}
        return EditCase(name=f"decode_edit/{model}/{site}/{label}", op="decode_edit", model=model,
                        sites=tuple(site.split("+")), **changes)  # type: ignore[arg-type]  # fmt: skip

    mixed = {"ranks": (16, 4, 48, 0, 256, 8, 33), "base_fraction": 0.3, "lengths": (1,) * 20}
    return [
        case("mixed", **mixed),
        case("mixed/bf16", **mixed, dtype="bfloat16"),
        case("mixed/bf16", "smollm2-135m", "gate_up", **mixed, dtype="bfloat16"),
        case("mixed", "qwen2.5-0.5b", "down", **mixed),
        case("rank-16/bf16", "llama3-8b", "qkv", lengths=(1,) * 9, dtype="bfloat16"),
        case("one-row", lengths=(1,)),
        case("one-row/bf16", lengths=(1,), dtype="bfloat16"),
        case("base-only", base_fraction=1.0),
        case("one-adapter", adapters=1, lengths=(1,) * 33),
        case("more-adapters-than-rows", adapters=40, spare_pages=0),
        case("few-adapters/bf16", adapters=3, spare_pages=0, lengths=(1,) * 9, base_fraction=0.3, dtype="bfloat16"),
        case("mixed", site="q+k+v", **mixed),
        case("mixed/bf16", "smollm2-135m", "q+k+v", **mixed, dtype="bfloat16"),
        case("mixed", site="gate+up", **mixed),
        case("rank-16/bf16", "llama3-8b", "q+k+v", lengths=(1,) * 9, dtype="bfloat16"),
        case("many-rows/bf16", site="q+k+v", adapters=5, lengths=(1,) * 208, base_fraction=0.3, dtype="bfloat16"),
    ]


def _attention_tests() -> list[AttentionCase]:
    def case(label: str, queries: Sequence[int], keys: Sequence[int], **changes: object) -> AttentionCase:
        options = {"tags": ("test",), **changes}
        return AttentionCase(name=f"attention/{label}", query_lens=tuple(queries), kv_lens=tuple(keys), **options)  # type: ignore[arg-type]

    queries, keys = (5, 1, 3, 0, 1, 40, 70, 0), (9, 1, 3, 0, 17, 64, 133, 0)
    decode = (1, 16, 17, 64, 65, 100, 200, 31)
    llama, smollm, bf16 = {"heads": 32, "kv_heads": 8, "head_size": 128}, {"heads": 9, "kv_heads": 3}, "bfloat16"
    found = []
    for page, dtype in ((16, "float32"), (64, bf16)):
        end = f"page-{page}" + ("" if dtype == "float32" else "/bf16")
        both = {"page_size": page, "dtype": dtype}
        found += [
            case(f"ragged/H9-K3-C64/{end}", queries, keys, padding=6, **smollm, **both),
            case(f"ragged/H32-K8-C128/{end}", queries, keys, **llama, **both),
            case(f"decode/H9-K3-C64/{end}", (1,) * 8, decode, **smollm, **both),
            case(f"decode/H32-K8-C128/{end}", (1,) * 8, decode, **llama, **both),
        ]
    found += [
        case("ragged/H32-K8-C128/page-16/bf16", queries, keys, **llama, dtype=bf16),
        case("ragged/H9-K3-C64/page-64", queries, keys, **smollm, page_size=64),
        case("decode/H32-K8-C128/page-16/bf16", (1,) * 8, decode, **llama, dtype=bf16),
        case("ragged/multi-head", queries, keys, heads=4, kv_heads=4),
        case("ragged/multi-query", queries, keys, heads=6, kv_heads=1),
        case("ragged/generous-bound", queries, keys, max_query_len=100, padding=6),
        case("ragged/scale", queries, keys, scale=1.7),
        case("ragged/window", queries, keys, window=5, padding=6, **smollm),
        case("ragged/window-of-one", queries, keys, window=1),
        case(
            "ragged/window-over-pages/bf16",
            (40, 7, 1),
            (1100, 1300, 900),
            page_size=64,
            window=600,
            dtype=bf16,
            **llama,
        ),
        case("decode/window", (1, 0, 1, 1, 1), (1500, 0, 700, 20, 300), page_size=64, window=300),
        case("ragged/full-pool", queries, keys, pool_factor=1.0),
        case("ragged/shared-prefix", (8, 1, 5), (40, 33, 50), shared_pages=2),
        case("ragged/chunk-over-prefix/bf16", (64,), (300,), page_size=64, dtype=bf16, **llama),
        case("ragged/long/bf16", (40, 7), (1100, 1300), page_size=64, dtype=bf16, **llama),
        case("decode/idle-rows", (1, 0, 1, 0), (20, 0, 40, 0), padding=2),
        case("decode/one-row", (1,), (1,)),
        case("decode/long", (1, 1), (1500, 3), dtype=bf16, **llama),
        case("decode/long-and-short/page-64", (1,) * 4, (2000, 1, 64, 500), page_size=64, **smollm),
        case("decode/shared-prefix", (1,) * 3, (40, 33, 50), shared_pages=2),
        case("decode/float8-pool", (1,) * 3, (40, 33, 50), dtype=bf16, kv_dtype="float8_e4m3fn", tags=("test", "odd")),
    ]
    return found


_LLAMA = {"model": "llama3-8b", "dtype": "bfloat16", "tags": ("bench",), "spare_pages": 0}

_BATCHES = {
    "32x256-r16": {"lengths": (256,) * 32, "tile": 128},
    "128x64-r16": {"lengths": (64,) * 128, "tile": 64},
    "32x256-r64": {"lengths": (256,) * 32, "tile": 128, "ranks": (64,)},
    "ragged-r16": {"lengths": (37, 411, 150, 90, 600, 256, 204, 300) * 4, "tile": 64},
    "8x256-r16": {"lengths": (256,) * 8, "tile": 64},
    "4x256-r16": {"lengths": (256,) * 4, "tile": 64},
}
"""8,192 prompt tokens each: whole tiles of one adapter, many short prompts, a larger rank, prompts that share tiles.
Calls of 2,048 and of 1,024 tokens, as traffic makes them.
"""


def _edit_benchmarks() -> list[EditCase]:
    every = [
        ("shrink", "q+k+v", {"sites": ("q", "k", "v")}),
        ("shrink", "o", {"sites": ("o",)}),
        ("shrink", "gate+up", {"sites": ("gate", "up")}),
        ("shrink", "down", {"sites": ("down",)}),
        *(("expand", site, {"sites": (site,)}) for site in ("q", "k", "v", "o", "gate", "up", "down")),
    ]
    fused = [
        ("lowrank_edit", "q", {"sites": ("q",)}),
        ("lowrank_edit", "down", {"sites": ("down",)}),
        ("lowrank_edit", "block", {"sites": ("block",)}),
        ("norm_shrink", "o->gate+up", {"edits": ("o",), "sites": ("gate", "up")}),
        ("norm_shrink", "down->q+k+v", {"edits": ("down",), "sites": ("q", "k", "v")}),
        ("norm_shrink", "block", {"block": True}),
        ("rope_kv", "q+k+v", {"edits": ("q", "k", "v"), "page_size": 64}),
        ("silu_mul_shrink", "gate+up->down", {"edits": ("gate", "up"), "sites": ("down",)}),
    ]
    found = []
    for batch, shape in _BATCHES.items():
        for op, label, what in every + fused if batch == "32x256-r16" else fused:
            found.append(EditCase(name=f"{op}/llama3-8b/{label}/{batch}", op=op, **_LLAMA | shape | what))
    shape = {**_LLAMA, **_BATCHES["32x256-r16"], "model": "qwen3-8b", "page_size": 64, "head_norm": True}
    name = "rope_kv/qwen3-8b/q+k+v/32x256-r16"
    found.append(EditCase(name=name, op="rope_kv", edits=("q", "k", "v"), **shape))
    for site in ("q", "gate", "down"):
        for batch, adapters in (("32x256-r16", None), ("one-adapter-32x256-r16", 1)):
            shape = {**_BATCHES["32x256-r16"], "adapters": adapters}
            name = f"backward/llama3-8b/{site}/{batch}"
            found.append(EditCase(name=name, op="backward", sites=(site,), **_LLAMA | shape))
    for sites in ("q+k+v", "o", "gate+up", "down"):
        for rows in (64, 256, 512):
            name = f"decode_edit/llama3-8b/{sites}/{rows}-rows-of-512-r16"
            shape = {"lengths": (1,) * rows, "adapters": 512}
            found.append(EditCase(name=name, op="decode_edit", sites=tuple(sites.split("+")), **_LLAMA | shape))
    return found


def _attention_benchmarks() -> list[AttentionCase]:
    llama = {"tags": ("bench",), "dtype": "bfloat16", "heads": 32, "kv_heads": 8, "head_size": 128}
    smollm = {**llama, "heads": 9, "kv_heads": 3, "head_size": 64}
    found = []
    for page in (16, 64):
        for batch, context in ((64, 900), (256, 916), (512, 384)):
            name = f"attention/decode/{batch}x{context}/H32-K8-C128/page-{page}"
            found.append(AttentionCase(name=name, query_lens=(1,) * batch, kv_lens=(context,) * batch, page_size=page,
                                       **llama))  # fmt: skip
        found += [
            AttentionCase(name=f"attention/prefill/32x256/H32-K8-C128/page-{page}", query_lens=(256,) * 32,
                          kv_lens=(256,) * 32, page_size=page, **llama),
            AttentionCase(name=f"attention/chunk/512-of-8192/H32-K8-C128/page-{page}", query_lens=(512,),
                          kv_lens=(8192,), page_size=page, **llama),
        ]  # fmt: skip
    uneven = tuple(range(33, 33 + 7 * 256, 7))
    found += [
        AttentionCase(name="attention/decode/256-uneven/H32-K8-C128/page-64", query_lens=(1,) * 256, kv_lens=uneven,
                      page_size=64, **llama),
        AttentionCase(name="attention/prefill/1x8192/H32-K8-C128/page-64", query_lens=(8192,), kv_lens=(8192,),
                      page_size=64, **llama),
        AttentionCase(name="attention/decode/256x916/H9-K3-C64/page-64", query_lens=(1,) * 256, kv_lens=(916,) * 256,
                      page_size=64, **smollm),
        AttentionCase(name="attention/prefill/32x256/H9-K3-C64/page-64", query_lens=(256,) * 32, kv_lens=(256,) * 32,
                      page_size=64, **smollm),
    ]  # fmt: skip
    return found


def _small() -> list[Case]:
    """Return cases for the benchmark on a CPU, and for a quick look on anything else."""
    shape = {"model": "smollm2-135m", "tags": ("small",), "lengths": (64,) * 4, "tile": 32, "spare_pages": 0}
    edits = {
        "shrink": {"sites": ("q", "k", "v")},
        "expand": {"sites": ("gate",)},
        "lowrank_edit": {"sites": ("q",)},
        "norm_shrink": {"edits": ("o",), "sites": ("gate", "up")},
        "rope_kv": {"edits": ("q", "k", "v")},
        "silu_mul_shrink": {"edits": ("gate", "up"), "sites": ("down",)},
        "backward": {"sites": ("q",)},
        "decode_edit": {"sites": ("qkv",), "lengths": (1,) * 16},
    }
    smollm = {"tags": ("small",), "heads": 9, "kv_heads": 3}
    return [
        *(EditCase(name=f"{op}/smollm2-135m/small", op=op, **shape | what) for op, what in edits.items()),
        AttentionCase(name="attention/decode/small", query_lens=(1,) * 16, kv_lens=(128,) * 16, **smollm),
        AttentionCase(name="attention/prefill/small", query_lens=(64,) * 4, kv_lens=(64,) * 4, **smollm),
    ]


CASES: tuple[Case, ...] = (
    *_edit_tests(),
    *_decode_tests(),
    *_attention_tests(),
    *_edit_benchmarks(),
    *_attention_benchmarks(),
    *_small(),
)
"""Every case; names are unique."""


def select(tag: str, pattern: str = "*") -> list[Case]:
    """Return the cases with a tag whose names match any of the shell patterns, with commas between them.

    A pattern without ``*`` matches anywhere.
    """
    patterns = [one if "*" in one else f"*{one}*" for one in pattern.split(",")]
    return [case for case in CASES if tag in case.tags and any(fnmatch.fnmatchcase(case.name, p) for p in patterns)]
