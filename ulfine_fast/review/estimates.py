"""How good a quick fit is on labels that it did not see, what a change brought, and what more labels would bring."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ulfine_fast.data.splits import Rows
from ulfine_fast.metrics.intervals import balanced_interval, recall_interval
from ulfine_fast.ops.evidence import balanced_gain
from ulfine_fast.review.quick import FOLDS, QuickFit

Floats = NDArray[np.float64]

KNOWN = 2
"""Held-out labels from which on a class's accuracy is known; of one label it is 0% or 100%, and says nothing."""

LEARNING_RATE = 0.25
"""Exponent of the learning curve: a class's error falls as the number of its labels to the power of minus this.

Measured by `python -m benchmarks.studies.review_labels`, which prints expected beside actual gains.
"""


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval; in fractions.

    Attributes:
        value: estimate.
        low: lower end.
        high: upper end.
        labels: held-out labels that it is measured on.
    """

    value: float
    low: float
    high: float
    labels: int


@dataclass(frozen=True)
class Estimate:
    """What held-out labels say of a fit.

    Attributes:
        balanced: mean accuracy over the known classes; None where no class is known.
        accuracy: of each class (K,), NaN where unknown.
        low: lower ends of their 95% intervals (K,), NaN where unknown.
        high: upper ends (K,).
        held_out: held-out labels of each class (K,).
    """

    balanced: Interval | None
    accuracy: Floats
    low: Floats
    high: Floats
    held_out: Rows

    @property
    def known(self) -> NDArray[np.bool_]:
        """Classes whose accuracy is known (K,)."""
        return self.held_out >= KNOWN


def estimate(fit: QuickFit) -> Estimate:
    """Accuracy on held-out labels by class, and its mean, with intervals of cross-validation.

    Two labels that are both right do not make a class certain.

    Args:
        fit: as :func:`ulfine_fast.review.quick.quick_fit` returns it.
    """
    rows, labels = fit.held_out()
    right, held_out = _class_counts(fit, rows, labels)
    known = held_out >= KNOWN
    accuracy = np.full(fit.classes, np.nan)
    low, high = accuracy.copy(), accuracy.copy()
    if not known.any():
        return Estimate(None, accuracy, low, high, held_out)
    accuracy[known] = right[known] / held_out[known]
    for k in np.flatnonzero(known):
        low[k], high[k] = recall_interval(accuracy[k], held_out[k], FOLDS)
    below, above = balanced_interval(accuracy[known], held_out[known], FOLDS)
    balanced = Interval(float(accuracy[known].mean()), below, above, int(held_out[known].sum()))
    return Estimate(balanced, accuracy, low, high, held_out)


def change(before: QuickFit, after: QuickFit) -> Interval | None:
    """What the second fit has more in balanced accuracy, on the labels that both were measured on.

    None where there are too few of them to tell.
    """
    rows, labels = after.held_out()
    earlier_rows, earlier = before.held_out()
    expected = np.full(len(after.labels), -1, dtype=np.int64)
    expected[earlier_rows] = earlier
    both = expected[rows] == labels
    rows, labels = rows[both], labels[both]
    right = (after.probabilities[rows].argmax(1) == labels).astype(np.float32)
    difference = right - (before.probabilities[rows].argmax(1) == labels)
    value, low, high = balanced_gain(
        torch.from_numpy(difference).unsqueeze(0),
        torch.from_numpy(labels).unsqueeze(0),
        torch.ones(1, len(labels), dtype=torch.bool),
        after.classes,
    )[0].tolist()
    return None if np.isnan([value, low, high]).any() else Interval(value, low, high, len(labels))


def class_errors(fit: QuickFit) -> Floats:
    """Fraction of each class that is wrong (K,), with two labels' worth of the error over all classes mixed in."""
    rows, labels = fit.held_out()
    right, held_out = _class_counts(fit, rows, labels)
    overall = (held_out.sum() - right.sum() + 1) / (held_out.sum() + 2)
    return (held_out - right + 2 * overall) / (held_out + 2)


def gain_per_label(fit: QuickFit) -> Floats:
    """Balanced accuracy that the next label of each class brings (K,), by the learning curve of `LEARNING_RATE`."""
    return expected_gain(fit, np.eye(fit.classes))


def expected_gain(fit: QuickFit, more: Floats) -> Floats:
    """Balanced accuracy that more labels bring, summed over classes where `more` is (K,).

    Args:
        fit: before they are there.
        more: labels of each class that come (K,), or one such row for each of several cases (c, K).
    """
    counts = fit.counts + 1.0
    left = (counts / (counts + more)) ** LEARNING_RATE
    gains: Floats = (class_errors(fit) * (1 - left)).sum(-1) / fit.classes
    return gains


def _class_counts(fit: QuickFit, rows: Rows, labels: Rows) -> tuple[Rows, Rows]:
    """Right ones among the held-out labels of each class, and all of them (K,)."""
    right = labels[fit.probabilities[rows].argmax(1) == labels]
    return np.bincount(right, minlength=fit.classes), np.bincount(labels, minlength=fit.classes)
