"""What several seeds say together: a mean and how far it can be believed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with the half width of its 95% interval.

    Attributes:
        mean: mean of the defined values.
        half: half width of the two-sided 95% t-interval; NaN for a single value.
        n: how many values were defined.
    """

    mean: float
    half: float
    n: int


def mean_interval(values: Iterable[float]) -> Interval | None:
    """Return mean and 95% t-interval (Student, n - 1 degrees of freedom) of the finite values, None without any."""
    # an undefined figure of one seed must not blank the row; n says how many stood behind the mean
    finite = np.array([value for value in values if math.isfinite(value)], dtype=np.float64)
    n = len(finite)
    if n == 0:
        return None
    if n == 1:
        return Interval(float(finite[0]), math.nan, 1)
    half = float(stdtrit(n - 1, 0.975)) * float(finite.std(ddof=1)) / math.sqrt(n)
    return Interval(float(finite.mean()), half, n)
