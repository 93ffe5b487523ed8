"""The section about confusion: which classes are predicted as which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ulfine_fast.report.groups import Group, rank_order, same_counts
from ulfine_fast.runs.files import Predictions

_MATRIX = 30  # classes up to which a confusion matrix is readable


@dataclass(frozen=True, slots=True)
class ClassPair:
    """A true and a predicted class.

    Attributes:
        true: class index.
        predicted: class index.
        count: rows of class `true` predicted as `predicted`.
        fraction: of the rows of class `true`, 0..1.
    """

    true: int
    predicted: int
    count: int
    fraction: float


def confusion_section(shown: Group, predictions: Sequence[Predictions]) -> dict[str, Any]:
    """Template values: a matrix for few classes, the most confused pairs for many.

    Args:
        shown: the group.
        predictions: the test rows of its runs.
    """
    classes = len(shown.runs[0].class_names)
    pairs = count_pairs(predictions, classes)
    # seeds that permute the classes have no common order by labels
    by_count = same_counts([shown])
    order = rank_order(shown.runs[0]) if by_count else np.arange(classes)
    matrix = confusion_matrix(pairs, classes)[np.ix_(order, order)].tolist() if classes <= _MATRIX else None
    return {
        "matrix": matrix,
        "order": order.tolist(),
        "by_count": by_count,
        "pairs": most_confused(pairs, 5 if matrix else 30),
    }


def count_pairs(predictions: Sequence[Predictions], classes: int) -> list[ClassPair]:
    """Count every pair of true and predicted class that occurs, over several runs, without unknown labels."""
    # only pairs that occur: a full matrix of many thousand classes would not fit into memory
    codes = np.concatenate([(p.labels * classes + p.predicted)[p.labels >= 0] for p in predictions])
    codes, counts = np.unique(codes, return_counts=True)
    true, predicted = np.divmod(codes, classes)
    rows = np.bincount(true, weights=counts, minlength=classes)
    return [
        ClassPair(int(t), int(p), int(n), float(n / rows[t])) for t, p, n in zip(true, predicted, counts, strict=True)
    ]


def confusion_matrix(pairs: Sequence[ClassPair], classes: int) -> np.ndarray:
    """Matrix (K, K): rows true, columns predicted; a row sums to 1, or to 0 where its class has no rows."""
    matrix = np.zeros((classes, classes))
    for pair in pairs:
        matrix[pair.true, pair.predicted] = pair.fraction
    return matrix


def most_confused(pairs: Sequence[ClassPair], limit: int) -> list[ClassPair]:
    """The wrong pairs with the largest fraction of their true class, largest first."""
    wrong = [pair for pair in pairs if pair.true != pair.predicted]
    return sorted(wrong, key=lambda pair: (-pair.fraction, -pair.count, pair.true, pair.predicted))[:limit]
