"""Checks of array contents, and how an implementation is chosen or refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from bench.kernel_cases import CASES
from kernels import api, debug, dispatch

ATTENTION = {
    "page_table_BP": (lambda a: a.at[0, 0].set(10**6), "page_table_BP holds 1000000; allowed: 0 to"),
    "kv_len_B": (lambda a: a.at[1].set(10**6), "kv_len_B holds 1000000; allowed: 0 to"),
    # Two checks see it; under jit either may be the first to report.
    "query_start_B1": (
        lambda a: a.at[-1].set(10**6),
        r"query_start_B1(: the length of a run in it)? holds \d+; allowed: 0 to",
    ),
}


def case_named(name):
    return next(case for case in CASES if case.name == name)


def with_tiles(inputs, **changes):
    """Return inputs with arrays of the page lists of their first site or edit changed."""
    if inputs.sites:
        first, *rest = inputs.sites
        tiles = first.tiles._replace(**{name: change(getattr(first.tiles, name)) for name, change in changes.items()})
        return inputs._replace(sites=(first._replace(tiles=tiles), *rest))
    first, *rest = inputs.edits
    tiles = first.site.tiles
    tiles = tiles._replace(**{name: change(getattr(tiles, name)) for name, change in changes.items()})
    return inputs._replace(edits=(first._replace(site=first.site._replace(tiles=tiles)), *rest))


EDITS = {
    "shrink": "shrink/narrow/q+k+v/mixed",
    "expand": "expand/narrow/v/mixed",
    "lowrank_edit": "lowrank_edit/narrow/q/mixed",
    "norm_shrink": "norm_shrink/narrow/o->gate+up/mixed",
    "rope_kv": "rope_kv/narrow/q+k+v/mixed",
    "silu_mul_shrink": "silu_mul_shrink/narrow/gate+up->down/mixed",
}


CALLS = {**EDITS, "decode_edit": "decode_edit/narrow/qkv/mixed", "paged_attention": "attention/ragged/full-pool"}


def run(case, inputs, *, jit):
    """Run a case and wait for it; a program of its own each time, so that it is traced here."""
    call = jax.jit(lambda inputs: case.run(inputs)) if jit else case.run
    jax.block_until_ready(call(inputs))
    jax.effects_barrier()


both_ways = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])


@both_ways
@pytest.mark.parametrize(("op", "page"), [*((op, 999) for op in EDITS), ("shrink", -1)])
def test_wrong_rank_pages_are_named(op, page, jit, rng):
    case = case_named(EDITS[op])
    inputs = with_tiles(case.inputs(rng), page_NE=lambda array: array.at[0, 0].set(page))
    with debug.enabled(), pytest.raises(Exception, match=rf"tiles\.page_NE holds {page}; allowed: 0 to"):
        run(case, inputs, jit=jit)


@both_ways
@pytest.mark.parametrize(
    ("name", "value"), [("start_NE", -1), ("end_NE", -3), ("end_NE", 17), ("group_NE", -1), ("group_NE", 2)]
)
def test_spans_beyond_a_tile_and_groups_beyond_the_mask_are_named(name, value, jit, rng):
    case = case_named(EDITS["shrink"])
    inputs = with_tiles(case.inputs(rng), **{name: lambda array: array.at[0, 0].set(value)})
    with debug.enabled(), pytest.raises(Exception, match=rf"tiles\.{name} holds {value}"):
        run(case, inputs, jit=jit)


@both_ways
def test_wrong_pages_of_a_decoding_row_are_named(jit, rng):
    case = case_named("decode_edit/narrow/qkv/mixed")
    inputs = case.inputs(rng)
    inputs = inputs._replace(pages=(inputs.pages[0].at[3, 0].set(10**6),))
    with debug.enabled(), pytest.raises(Exception, match=r"pages\[0\] holds 1000000; allowed: 0 to"):
        run(case, inputs, jit=jit)


@both_ways
@pytest.mark.parametrize("name", ATTENTION)
def test_wrong_kv_pages_and_lengths_are_named(name, jit, rng):
    change, text = ATTENTION[name]
    case = case_named("attention/ragged/full-pool")
    inputs = case.inputs(rng)
    inputs = inputs._replace(**{name: change(getattr(inputs, name))})
    with debug.enabled(), pytest.raises(Exception, match=text):
        run(case, inputs, jit=jit)


@both_ways
def test_more_queries_than_were_announced_are_named(jit, rng):
    case = dataclasses.replace(case_named("attention/ragged/full-pool"), max_query_len=1)
    inputs = case.inputs(rng)
    with (
        debug.enabled(),
        pytest.raises(Exception, match=r"query_start_B1: the length of a run in it holds \d+; allowed: 0 to 1"),
    ):
        run(case, inputs, jit=jit)


def test_right_arguments_pass(rng):
    with debug.enabled():
        for case in map(case_named, CALLS.values()):
            run(case, case.inputs(rng), jit=True)


def test_gradients_are_checked_too(rng):
    case = case_named(EDITS["lowrank_edit"])
    inputs = with_tiles(case.inputs(rng), page_NE=lambda array: array.at[0, 0].set(999))
    with debug.enabled(), pytest.raises(Exception, match=r"tiles\.page_NE holds 999"):
        jax.grad(lambda x: case.run(inputs._replace(x_TD=x)).sum())(inputs.x_TD)


@both_ways
def test_nothing_is_checked_unless_it_is_asked_for(jit, rng):
    case = case_named(EDITS["shrink"])
    wrong = with_tiles(case.inputs(rng), page_NE=lambda array: array.at[0, 0].set(999))
    run(case, wrong, jit=jit)
    with debug.enabled(), debug.enabled(False):
        run(case, wrong, jit=jit)
    with debug.enabled():
        pass
    run(case, wrong, jit=jit)


def test_checks_cost_a_program_nothing_unless_enabled(rng):
    case = case_named("attention/ragged/full-pool")
    inputs = case.inputs(rng)
    assert "callback" not in str(jax.make_jaxpr(lambda inputs: case.run(inputs))(inputs))
    with debug.enabled():
        assert "callback" in str(jax.make_jaxpr(lambda inputs: case.run(inputs))(inputs))


# Which implementation runs.


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="triton runs here")
@pytest.mark.parametrize("op", CALLS)
def test_an_implementation_that_cannot_run_here_says_why(op, rng):
    case = case_named(CALLS[op])
    with pytest.raises(NotImplementedError, match=r"triton.*(GPU|CUDA|imported)"):
        case.run(case.inputs(rng), "triton")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a CPU prefers xla")
@pytest.mark.parametrize("op", CALLS)
def test_a_cpu_takes_the_reference_unless_told_otherwise(op, rng):
    case = case_named(CALLS[op])
    inputs = case.inputs(rng)
    unasked, asked = (jax.jit(functools.partial(case.run, implementation=name)).lower(inputs) for name in (None, "xla"))
    assert unasked.as_text() == asked.as_text()


def test_an_implementation_that_refuses_these_shapes_gives_way_only_unasked_and_is_named(rng, monkeypatch, caplog):
    case = case_named(CALLS["paged_attention"])
    inputs = case.inputs(rng)
    real = dispatch.load

    def load(name, op):
        if name == "triton":
            raise dispatch.Unsupported(f"{op}: not with a head size like that")
        return real(name, op)

    monkeypatch.setattr(dispatch, "load", load)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert jnp.isfinite(jax.jit(case.run)(inputs)).all()
    assert "paged_attention runs in plain JAX, not by its triton kernel: paged_attention: not with" in caplog.text
    with pytest.raises(NotImplementedError, match="head size like that"):
        case.run(inputs, "triton")


def test_a_device_whose_kernels_are_not_installed_says_so(rng, monkeypatch):
    case = case_named(CALLS["paged_attention"])
    monkeypatch.setitem(dispatch.MODULES, "triton", "kernels.not_installed")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    dispatch._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"triton.*pip install preft-jax\[gpu\].*plain JAX instead"):
        assert jnp.isfinite(case.run(case.inputs(rng))).all()


def test_a_mistake_inside_an_implementation_is_not_taken_for_a_refusal(rng, monkeypatch):
    """Falling back would hide it."""

    def load(name, op):
        raise NotImplementedError("a bug") if name == "triton" else AssertionError(name)

    monkeypatch.setattr(dispatch, "load", load)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    case = case_named(CALLS["paged_attention"])
    with pytest.raises(NotImplementedError, match="a bug"):
        case.run(case.inputs(rng))


def test_every_operation_is_offered_where_the_api_says():
    for op in (*CALLS, "shrink_backward", "expand_backward"):
        if op != "lowrank_edit":
            assert "xla" in dispatch.OFFERED[op]
            assert callable(dispatch.load("xla", op))
    assert set(dispatch.OFFERED) - {"shrink_backward", "expand_backward"} == {
        name for name in dir(api) if name in dispatch.OFFERED
    }
