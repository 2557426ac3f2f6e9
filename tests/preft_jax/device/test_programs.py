"""Programs by name: compiled once, when they are first asked for, and shared by those of one key."""

import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_programs import forget_shared

from preft_jax.device import programs
from preft_jax.device.compiles import CompileCounter
from preft_jax.device.programs import Programs


@pytest.fixture(autouse=True)
def _none_shared(monkeypatch):
    monkeypatch.setattr(programs, "_shared", {})


@pytest.fixture
def made():
    """Return a function that makes programs of a key, and the names of what was traced."""
    traced = []

    def trace(name, function):
        def run():
            traced.append(name)
            return jax.jit(function).trace(jnp.zeros(3), jnp.zeros(3))

        return run

    def make(key="one"):
        functions = {"add": lambda a, b: a + b, "multiply": lambda a, b: a * b}
        return Programs({name: trace(name, function) for name, function in functions.items()}, key=key)

    return make, traced


def test_a_program_is_compiled_once_when_it_is_first_asked_for(made):
    make, traced = made
    ours = make()
    assert not traced
    a, b = jnp.arange(3.0), jnp.full(3, 2.0)
    for _ in range(2):
        assert ours["add"](a, b).tolist() == [2, 3, 4]
    assert traced == ["add"]
    assert ours["multiply"](a, b).tolist() == [0, 2, 4]
    assert traced == ["add", "multiply"]


def test_programs_are_a_mapping_that_compiles_nothing_by_being_listed(made):
    make, traced = made
    ours = make()
    assert list(ours) == ["add", "multiply"]
    assert len(ours) == 2
    assert "add" in ours
    assert "divide" not in ours
    assert not traced
    with pytest.raises(KeyError, match="divide"):
        ours["divide"]


def test_seconds_are_of_compiled_programs_and_missing_are_the_others(made):
    make, _ = made
    ours = make()
    assert (ours.seconds, ours.missing) == ({}, ["add", "multiply"])
    ours["multiply"]
    assert list(ours.seconds) == ["multiply"]
    assert ours.seconds["multiply"] >= 0
    assert ours.missing == ["add"]


def test_programs_of_one_key_are_shared(made):
    make, traced = made
    add = make()["add"]
    other = make()
    assert other["add"] is add
    assert other.missing == ["multiply"]
    assert make("two")["add"] is not add
    assert traced == ["add", "add"]
    forget_shared()
    assert make()["add"] is not add


def test_all_that_are_missing_compile_together(made):
    make, traced = made
    ours = make()
    add = ours["add"]
    ours.compile_missing()
    assert not ours.missing
    assert ours["add"] is add
    assert traced == ["add", "multiply"]


def test_a_program_is_compiled_while_the_next_one_is_traced():
    def add():
        return jax.jit(lambda a: a + 1).trace(jnp.zeros(3))

    def late():
        end = time.monotonic() + 60
        while ours.missing != ["late"]:
            assert time.monotonic() < end, "tracing waits for nothing"
            time.sleep(0.001)
        return add()

    ours = Programs({"add": add, "late": late}, key="one")
    ours.compile_missing()
    assert not ours.missing


def test_a_program_that_cannot_be_traced_or_compiled_is_told():
    def broken():
        raise ValueError("no such shape")

    with pytest.raises(ValueError, match="no such shape"):
        Programs({"broken": broken}, key="two").compile_missing()
    failing = Programs({"failing": lambda: types.SimpleNamespace(lower=broken)}, key="three")
    with pytest.raises(ValueError, match="no such shape"):
        failing.compile_missing()
    assert failing.missing == ["failing"]


def test_a_program_can_be_traced_without_being_compiled(made):
    make, _ = made
    ours = make()
    assert "multiply" in ours.trace("multiply").lower().as_text()
    assert ours.missing == ["add", "multiply"]


def test_they_are_not_counted_among_what_compiles_by_mistake(made):
    make, _ = made
    ours, a = make(), jnp.arange(3.0)
    with CompileCounter() as counter:
        ours["add"](a, a)
        ours.trace("multiply")
        assert counter.count == 0
        jax.jit(lambda a: a * 5 - 1)(a)
    assert counter.count == 1


def test_what_another_thread_compiles_counts_where_all_do(caplog):
    def elsewhere(x):
        return x * 3 + 1

    with CompileCounter() as every, CompileCounter(own_thread=True) as own:
        other = threading.Thread(target=lambda: jax.jit(elsewhere)(np.ones(3)))
        other.start()
        other.join()
        assert own.count == 0 < every.count
        jax.jit(lambda x: x * 5 + 2)(np.ones(3))
    assert own.count > 0
    assert "compiled while serving" in caplog.text
    assert "elsewhere" in caplog.text
