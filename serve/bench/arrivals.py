"""When requests of a benchmark arrive, in seconds after its start."""

import math

import numpy as np

from preft_jax.errors import ConfigError


def draw_arrivals(
    rng: np.random.Generator, num_requests: int, request_rate: float = math.inf, burstiness: float = 1.0
) -> list[float]:
    """Draw arrival times that rise from 0; they are vLLM's gamma process.

    Gaps have mean ``1 / request_rate`` and shape ``burstiness``: 1 is a Poisson process, less comes in bursts, more is
    more even. An infinite rate lets every request arrive at once.

    Raises:
        ConfigError: if rate or burstiness is not positive.
    """
    if not request_rate > 0:
        raise ConfigError(f"--request-rate is {request_rate}; give requests per second above 0, or inf")
    if not 0 < burstiness < math.inf:
        raise ConfigError(f"--burstiness is {burstiness}; give a number above 0 (1 is a Poisson process)")
    if math.isinf(request_rate):
        return [0.0] * num_requests
    gaps = rng.gamma(burstiness, 1 / (request_rate * burstiness), max(num_requests - 1, 0))
    return [0.0, *np.cumsum(gaps).tolist()][:num_requests]
