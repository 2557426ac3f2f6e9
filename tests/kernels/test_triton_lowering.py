"""Triton kernels without a GPU: lowered for one, and run in Triton's interpreter.

Needs triton, jax-triton and JAX's CUDA plugin (``pip install preft-jax[gpu]``, or these three with ``--no-deps``).
"""

import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.edit_case import EditCase
from bench.kernel_cases import select
from kernels import dispatch
from kernels.types import PagePool, Unsupported
from kernels.xla.pages import slab_width
from preft_jax.adapters.bank import init_bank
from preft_jax.config import PRESETS
from preft_jax.models import forward, linear
from preft_jax.models.batch import DecodeBatch, Span, pack_prefill
from preft_jax.models.cache import init_cache
from preft_jax.models.layout import fused_layout
from preft_jax.models.modules import abstract_params
from preft_jax.quantize import quantize
from preft_jax.sampling.arrays import sampling_arrays
from preft_jax.sampling.parameters import SamplingParams
from preft_jax.shapes import LINEAR_SITES, NUM_GROUPS
from serve.engine import programs as device

MISSING = [name for name in ("triton", "jax_triton", "jax_cuda13_plugin") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

SHARED_BYTES = 227 << 10
"""Shared memory that a program may have on compute capability 9.0."""


@pytest.fixture
def compiled(monkeypatch):
    """Return a list that fills with what Triton makes of each kernel."""
    from jax_triton import triton_lib

    results = []
    compile_kernel = triton_lib.compile_ttir_to_ptx_inplace

    def recording(*arguments):
        results.append(compile_kernel(*arguments))
        return results[-1]

    monkeypatch.setattr(triton_lib, "compile_ttir_to_ptx_inplace", recording)
    monkeypatch.setattr(triton_lib, "_COMPILED_KERNEL_CACHE", {})
    return results


def lower(function, *arguments, **options):
    """Lower for a Hopper GPU and return the program's text."""
    from kernels import triton

    with triton.lowering_for(90):
        return jax.jit(function, **options).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def one_of_each():
    """Return one real case of each operation and each length of page lists, and every shape of attention."""
    chosen = {}
    for case in select("bench"):
        edits = isinstance(case, EditCase)
        key = (
            case.op,
            (max(case.ranks), case.head_norm) if edits else (case.page_size, case.head_size, max(case.query_lens) == 1),
        )
        chosen.setdefault(key, case)
    return list(chosen.values())


@pytest.mark.parametrize("case", one_of_each(), ids=lambda case: case.name)
def test_every_kernel_compiles_for_hopper(case, compiled):
    inputs = jax.eval_shape(lambda: case.inputs(np.random.default_rng(0)))
    text = lower(functools.partial(case.run, implementation="triton"), inputs)
    assert "triton_kernel_call" in text
    assert compiled
    for kernel in compiled:
        assert kernel.shared_mem_bytes <= SHARED_BYTES, kernel.name


def test_drawing_compiles_for_hopper_and_branches_nowhere(compiled):
    """A branch would make the host wait for the device."""
    b, f = 8, jax.ShapeDtypeStruct
    picks = device.Picks(np.zeros(b, np.int32), np.zeros((b, 5), np.int32), np.zeros((b, 4), np.int32))
    sampling = sampling_arrays([SamplingParams()], [0], b).plain
    with dispatch.preferring("triton"):
        logits, slots = f((b, 128256), jnp.float32), device.Slots(f((b, 3), jnp.int32))
        text = lower(device.draw_plain, logits, slots, picks, sampling)
    assert text.count("@triton_kernel_call") == 1
    assert not re.search(r"stablehlo\.(case|if|while)", text)
    (kernel,) = compiled
    assert kernel.shared_mem_bytes <= SHARED_BYTES


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_rank_pages_are_written_in_place_by_a_kernel_a_site(dtype, compiled):
    config, f = PRESETS["smollm2-135m"], jax.ShapeDtypeStruct
    bank = jax.eval_shape(lambda: init_bank(config, 5, jnp.bfloat16))
    widths = [slab_width(*config.site_shape(site), 16, dtype) for site in LINEAR_SITES]
    slabs = [f((config.num_hidden_layers, sum(widths)), dtype)] * 8
    page = np.zeros((len(bank.sites), 8), np.int32)
    with dispatch.preferring("triton"):
        text = lower(device.write_whole_slabs, bank, slabs, page, donate_argnums=0)
    assert text.count("@triton_kernel_call") == len(LINEAR_SITES) >= len(compiled)
    assert text.count("output_operand_alias<") == 3 * len(LINEAR_SITES)
    assert "dynamic_update_slice" not in text


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"shrink": 2048, "expand": 512}, r"shrink is 2048, which does not divide \[1024\]"),
        ({"shrink": 1024, "expand": 1024}, r"expand is 1024, which does not divide \[2048, 512\]"),
    ],
)
def test_blocks_that_do_not_divide_the_widths_of_a_decode_edit_are_refused(config, told):
    """Programs would read and write beyond a linear."""
    from kernels.triton.decode import Config, decode_edit

    zeros = functools.partial(jnp.zeros, dtype=jnp.bfloat16)
    pools = tuple(PagePool(zeros((2, 1024, 16)), jnp.zeros((2, 16)), zeros((2, 16, f))) for f in (2048, 512))
    pages = (np.zeros((3, 1), np.int32),) * 2
    with pytest.raises(Unsupported, match=told):
        decode_edit(zeros((3, 1024)), zeros((3, 2560)), pools, pages, columns=(0, 2048), config=Config(**config))


@pytest.fixture(scope="module", params=["smollm2-135m", "qwen3-8b"])
def programs(request):
    """Return prefill and decode at the shape of a model, lowered for a GPU, by name."""
    config = dataclasses.replace(PRESETS[request.param], num_hidden_layers=3)
    dtype = jnp.bfloat16
    params = jax.eval_shape(functools.partial(fused_layout, transpose=False), abstract_params(config, dtype))
    cache = jax.eval_shape(lambda: init_cache(config, 37, 16, dtype))
    bank = jax.eval_shape(lambda: init_bank(config, 5, dtype))
    span = Span(tokens=np.arange(9), start=0, edit_mask=np.ones((9, NUM_GROUPS), bool), kv_pages=[1])
    batch = pack_prefill([span], num_tokens=64, num_requests=2, page_table_width=4, page_size=16, tile=32)
    rows = DecodeBatch(np.zeros(4, np.int32), np.zeros(4, np.int32), np.zeros((4, 4), np.int32))
    pages = {site: np.zeros((4, 1), np.int32) for site in bank.sites}
    prefill = functools.partial(forward.prefill, config, max_query_len=32)
    with dispatch.preferring("triton"):
        return config, {
            "prefill": lower(prefill, params, bank, cache, batch, donate_argnums=2),
            "decode": lower(functools.partial(forward.decode, config), params, cache, rows, donate_argnums=1),
            "decode_adapted": lower(
                functools.partial(forward.decode_adapted, config), params, bank, pages, cache, rows, donate_argnums=3
            ),
        }


def test_a_decode_step_in_fp8_has_two_kernels_more_a_layer(programs, monkeypatch, compiled):
    """They round what ``o`` and ``down`` read; norms round what others read, and what reads outputs scales them.

    And adds the bias of q, k and v.
    """
    monkeypatch.setattr(linear, "gpu_has_fp8", lambda: True)
    config = dataclasses.replace(programs[0], qkv_bias=not programs[0].qk_norm)
    params = jax.eval_shape(functools.partial(fused_layout, transpose=False), abstract_params(config, jnp.bfloat16))
    params = jax.eval_shape(quantize, params)
    cache = jax.eval_shape(lambda: init_cache(config, 37, 16, jnp.bfloat16))
    rows = DecodeBatch(np.zeros(4, np.int32), np.zeros(4, np.int32), np.zeros((4, 4), np.int32))
    with dispatch.preferring("triton"):
        text = lower(functools.partial(forward.decode, config), params, cache, rows, donate_argnums=1)
    assert text.count("@triton_kernel_call") == 6 * config.num_hidden_layers + 1
    products = re.findall(
        r"stablehlo.dot_general.*: \(tensor<[^>]*f8E4M3FN>, tensor<[^>]*f8E4M3FN>\) -> tensor<\S*xbf16>", text
    )
    assert len(products) == 4 * config.num_hidden_layers
    assert "stablehlo.divide" not in text


def test_a_gpu_that_does_not_round_to_fp8_keeps_no_keys_in_it():
    """An Ampere GPU (8.0) takes plain JAX, an Ada one (8.9) the kernel."""
    from kernels import triton

    f = jax.ShapeDtypeStruct
    qkv, table, slots = f((32, 4 * 64), jnp.bfloat16), f((32, 32), jnp.float32), f((32,), jnp.int32)
    pool = f((4, 16, 2, 64), jnp.float8_e4m3fn)
    run = functools.partial(triton.rope_kv, edits=(None, None, None))
    program = jax.jit(lambda qkv, cos, sin, kv, slots: run(qkv, cos_TX=cos, sin_TX=sin, kv_PSJC=kv, slots_T=slots))
    with triton.lowering_for(80), pytest.raises(Unsupported, match="float8_e4m3fn; this GPU does not round to FP8"):
        program.trace(qkv, table, table, pool, slots)
    with triton.lowering_for(89):
        assert program.trace(qkv, table, table, pool, slots)


@pytest.mark.parametrize("name", ["prefill", "decode", "decode_adapted"])
def test_programs_write_the_kv_cache_in_place(programs, name):
    """Each layer's pool is donated to the result, and the kernel that writes it returns the buffer it was given."""
    config, texts = programs
    layers, shape = config.num_hidden_layers, f"37x16x{2 * config.num_key_value_heads}x{config.head_dim}xbf16"
    signature = next(line for line in texts[name].splitlines() if "func.func public @main" in line)
    donated = re.findall(rf"tensor<{shape}> {{[^}}]*tf.aliasing_output", signature)
    assert len(donated) == layers
    writes = [
        line for line in texts[name].splitlines()
        if "triton_kernel_call" in line and re.search(rf"-> .*{shape}", line)
    ]  # fmt: skip
    assert len(writes) == layers
    assert all("output_operand_alias" in line for line in writes)


@pytest.mark.parametrize(("name", "calls", "ends"), [("prefill", 10, 2), ("decode", 4, 1), ("decode_adapted", 14, 1)])
def test_programs_are_made_of_the_fused_kernels(programs, name, calls, ends):
    """Two norms, rope, attention and SiLU in a layer, and the shrink of ``o`` with edits; one norm at the end.

    In a prefill of few tokens a norm is two kernels, and four where the stream is edited at ``block``, which is not
    before the first layer. A decode step rotates where it attends. All-token adapters edit linears that read the same
    in two launches, and the stream in two.
    """
    config, texts = programs
    found = texts[name].count("@triton_kernel_call")
    assert found == calls * config.num_hidden_layers + ends


INTERPRETED = (
    "test_edit[triton-shrink/narrow/q+k+v/f7+l7]",
    "test_edit[triton-expand/narrow/gate/f7+l7]",
    "test_edit[triton-norm_shrink/narrow/down+block->q+k+v/f7+l7]",
    "test_edit[triton-norm_shrink/narrow/o->gate+up/base-only]",
    "test_edit[triton-norm_shrink/narrow/plain/mixed]",
    "test_edit[triton-norm_shrink/narrow/o->gate+up/mixed]",
    "test_edit[triton-norm_shrink/narrow/down+block->q+k+v/many-rows]",
    "test_edit[triton-norm_shrink/narrow/down/mixed]",
    "test_edit[triton-rope_kv/narrow/q+k+v/f7+l7]",
    "test_edit[triton-rope_kv/narrow/q+k+v/head-norm]",
    "test_edit[triton-silu_mul_shrink/narrow/gate+up->down/mixed]",
    "test_edit[triton-silu_mul_shrink/narrow/gate+up->down/null-pages]",
    "test_edit[triton-silu_mul_shrink/narrow/plain/mixed]",
    "test_edit[triton-backward/narrow/gate/f7+l7]",
    "test_edit[triton-decode_edit/narrow/qkv/mixed]",
    "test_a_decode_edit_of_some_columns_leaves_the_others[triton-edited1-5]",
    "test_attention[triton-attention/ragged/multi-query]",
    "test_attention[triton-attention/ragged/long/bf16]",
    "test_attention[triton-attention/decode/long-and-short/page-64]",
)


def test_kernels_are_right_in_tritons_interpreter():
    """A case of each operation, of those with which a GPU is tested too (``pytest -m gpu``)."""
    tests = [f"tests/kernels/test_implementations.py::{test}" for test in INTERPRETED]
    tests += ["tests/kernels/test_pages.py"]
    tests += [
        f"tests/kernels/test_decode_attention.py::test_it_is_attention_with_the_own_token_rotated_and_kept[triton-{case}]"
        for case in ("mixed/bf16", "page-64", "idle-rows", "split", "head-norm/split", "head-norm/bf16")
    ]
    tests += [
        f"tests/kernels/test_fp8.py::{test}[triton-{op}/narrow/plain/mixed]"
        for test in ("test_scales_are_applied_by_what_reads_the_product",
                     "test_what_the_next_product_reads_is_rounded_after_its_shrink")
        for op in ("norm_shrink", "silu_mul_shrink")
    ]  # fmt: skip
    tests += ["tests/kernels/test_fp8.py::test_rows_are_rounded_to_their_largest[triton-48-bfloat16]"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > len(INTERPRETED)
