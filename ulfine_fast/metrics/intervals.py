"""A mean over seeds and its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds and the half width of its 95% interval.

    Attributes:
        mean: mean of the defined values.
        half: half width of the two-sided 95% t-interval; NaN for a single value.
        n: number of defined values.
    """

    mean: float
    half: float
    n: int


def mean_interval(values: Iterable[float]) -> Interval | None:
    """Mean and 95% t-interval (Student, n - 1 degrees of freedom) of the finite values; None without any."""
    # a metric that one seed lacks still has a mean over the others; n says over how many
    finite = np.array([value for value in values if math.isfinite(value)], dtype=np.float64)
    n = len(finite)
    if n == 0:
        return None
    if n == 1:
        return Interval(float(finite[0]), math.nan, 1)
    from scipy.special import stdtrit  # imported on use: it takes as long as a short fit, and one seed has no interval

    half = float(stdtrit(n - 1, 0.975)) * float(finite.std(ddof=1)) / math.sqrt(n)
    return Interval(float(finite.mean()), half, n)
