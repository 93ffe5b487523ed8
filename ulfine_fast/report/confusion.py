"""Which class is taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ulfine_fast.runs.files import Predictions


@dataclass(frozen=True, slots=True)
class Confused:
    """One pair of classes.

    Attributes:
        true, predicted: class indices.
        count: rows of class `true` predicted as `predicted`.
        share: the same as a share of the rows of class `true`, 0..1.
    """

    true: int
    predicted: int
    count: int
    share: float


def pair_counts(predictions: Sequence[Predictions], classes: int) -> list[Confused]:
    """Count every pair of true and predicted class that occurs, over several runs; unknown labels left out."""
    codes = np.concatenate([(p.labels * classes + p.predicted)[p.labels >= 0] for p in predictions])
    # only pairs that occur: a full matrix of many thousand classes would not fit
    found, counts = np.unique(codes, return_counts=True)
    true, predicted = np.divmod(found, classes)
    rows = np.bincount(true, weights=counts, minlength=classes)
    return [
        Confused(int(t), int(p), int(n), float(n / rows[t])) for t, p, n in zip(true, predicted, counts, strict=True)
    ]


def share_matrix(pairs: Sequence[Confused], classes: int) -> np.ndarray:
    """Matrix (K, K): rows true, columns predicted, each row sums to 1 (or is 0 where a class has no rows)."""
    matrix = np.zeros((classes, classes))
    for pair in pairs:
        matrix[pair.true, pair.predicted] = pair.share
    return matrix


def most_confused(pairs: Sequence[Confused], limit: int) -> list[Confused]:
    """Return the wrong pairs with the largest share of their true class, largest first."""
    wrong = [pair for pair in pairs if pair.true != pair.predicted]
    return sorted(wrong, key=lambda pair: (-pair.share, -pair.count, pair.true, pair.predicted))[:limit]
