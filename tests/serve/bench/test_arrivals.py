import math

import numpy as np
import pytest

from preft_jax.errors import ConfigError
from serve.bench.arrivals import draw_arrivals

pytestmark = pytest.mark.host


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(rng, burstiness):
    times = draw_arrivals(rng, 40_001, request_rate=5.0, burstiness=burstiness)
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.min() >= 0
    # Of n gamma gaps the mean's relative standard error is 1 / sqrt(n shape): 1% at the least shape. Six of them.
    assert gaps.mean() == pytest.approx(0.2, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.1)


def test_without_a_rate_all_arrive_at_once():
    assert draw_arrivals(np.random.default_rng(0), 3) == [0.0] * 3
    assert len(draw_arrivals(np.random.default_rng(0), 1, 2.0)) == 1


def test_one_seed_is_one_process():
    first, again, other = (draw_arrivals(np.random.default_rng(seed), 9, 2.0) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("options", [{"request_rate": 0.0}, {"request_rate": math.nan}, {"burstiness": -1.0}])
def test_impossible_processes_are_refused(options):
    with pytest.raises(ConfigError, match="--"):
        draw_arrivals(np.random.default_rng(0), 2, **options)
