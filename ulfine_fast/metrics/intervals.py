"""A mean over seeds and its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit


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
    half = float(stdtrit(n - 1, 0.975)) * float(finite.std(ddof=1)) / math.sqrt(n)
    return Interval(float(finite.mean()), half, n)


def fraction_interval(fraction: float, rows: float) -> tuple[float, float]:
    """Wilson's 95% interval of a fraction of so many rows (Wilson 1927), also good near 0 and 1 and for few rows."""
    z = float(ndtri(0.975))
    center = (fraction + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(fraction * (1 - fraction) / rows + z * z / (4 * rows * rows))
    return max(0.0, center - half), min(1.0, center + half)


def balanced_interval(fractions: NDArray[np.floating[Any]], rows: NDArray[np.int64], folds: int) -> tuple[float, float]:
    """95% interval of balanced accuracy from recalls that cross-validation estimates.

    Wilson's interval at as many rows as a single fraction would need for the variance of the mean of the recalls. Three
    things make that variance larger than the plain one, p (1 - p) / n: of few rows it is unbiased with n - 1; a class
    with none or all right counts as (correct + 1) / (n + 2) (Agresti and Coull 1998); and as fits of k folds share
    labels and lack a fraction 1 / k of them, it is k / (k - 1) as large. `benchmarks.studies.cv_coverage` measures the
    result.

    Args:
        fractions: recall of each class (K,).
        rows: images of each (K,), at least 1.
        folds: k, at least 2.
    """
    smoothed = (fractions * rows + 1) / (rows + 2)
    variances = smoothed * (1 - smoothed) / np.maximum(rows - 1, 1)
    variance = _of_folds(folds) * float(variances.sum()) / len(rows) ** 2
    level = float(smoothed.mean())
    return fraction_interval(float(fractions.mean()), level * (1 - level) / variance)


def recall_interval(fraction: float, rows: int, folds: int) -> tuple[float, float]:
    """The same of one class: Wilson's interval at (k - 1) / k times its rows."""
    return fraction_interval(fraction, rows / _of_folds(folds))


def _of_folds(folds: int) -> float:
    """How many times as large cross-validation makes the variance."""
    return folds / (folds - 1)


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
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
    return Interval(float(means[seen].mean()), half, len(labels))
