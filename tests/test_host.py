"""The marker ``host``: its tests compile nothing."""

import jax
import numpy as np
import pytest
from conftest import compiles_nothing


def test_a_compiled_program_fails_a_host_test_and_its_name_is_said():
    with pytest.raises(pytest.fail.Exception, match=r"compiled jit\(doubled\)"), compiles_nothing():  # noqa: PT012

        @jax.jit
        def doubled(x):
            return x * 2

        doubled(np.ones(3, np.float32))


def test_arrays_and_shapes_are_no_programs():
    with compiles_nothing():
        jax.eval_shape(lambda x: x * 2, np.ones(3))
        np.asarray(jax.device_put(np.ones(3)))
