"""Attention of a decode step, which rotates and keeps its own tokens: every implementation, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import kernel_reference as reference
import numpy as np
import pytest
from kernel_reference import f64

from bench.attention_case import AttentionCase
from bench.edit_case import normal
from kernels import api, debug

TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
"""Of the norm of a row, as in ``test_implementations``."""

LLAMA = {"heads": 32, "kv_heads": 8, "head_size": 128, "dtype": "bfloat16"}

CASES = {
    "mixed": ((1, 16, 17, 64, 65, 100, 200, 31), {}),
    "mixed/bf16": ((1, 16, 17, 64, 65, 100, 200, 31), {"dtype": "bfloat16"}),
    "page-64": ((1, 63, 64, 65, 128, 129, 500), {"heads": 9, "kv_heads": 3, "page_size": 64}),
    "page-64/bf16": ((1, 63, 64, 65, 128, 129, 300), {**LLAMA, "page_size": 64}),
    "multi-head": ((5, 40), {"heads": 3, "kv_heads": 3, "head_size": 32}),
    "multi-query": ((5, 40), {"heads": 6, "kv_heads": 1}),
    "qwen2.5/bf16": ((5, 40, 33), {"heads": 14, "kv_heads": 2, "dtype": "bfloat16"}),
    "idle-rows": ((0, 20, 0, 40, 0), {}),
    "all-idle": ((0, 0, 0), {}),
    "one-row": ((1,), {}),
    "split": ((2000, 1, 0, 64, 1025), {"heads": 2, "kv_heads": 1}),
    "split/bf16": ((2000, 3, 700), {**LLAMA, "page_size": 64}),
    "shared-prefix": ((40, 33, 50), {"shared_pages": 2}),
    "float8-pool": ((40, 33, 50), {"kv_dtype": "float8_e4m3fn", "dtype": "bfloat16"}),
    "scale": ((40, 3), {"scale": 1.7}),
    "window": ((1, 16, 0, 17, 65, 100, 200), {"window": 16}),
    "window/split": ((2000, 1, 0, 64, 1025), {"heads": 2, "kv_heads": 1, "window": 700}),
    "head-norm": ((1, 16, 0, 65, 100), {"head_norm": True}),
    "head-norm/bf16": ((5, 40, 33), {**LLAMA, "head_norm": True}),
    "head-norm/split": ((2000, 1, 0, 64, 1025), {"heads": 2, "kv_heads": 1, "head_norm": True}),
}  # fmt: skip
"""Keys of each row, its own token included (0: an idle row), and what differs from a case's defaults; ``head_norm``: of
q and k."""


@pytest.fixture(autouse=True)
def full_float32():
    with jax.default_matmul_precision("highest"):
        yield


def draw(name, rng):
    """Return a case and its arguments; every slot that holds no key yet, own tokens' slots too, holds NaN."""
    keys, options = CASES[name]
    options = dict(options)
    heads = 2 if options.pop("head_norm", False) else 0
    case = AttentionCase(name=name, tags=(), query_lens=tuple(min(n, 1) for n in keys), kv_lens=keys, **options)
    inputs = case.inputs(rng)
    batch, size = len(keys), case.page_size
    kv, table = np.array(inputs.kv_PSJC), np.asarray(inputs.page_table_BP)
    live = np.zeros(kv.shape[:2], bool)
    for pages, count in zip(table, keys, strict=True):
        before = np.arange(max(count - 1, 0))
        live[pages[before // size], before % size] = True
    kv[~live] = np.nan
    angle = rng.uniform(0, 6.28, (batch, case.head_size // 2)).astype(np.float32)
    arguments = (
        normal(rng, (batch, (case.heads + 2 * case.kv_heads) * case.head_size), case.dtype),
        jnp.asarray(np.cos(angle)), jnp.asarray(np.sin(angle)), jnp.asarray(kv), inputs.page_table_BP,
        jnp.asarray(keys, jnp.int32) - 1, *(normal(rng, (case.head_size,), case.dtype) for _ in range(heads)),
    )  # fmt: skip
    return case, arguments


def norms_of(arguments):
    """Return the weights of the norms of heads by name, if a case has them."""
    return dict(zip(("q_norm_C", "k_norm_C"), arguments[6:], strict=False)) | {"eps": reference.NORM_EPS}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def attend(implementation, scale, window, arguments):
    norms = norms_of(arguments)
    return api.decode_attention(*arguments[:6], **norms, scale=scale, window=window, implementation=implementation)


def expected(case, arguments):
    """Return the result in float64, with keys and values rounded as the pool keeps them, and the slots written."""
    qkv, cos, sin, kv, table, position, *norms = map(np.asarray, arguments)
    pages, size = kv.shape[:2]
    alive = position >= 0
    slots = np.where(alive, table[np.arange(len(position)), np.maximum(position, 0) // size] * size + position % size,
                     pages * size)  # fmt: skip
    q, pool = reference.rope_kv(f64(qkv), (None, None, None), f64(cos), f64(sin), f64(kv), slots, norms or (None, None))
    pool = f64(pool.astype(kv.dtype))
    out = np.zeros((len(position), case.heads, case.head_size))
    inputs = jax.tree.map(jnp.asarray, (q[alive], np.nan_to_num(pool), table[alive]))
    starts = np.arange(alive.sum() + 1)
    if alive.any():
        ragged = case.inputs(np.random.default_rng(0))._replace(
            q_THC=inputs[0], kv_PSJC=inputs[1], page_table_BP=inputs[2], query_start_B1=starts,
            kv_len_B=position[alive] + 1,
        )  # fmt: skip
        out[alive] = reference.paged_attention(ragged, case.scale, case.window)
    return out, pool, slots[alive]


@pytest.mark.parametrize("name", CASES)
def test_it_is_attention_with_the_own_token_rotated_and_kept(name, implementation, rng):
    case, arguments = draw(name, rng)
    out, pool = attend(implementation, case.scale, case.window, arguments)
    again, _ = attend(implementation, case.scale, case.window, arguments)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(again))
    assert out.dtype == arguments[0].dtype
    wanted, wanted_pool, slots = expected(case, arguments)
    tolerance = TOLERANCES[case.dtype]
    scale = np.linalg.norm(wanted) / max(len(slots), 1) ** 0.5
    assert np.isfinite(f64(out)).all()
    assert (np.linalg.norm((f64(out) - wanted).reshape(len(wanted), -1), axis=1) <= 2 * tolerance * scale).all()
    # The pool: what was written is right, the rest has the bits that it had.
    before, after = np.asarray(arguments[3]), np.asarray(pool)
    assert after.dtype == before.dtype
    flat = [x.reshape(-1, *x.shape[2:]) for x in (f64(after), wanted_pool)]
    coarse = 0.13 if case.kv_dtype else tolerance  # Rounding a number the other way is one step of the pool's dtype.
    # A normed key is rounded three times, and rotated after the first two.
    least = 2 * tolerance if norms_of(arguments).keys() > {"eps"} else coarse * 0.1
    np.testing.assert_allclose(flat[0][slots], flat[1][slots], rtol=coarse, atol=least)
    others = np.setdiff1d(np.arange(before.shape[0] * before.shape[1]), slots)
    bits = [np.ascontiguousarray(x).reshape(-1, *x.shape[2:])[others].tobytes() for x in (before, after)]
    assert bits[0] == bits[1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def attend_apart(implementation, scale, window, arguments):
    """``rope_kv``, and then ``paged_attention``."""
    qkv, cos, sin, kv, table, position = arguments[:6]
    size = kv.shape[1]
    page = table[jnp.arange(len(position)), jnp.maximum(position, 0) // size]
    slots = jnp.where(position >= 0, page * size + position % size, kv.shape[0] * size)
    q, written = api.rope_kv(qkv, (None, None, None), cos, sin, kv, slots, **norms_of(arguments),
                             implementation=implementation)  # fmt: skip
    out = api.paged_attention(
        q, written, table, jnp.arange(len(position) + 1, dtype=jnp.int32), jnp.maximum(position + 1, 0),
        max_query_len=1, scale=scale, window=window, implementation=implementation,
    )  # fmt: skip
    return out, written


@pytest.mark.parametrize("name", ["mixed/bf16", "idle-rows", "split", "head-norm/bf16", "window/split"])
def test_it_is_rope_kv_then_paged_attention(name, implementation, rng):
    case, arguments = draw(name, rng)
    out, pool = attend(implementation, case.scale, case.window, arguments)
    apart, written = attend_apart(implementation, case.scale, case.window, arguments)
    alive = np.asarray(arguments[5]) >= 0
    tolerance = 2 * TOLERANCES[case.dtype]
    np.testing.assert_allclose(f64(out)[alive], f64(apart)[alive], atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(f64(pool), f64(written), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["mixed", "split", "window"])
def test_a_key_that_is_no_number_shows_in_its_row_alone(name, implementation, rng):
    """What a broken adapter left in the cache must end its request, and not be left out in silence."""
    case, arguments = draw(name, rng)
    table, position = np.asarray(arguments[4]), np.asarray(arguments[5])
    row = int(position.argmax())
    at = position[row] - 1
    kv = np.array(arguments[3])
    kv[table[row, at // case.page_size], at % case.page_size, ::2] = np.nan  # Keys of all heads.
    out, _ = attend(implementation, case.scale, case.window, (*arguments[:3], jnp.asarray(kv), *arguments[4:]))
    found = np.isnan(f64(out)).reshape(len(position), -1)
    assert found[row].all()
    assert not np.delete(found, row, axis=0).any()


def test_wrong_arguments_are_named(rng):
    _, (qkv, cos, sin, kv, table, position) = draw("mixed", rng)
    for change, text in (
        ({"qkv_BF": qkv[:, :-1]}, "qkv_BF has width 511; with 2 KV heads of size 64 expected a multiple of 128"),
        ({"cos_BX": cos[:, :-1]}, r"cos_BX has shape \(8, 31\); expected \(8, 32\)"),
        ({"page_table_BP": table[1:]}, "page_table_BP has 7 rows; qkv_BF has 8"),
        ({"position_B": position[1:]}, "position_B has 7 rows; qkv_BF has 8"),
        ({"position_B": position.astype(jnp.float32)}, "position_B"),
        ({"q_norm_C": cos[0]}, "q_norm_C and k_norm_C go together: give both, or neither"),
        ({"q_norm_C": qkv[0, :64], "k_norm_C": qkv[0, :63]}, r"k_norm_C has shape \(63,\); expected \(64,\)"),
        ({"kv_PSJC": kv[:, :, :-1]}, "kv_PSJC has 3 heads; keys and values alternate, so it must be even"),
    ):
        arguments = {"qkv_BF": qkv, "cos_BX": cos, "sin_BX": sin, "kv_PSJC": kv, "page_table_BP": table,
                     "position_B": position} | change  # fmt: skip
        with pytest.raises(ValueError, match=text):
            api.decode_attention(**arguments)
    with pytest.raises(NotImplementedError, match="decode_attention has no implementation 'pallas_tpu'"):
        api.decode_attention(qkv, cos, sin, kv, table, position, implementation="pallas_tpu")


def run_debugged(*arguments):
    jax.block_until_ready(api.decode_attention(*arguments))
    jax.effects_barrier()


def test_wrong_pages_and_positions_are_named_while_it_runs(rng):
    _, (qkv, cos, sin, kv, table, position) = draw("mixed", rng)
    for pages, positions, text in (
        (table.at[2, 0].set(10**6), position, "page_table_BP holds 1000000; allowed: 0 to"),
        (table, position.at[1].set(10**6), r"position_B \+ 1 holds 1000001; allowed: 0 to"),
        (table, position.at[1].set(-2), r"position_B \+ 1 holds -1; allowed: 0 to"),
    ):
        with debug.enabled(), pytest.raises(Exception, match=text):
            run_debugged(qkv, cos, sin, kv, pages, positions)
