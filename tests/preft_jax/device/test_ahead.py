"""Programs that are compiled before they are called."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import compiles_nothing

from preft_jax.device.ahead import Program, Rehearsal, shapes_of


@pytest.fixture
def program():
    def made(x, y, *, times):
        return {"sum": times * x + y}

    return Program(made, name="add", static=("times",), donate=("y",))


X, Y = np.arange(3, dtype=np.float32), np.ones(3, np.float32)


def rehearsed(program, *calls):
    rehearsal = Rehearsal()
    with rehearsal:
        for x, y, times in calls:
            found = program(x, y, times=times)
    rehearsal.compile()
    return rehearsal, found


def test_what_was_rehearsed_is_called_and_nothing_is_compiled_then(program):
    rehearsal, found = rehearsed(program, (X, shapes_of(Y), 2), (X, Y, 3), (X, Y, 2))
    assert found == {"sum": jax.ShapeDtypeStruct((3,), jnp.float32)}
    assert [len(seconds) for seconds in rehearsal.seconds.values()] == [2]
    assert (list(rehearsal.seconds), rehearsal.missing, program.num_compiled) == (["add"], [], 2)
    y = jnp.asarray(Y)
    with compiles_nothing():
        np.testing.assert_array_equal(program(X, y, times=2)["sum"], [1, 3, 5])
        np.testing.assert_array_equal(program(jnp.asarray(X), Y, times=3)["sum"], [1, 4, 7])
    assert y.is_deleted(), "it was donated"


def test_what_was_not_rehearsed_is_compiled_when_it_is_called(program):
    rehearsed(program, (X, Y, 2))
    np.testing.assert_array_equal(program(X[:2], Y[:2], times=2)["sum"], [1, 3])
    np.testing.assert_array_equal(program(X, Y.astype(np.int32).astype(np.float32), times=5)["sum"], [1, 6, 11])
    assert program.num_compiled == 3


def test_a_rehearsal_is_one_threads_and_knows_what_others_compiled(program):
    rehearsed(program, (X, Y, 2))
    with Rehearsal() as second:
        program(X, Y, times=2)
        found = []
        thread = threading.Thread(target=lambda: found.append(program(X, Y, times=2)))
        thread.start()
        thread.join()
    assert second.missing == []
    np.testing.assert_array_equal(found[0]["sum"], [1, 3, 5])


def test_a_program_that_cannot_be_compiled_says_why_and_others_are_kept(program):
    def fails(x):
        raise MemoryError("too large")

    bad = Program(fails, name="bad")
    with Rehearsal(), pytest.raises(MemoryError, match="too large"):
        bad(X)
    with Rehearsal() as rehearsal:
        program(X, Y, times=2)
    rehearsal.stop()
    with pytest.raises(InterruptedError):
        rehearsal.compile()
    assert (program.num_compiled, rehearsal.missing) == (0, ["add"])
