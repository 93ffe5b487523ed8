"""Average precision of each class and of groups of classes. All metrics are in [0, 1]."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.metrics.classification import SHOT_FEW, SHOT_MANY, rank_thirds

Floats = NDArray[np.floating[Any]]


def average_precision(scores: Floats, present: NDArray[np.bool_]) -> float:
    """Sum over thresholds of (R_i - R_{i-1}) P_i, precision and recall of all rows at or above the i-th score.

    Args:
        scores: (n,); equal ones share a threshold.
        present: which rows show the class (n,).

    Returns:
        NaN unless some rows show the class and some do not.
    """
    if not present.any() or present.all():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # last row of each threshold
    hits = np.cumsum(present[order])[ends]
    gained = np.diff(np.concatenate([[0], hits]))
    return float((gained * hits / (ends + 1)).sum() / present.sum())


def multilabel_metrics(scores: Floats, labels: NDArray[np.int8], counts: NDArray[np.int64]) -> dict[str, Any]:
    """Mean average precision over classes, of rows whose label is known.

    Args:
        scores: (n, K).
        labels: 1, 0 or -1 (n, K).
        counts: training images labelled with each class (K,).

    Returns:
        map; many, medium and few by thirds of the classes' ranks; many_shot, medium_shot and few_shot by count;
        per_class_ap. None where no class of a group has both present and absent labels.
    """
    known = labels >= 0
    precisions = np.array(
        [average_precision(scores[known[:, k], k], labels[known[:, k], k] > 0) for k in range(labels.shape[1])]
    )
    many, medium, few = rank_thirds(counts)
    groups = {
        "map": np.arange(len(precisions)),
        "many": many,
        "medium": medium,
        "few": few,
        "many_shot": np.flatnonzero(counts > SHOT_MANY),
        "medium_shot": np.flatnonzero((counts <= SHOT_MANY) & (counts >= SHOT_FEW)),
        "few_shot": np.flatnonzero(counts < SHOT_FEW),
    }
    metrics: dict[str, Any] = {}
    for name, classes in groups.items():
        defined = precisions[classes][~np.isnan(precisions[classes])]
        metrics[name] = float(defined.mean()) if len(defined) else None
    metrics["per_class_ap"] = [None if np.isnan(value) else float(value) for value in precisions]
    return metrics
