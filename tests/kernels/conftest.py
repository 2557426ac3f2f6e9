"""What tests of the kernels share: the implementations that they run."""

import os

import jax
import pytest


@pytest.fixture(params=("xla", pytest.param("triton", marks=pytest.mark.gpu)))
def implementation(request):
    """Return each implementation; ``pallas_tpu`` has tests of its own, since it runs in an interpreter."""
    if request.param == "triton" and jax.default_backend() != "gpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("triton needs an NVIDIA GPU, or its interpreter (TRITON_INTERPRET=1)")
    return request.param
