"""Every implementation of every operation on the shared cases, against float64 NumPy on fresh random inputs.

Each run starts from memory full of NaN, and pages and slots that the batch does not use hold NaN: nothing of either may
reach a result. Each runs twice and must repeat every bit. On a GPU: ``pytest -m gpu tests/kernels``.

Tolerances. float32: 1e-5 of the largest element of the result; the sums have at most 14,336 terms of random sign, whose
rounding errors of 6e-8 grow with the root of their number. bfloat16: 1e-2 of the norm of the result, and 2e-2 of the
norm of a typical row for each row, so that one wrong token cannot hide among many; inputs are the same rounded numbers
on both sides, and an operation rounds its intermediate results (8 bits, 2e-3 each) a handful of times.
"""

import functools

import jax
import jax.numpy as jnp
import kernel_reference as reference
import numpy as np
import pytest
from kernel_reference import f64

from bench.attention_case import AttentionCase
from bench.edit_case import NORM_EPS, EditCase, run_edit
from bench.kernel_cases import select
from kernels import api
from kernels.types import PagePool, Site

EDITS = [case for case in select("test") if isinstance(case, EditCase)]
ATTENTION = [case for case in select("test") if isinstance(case, AttentionCase)]


def edits(pattern):
    return [case for case in select("test", pattern) if isinstance(case, EditCase)]


def named(name):
    return next(case for case in EDITS if case.name == name)


def over(cases):
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture(autouse=True)
def full_float32():
    """On a GPU, XLA multiplies float32 matrices in TF32, with 10 bits, unless it is told not to."""
    with jax.default_matmul_precision("highest"):
        yield


# Programs: one for each operation, implementation and shape, whichever case it is.

edit_program = jax.jit(run_edit, static_argnames=("op", "implementation"))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def attention_program(implementation, max_query_len, scale, window, inputs):
    return api.paged_attention(
        *inputs, max_query_len=max_query_len, scale=scale, window=window, implementation=implementation
    )


@functools.partial(jax.jit, static_argnums=0)
def gradient_program(implementation, x, y, site, mask, dy):
    """Return the gradients of ``sum(dy * lowrank_edit(...))`` in x, y and the pool."""

    def loss(x, y, pool):
        out = api.lowrank_edit(x, y, pool, site.tiles, mask, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) * dy.astype(jnp.float32))

    return jax.grad(loss, argnums=(0, 1, 2))(x, y, site.pool)


def poison(like):
    """Fill free memory with NaN where the next outputs will lie.

    JAX's GPU allocator (and malloc) gives freed blocks out again, those of a fitting size first: arrays of the sizes
    of the outputs, freed just before the run, are what the run is given. Without this an element that no thread block
    writes would hold whatever was there, often the right result of the run before.
    """
    jax.block_until_ready([jnp.asarray(np.full_like(leaf, np.nan)) for leaf in jax.tree.leaves(like)])


def run_twice(program, *arguments):
    """Run a program, and again over poisoned memory; both runs must agree in every bit."""
    results = []
    for _ in range(2):
        results.append(jax.tree.map(np.array, program(*arguments)))
        poison(results[-1])
    for first, second in zip(*map(jax.tree.leaves, results), strict=True):
        assert first.tobytes() == second.tobytes()
    return results[1]


def spoil_pages(inputs):
    """Put NaN into the rank pages that no token names; the null page stays as it is."""

    rows = {id(site.pool): pages for site, pages in zip(inputs.sites, inputs.pages, strict=False)}

    def spoiled(site):
        named = rows[id(site.pool)] if site.tiles is None else site.tiles.page_NE
        unused = np.setdiff1d(np.arange(1, len(site.pool.c_PR)), np.asarray(named))
        if not unused.size:
            return site
        pool = [np.array(leaf) for leaf in site.pool]
        for leaf in pool:
            leaf[unused] = np.nan
        return site._replace(pool=PagePool(*map(jnp.asarray, pool)))

    return jax.tree.map(
        lambda leaf: spoiled(leaf) if isinstance(leaf, Site) else leaf, inputs, is_leaf=lambda x: isinstance(x, Site)
    )


def spoil_slots(inputs):
    """Put NaN into every KV slot that no request's keys are in."""
    kv = np.array(inputs.kv_PSJC)
    size = kv.shape[1]
    live = np.zeros(kv.shape[:2], bool)
    for pages, keys in zip(np.asarray(inputs.page_table_BP), np.asarray(inputs.kv_len_B), strict=True):
        position = np.arange(keys)
        live[pages[position // size], position % size] = True
    kv[~live] = np.nan
    return inputs._replace(kv_PSJC=jnp.asarray(kv))


def assert_close(ours, expected, dtype):
    """Compare trees of results by the tolerances above."""
    for one, ref in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        one = f64(one)
        assert one.shape == ref.shape
        np.testing.assert_array_equal(np.isnan(one), np.isnan(ref))
        one, ref = np.nan_to_num(one), np.nan_to_num(ref)
        if not ref.any():
            assert not one.any()
        elif dtype == "float32":
            np.testing.assert_allclose(one, ref, rtol=0, atol=1e-5 * max(1.0, np.abs(ref).max()))
        else:
            assert np.linalg.norm(one - ref) < 1e-2 * np.linalg.norm(ref)
            error, norm = (np.linalg.norm(array, axis=-1) for array in (one - ref, ref))
            typical = np.sqrt((norm[norm > 0] ** 2).mean())
            assert (error < 2e-2 * np.maximum(norm, typical)).all()


# Each operation.


@over(EDITS)
def test_edit(case, implementation, rng):
    inputs = spoil_pages(case.inputs(rng))
    try:
        ours = run_twice(edit_program, case.op, inputs, implementation)
    except NotImplementedError as error:
        if "odd" not in case.tags:
            raise
        pytest.skip(str(error))
    assert_close(ours, reference.edit_op(case.op, inputs), case.dtype)


@over(ATTENTION)
def test_attention(case, implementation, rng):
    inputs = spoil_slots(case.inputs(rng))
    longest = case.max_query_len or max(case.query_lens)
    try:
        ours = run_twice(attention_program, implementation, longest, case.scale, case.window, inputs)
    except NotImplementedError as error:
        if "odd" not in case.tags:
            raise
        pytest.skip(str(error))
    assert ours.dtype == case.dtype
    assert_close(ours, reference.paged_attention(inputs, case.scale, case.window), case.dtype)


@over([c for c in ATTENTION if not (c.window or c.padding or c.shared_pages or "odd" in c.tags)])
def test_a_key_that_is_no_number_shows_in_its_request_alone(case, implementation, rng):
    """What a broken adapter left in the cache must end its request, and not be left out in silence."""
    inputs = spoil_slots(case.inputs(rng))
    request = int(np.asarray(inputs.kv_len_B).argmax())
    kv = np.array(inputs.kv_PSJC)
    kv[np.asarray(inputs.page_table_BP)[request, 0], 0, ::2] = np.nan  # The first key of all heads.
    longest = case.max_query_len or max(case.query_lens)
    inputs = inputs._replace(kv_PSJC=jnp.asarray(kv))
    found = np.isnan(f64(attention_program(implementation, longest, case.scale, None, inputs)))
    start = np.asarray(inputs.query_start_B1)
    assert found[start[request] : start[request + 1]].all()
    assert not found[: start[request]].any()
    assert not found[start[request + 1] :].any()


@over(edits("lowrank_edit"))
def test_gradients_through_the_api(case, implementation, rng):
    inputs = spoil_pages(case.inputs(rng))
    dy = jnp.asarray(rng.standard_normal(inputs.y_TF.shape), inputs.y_TF.dtype)
    (site,) = inputs.sites
    arguments = (inputs.x_TD, inputs.y_TF, site, inputs.mask_TG, dy)
    dx, dy_again, pool = run_twice(gradient_program, implementation, *arguments)
    expected = reference.lowrank_gradients(f64(inputs.x_TD), site, inputs.mask_TG, f64(dy))
    np.testing.assert_array_equal(dy_again, np.asarray(dy))
    assert pool.a_PDR.dtype == pool.b_PRF.dtype == case.dtype
    assert_close((dx, *pool), expected, case.dtype)


# What tolerances would hide.


@over(edits("expand/*") + edits("lowrank_edit/*"))
def test_tokens_without_edits_keep_every_bit(case, implementation, rng):
    inputs = case.inputs(rng)
    tiles = inputs.all_sites()[0].tiles
    edited = np.zeros(case.num_tokens, bool)
    for rows, *_ in reference.entries(tiles, inputs.mask_TG):
        edited[rows] = True
    try:
        ours = np.asarray(edit_program(case.op, inputs, implementation))
    except NotImplementedError as error:
        pytest.skip(str(error))
    y = np.asarray(inputs.y_TF)
    assert ours.dtype == y.dtype
    assert ours[~edited].tobytes() == y[~edited].tobytes()
    assert edited.any() == (ours.tobytes() != y.tobytes())


@over(edits("shrink/narrow/*mixed*") + edits("shrink/narrow/*crowd*"))
def test_what_is_not_edited_shrinks_to_exact_zeros(case, implementation, rng):
    """Expand relies on it: it asks no mask."""
    inputs = case.inputs(rng)
    for ours, site in zip(edit_program(case.op, inputs, implementation), inputs.sites, strict=True):
        owned = np.zeros(ours.shape[:2], bool)
        for rows, e, _ in reference.entries(site.tiles, inputs.mask_TG):
            owned[rows, e] = True
        assert not np.asarray(ours)[~owned].any()


@over(edits("shrink/narrow/*mixed*") + edits("lowrank_edit/narrow/*mixed*"))
def test_a_token_of_nan_spoils_itself_only(case, implementation, rng):
    """Padding rows may hold anything, and a broken request must not break those in its tile."""
    inputs = case.inputs(rng)
    clean = edit_program(case.op, inputs, implementation)
    bad = np.array([7, 23, case.num_tokens - 1])
    spoiled = edit_program(case.op, inputs._replace(x_TD=inputs.x_TD.at[bad].set(jnp.nan)), implementation)
    for one, other in zip(jax.tree.leaves(spoiled), jax.tree.leaves(clean), strict=True):
        one, other = (np.delete(np.asarray(array), bad, axis=0) for array in (one, other))
        np.testing.assert_array_equal(one, other)


@over(edits("rope_kv/*"))
def test_slots_that_no_token_writes_keep_every_bit(case, implementation, rng):
    inputs = case.inputs(rng)
    before = np.array(inputs.kv_PSJC)
    written = np.zeros(before.shape[0] * before.shape[1], bool)
    slots = np.asarray(inputs.slots_T)
    written[slots[slots < len(written)]] = True
    unwritten = ~written.reshape(before.shape[:2])
    before[unwritten] = np.nan
    _, after = edit_program(case.op, inputs._replace(kv_PSJC=jnp.asarray(before)), implementation)
    assert np.asarray(after)[unwritten].tobytes() == before[unwritten].tobytes()
    assert not np.isnan(f64(after)[~unwritten]).any()


# Fused operations are their parts.


def norm_shrink_by_parts(inputs, implementation):
    x = inputs.x_TD
    for edit in inputs.edits:
        x = api.expand(edit.s_TER, x, *edit.site, implementation=implementation)
    if inputs.block is not None:
        x = api.lowrank_edit(x, x, *inputs.block, inputs.mask_TG, implementation=implementation)
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=1, keepdims=True) + NORM_EPS)
    h = (x32 * scale).astype(x.dtype) * inputs.weight_D
    return x, h, shrink_by_parts(h, inputs, implementation)


def shrink_by_parts(h, inputs, implementation):
    pools, tiles = ([getattr(site, name) for site in inputs.sites] for name in ("pool", "tiles"))
    return api.shrink(h, pools, tiles, inputs.mask_TG, implementation=implementation)


def expand_or_not(edit, y, implementation):
    return y if edit is None else api.expand(edit.s_TER, y, *edit.site, implementation=implementation)


def head_norm(x, weight):
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=2, keepdims=True) + NORM_EPS)).astype(x.dtype) * weight


def rope_kv_by_parts(inputs, implementation):
    kv = inputs.kv_PSJC
    channels, kv_width = kv.shape[3], kv.shape[2] // 2 * kv.shape[3]
    q_width = inputs.x_TD.shape[1] - 2 * kv_width
    parts = jnp.split(inputs.x_TD, (q_width, q_width + kv_width), axis=1)
    q, k, v = (
        expand_or_not(edit, y, implementation).reshape(y.shape[0], -1, channels)
        for edit, y in zip(inputs.edits, parts, strict=True)
    )

    def rotate(x):
        cos, sin = (jnp.concatenate([table, table], axis=1)[:, None] for table in (inputs.cos_TX, inputs.sin_TX))
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=2)
        return (x.astype(jnp.float32) * cos + jnp.concatenate([-second, first], axis=2) * sin).astype(x.dtype)

    if inputs.q_norm_C is not None:
        q, k = head_norm(q, inputs.q_norm_C), head_norm(k, inputs.k_norm_C)
    new = jnp.stack([rotate(k), v], axis=2).reshape(k.shape[0], *kv.shape[2:])
    return rotate(q), kv.reshape(-1, *kv.shape[2:]).at[inputs.slots_T].set(new, mode="drop").reshape(kv.shape)


def silu_mul_shrink_by_parts(inputs, implementation):
    halves = jnp.split(inputs.x_TD, 2, axis=1)
    gate, up = (expand_or_not(edit, y, implementation) for edit, y in zip(inputs.edits, halves, strict=True))
    h = jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up
    return h, shrink_by_parts(h, inputs, implementation)


PARTS = {
    "norm_shrink": norm_shrink_by_parts,
    "rope_kv": rope_kv_by_parts,
    "silu_mul_shrink": silu_mul_shrink_by_parts,
}

FUSED = [
    named("norm_shrink/narrow/down+block->q+k+v/mixed"),
    named("norm_shrink/smollm2-135m/o->gate+up/mixed/bf16"),
    named("rope_kv/narrow/q+k+v/mixed"),
    named("rope_kv/smollm2-135m/q+k+v/mixed/bf16"),
    named("rope_kv/narrow/q+k+v/head-norm"),
    named("rope_kv/smollm2-135m/q+k+v/head-norm/bf16"),
    named("silu_mul_shrink/narrow/gate+up->down/mixed"),
    named("silu_mul_shrink/smollm2-135m/gate+up->down/mixed/bf16"),
]


@over(FUSED)
def test_a_fused_operation_is_its_parts(case, implementation, rng):
    inputs = case.inputs(rng)
    fused = edit_program(case.op, inputs, implementation)
    parts = jax.jit(PARTS[case.op], static_argnums=1)(inputs, implementation)
    assert jax.tree.map(lambda leaf: leaf.dtype, fused) == jax.tree.map(lambda leaf: leaf.dtype, parts)
    assert_close(fused, jax.tree.map(f64, parts), case.dtype)


@over([named("norm_shrink/narrow/down+block->q+k+v/mixed"), named("norm_shrink/smollm2-135m/o->gate+up/mixed/bf16")])
def test_norm_shrink_adds_a_linears_output_to_the_stream(case, implementation, rng):
    inputs = case.inputs(rng)
    add = jnp.asarray(rng.standard_normal(inputs.x_TD.shape), case.dtype)

    def program(x_TD, add_TD, inputs):
        return api.norm_shrink(
            x_TD, inputs.edits, inputs.block, inputs.weight_D, NORM_EPS, inputs.sites, inputs.mask_TG,
            add_TD=add_TD, implementation=implementation,
        )  # fmt: skip

    ours = run_twice(jax.jit(program), inputs.x_TD, add, inputs)
    x, weight = f64(inputs.x_TD) + f64(add), f64(inputs.weight_D)
    expected = reference.norm_shrink(
        x, inputs.edits, inputs.block, weight, inputs.sites, np.asarray(inputs.mask_TG)
    )  # fmt: skip
    assert_close(ours, expected, case.dtype)


# The references themselves.


def test_float64_gradients_are_those_of_finite_differences(rng):
    """Central differences of step 1e-6 of a cubic in float64: 1e-7 of the derivative."""
    inputs = named("lowrank_edit/narrow/q/mixed").inputs(rng)
    ((pool, tiles),), mask, x, y = inputs.sites, inputs.mask_TG, f64(inputs.x_TD), f64(inputs.y_TF)
    pool, dy = PagePool(*map(f64, pool)), rng.standard_normal(y.shape)

    def loss(x, a, c, b):
        return (dy * reference.lowrank_edit(x, y, Site(PagePool(a, c, b), tiles), mask)).sum()

    gradients = reference.lowrank_gradients(x, Site(pool, tiles), mask, dy)
    at = [x, *pool]
    for i, gradient in enumerate(gradients):
        step = 1e-6 * rng.standard_normal(at[i].shape)
        step[0] = 0
        up, down = (loss(*at[:i], at[i] + sign * step, *at[i + 1 :]) for sign in (1, -1))
        np.testing.assert_allclose((gradient * step).sum(), (up - down) / 2, rtol=1e-6)


def test_the_cases_hold_the_edges_that_they_are_for(rng):
    """The list of cases is what every implementation is judged by."""
    layout = named("shrink/narrow/q+k+v/crowd").layout(rng)
    page, start, end, _ = layout.table
    spans = {(s, e) for s, e, p in zip(start[0], end[0], page[0], strict=True) if p}
    assert page.shape[0] == 1
    assert len(spans) == 33
    ranks = {rank for case in EDITS for rank in case.ranks}
    assert {0, 4, 256} <= ranks
    for label in ("all-masked", "null-pages", "base-only"):
        for case in edits(f"*/{label}"):
            assert not case.layout(rng).owned().any()
    groups = named("lowrank_edit/narrow/q/f7+l7").layout(rng)
    assert set(groups.table[3][groups.table[0] > 0]) == {0, 1}
    assert {case.tile for case in EDITS if "odd" not in case.tags} == {16, 32, 64, 128}
    assert {case.dtype for case in EDITS} == {case.dtype for case in ATTENTION} == {"float32", "bfloat16"}
    assert {case.page_size for case in ATTENTION} == {16, 64}
    assert {case.head_size for case in ATTENTION} == {64, 128}


# Outputs of several linears side by side.


@pytest.mark.parametrize("batch", [5, 208])
@pytest.mark.parametrize("edited", [(0, 1, 2), (0, 2), (1,)])
def test_a_decode_edit_of_some_columns_leaves_the_others(batch, edited, implementation, rng):
    """Linears have pages of their own, one, two or three a row."""
    widths, pages = (64, 96, 32), 6
    x = rng.standard_normal((batch, 128)).astype(np.float32)
    y = rng.standard_normal((batch, sum(widths))).astype(np.float32)
    wanted, pools, lists = y.astype(np.float64), [], []
    columns = [sum(widths[:n]) for n in edited]
    for n, column in zip(edited, columns, strict=True):
        page = rng.integers(0, pages, (batch, 1 + n)).astype(np.int32)
        a, c, b = (rng.standard_normal(shape) for shape in ((pages, 128, 16), (pages, 16), (pages, 16, widths[n])))
        for array in (a, c, b):
            array[0] = 0
        pool = PagePool(*(jnp.asarray(array, jnp.float32) for array in (a, c, b)))
        s = np.einsum("bd,bedr->ber", x, f64(pool.a_PDR)[page]) + f64(pool.c_PR)[page]
        wanted[:, column : column + widths[n]] += np.einsum("ber,berf->bf", s, f64(pool.b_PRF)[page])
        pools.append(pool)
        lists.append(page)
    program = jax.jit(functools.partial(api.decode_edit, columns=columns, implementation=implementation))
    found = program(x, y, pools, lists)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": [-1]}, r"columns\[0\] is -1; allowed for these widths of y_BF and pool: 0 to 32"),
        ({"columns": [33]}, r"columns\[0\] is 33; allowed for these widths of y_BF and pool: 0 to 32"),
        ({"columns": [0, 32]}, "columns has 2 linears, pools 1"),
        ({"pages": []}, "pools has 1 linears, pages 0"),
        (
            {"columns": [0, 16], "pools": 2, "pages": 2},
            r"columns are \[0, 16\]; the output before 16 ends at 32, and",
        ),
        ({"columns": None}, r"pool.b_PRF has output width 32; y has 64"),
    ],
)
def test_linears_of_a_decode_edit_that_do_not_fit_are_refused(changes, message):
    pool = PagePool(jnp.zeros((2, 32, 16)), jnp.zeros((2, 16)), jnp.zeros((2, 16, 32)))
    options = {"pools": [pool], "pages": [jnp.zeros((3, 1), jnp.int32)], "columns": [0]}
    options |= {name: options[name] * value if isinstance(value, int) else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        api.decode_edit(jnp.zeros((3, 32)), jnp.zeros((3, 64)), **options)


def test_a_decode_edit_without_linears_changes_nothing():
    y = jnp.ones((3, 64))
    assert api.decode_edit(jnp.zeros((3, 32)), y, [], [], columns=[]) is y


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    (case,) = select("test", "attention/decode/one-row")
    inputs = case.inputs(np.random.default_rng(0))
    with pytest.raises(ValueError, match=f"scale is {scale}; give a positive number"):
        api.paged_attention(*inputs, max_query_len=1, scale=scale)


@pytest.mark.parametrize("window", [0, -4, 2.5])
def test_a_window_that_is_no_positive_integer_is_refused(window):
    (case,) = select("test", "attention/decode/one-row")
    inputs = case.inputs(np.random.default_rng(0))
    with pytest.raises(ValueError, match=f"window is {window}; give a positive integer, or None"):
        api.paged_attention(*inputs, max_query_len=1, window=window)
