"""A mean over seeds and its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray


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


def fraction_interval(fraction: float, rows: float) -> tuple[float, float]:
    """Wilson's 95% interval of a fraction of so many rows (Wilson 1927), also good near 0 and 1 and for few rows."""
    z = NormalDist().inv_cdf(0.975)
    center = (fraction + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(fraction * (1 - fraction) / rows + z * z / (4 * rows * rows))
    return max(0.0, center - half), min(1.0, center + half)


def balanced_interval(fractions: NDArray[np.floating[Any]], rows: NDArray[np.int64]) -> tuple[float, float]:
    """95% interval of the mean of independent fractions, such as recalls of classes.

    Wilson's interval at the number of rows that a single fraction of this mean would need for the mean's variance.
    The variance of a class of few rows is that of (correct + 1) / (rows + 2) (Agresti and Coull 1998), as none or all
    right of a few says little.

    Args:
        fractions: (K,).
        rows: of each (K,), at least 1.
    """
    mean = float(fractions.mean())
    smoothed = (fractions * rows + 1) / (rows + 2)
    variance = float((smoothed * (1 - smoothed) / rows).sum()) / len(rows) ** 2
    # the mean, smoothed alike
    level = float(smoothed.mean())
    return fraction_interval(mean, level * (1 - level) / variance)


def balanced_difference(difference: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> Interval | None:
    """Mean over classes of a difference between two classifiers, image by image, with its 95% t-interval.

    One variance inside all classes is taken, as rare classes have too few rows for one of their own.

    Args:
        difference: of correctness, -1..1 (n,).
        labels: class of each image (n,), at least 0.

    Returns:
        The interval, with n images; None where no class has two of them.
    """
    rows = np.bincount(labels)
    seen = rows > 0
    freedom = len(labels) - int(seen.sum())
    if freedom < 1:
        return None
    sums = np.bincount(labels, weights=difference)
    means = np.divide(sums, rows, out=np.zeros(len(rows)), where=seen)
    spread = float(np.square(difference - means[labels]).sum()) / freedom
    variance = spread * float((1 / rows[seen]).sum()) / int(seen.sum()) ** 2
    from scipy.special import stdtrit  # imported on use, see above

    half = float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
    return Interval(float(means[seen].mean()), half, len(labels))
