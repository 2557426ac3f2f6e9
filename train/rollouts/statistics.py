"""Means with intervals: how far a mean of few numbers may be from what it estimates."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special


class Interval(NamedTuple):
    """A mean and the ends of its 95% interval; these are not numbers where there are fewer than two values."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of values and its 95% interval by Student's t; NaN are left out.

    Values must not depend on each other: those of one prompt's samples do, so take the mean of each prompt first.
    """
    kept = np.asarray(values, np.float64)
    kept = kept[~np.isnan(kept)]
    if len(kept) == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    mean = float(kept.mean())
    if len(kept) == 1:
        return Interval(mean, float("nan"), float("nan"))
    half = float(special.stdtrit(len(kept) - 1, 0.975) * kept.std(ddof=1) / np.sqrt(len(kept)))
    return Interval(mean, mean - half, mean + half)
