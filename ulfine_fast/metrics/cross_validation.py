"""Metrics of repeated cross-validation, with intervals that say how far they can be trusted."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.metrics.classification import classification
from ulfine_fast.metrics.intervals import balanced_interval, recall_interval

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]


def cross_validated(
    logits: Floats, labels: Labels, counts: Labels, folds: int, temperature: float = 1.0
) -> dict[str, Any]:
    """Metrics of labelled images by fits without them.

    Args:
        logits: of each repeat (R, L, K), NaN where an image was not held out.
        labels: (L,).
        counts: labelled images of each class (K,).
        folds: of a repeat.
        temperature: divides the logits for `ece_temperature_scaled`.

    Returns:
        folds, repeats, rows (images that were held out), the metrics of
        :func:`ulfine_fast.metrics.classification.classification` over all repeats, balanced_accuracy_interval and
        per_class_interval, each [low, high] at 95%. A class without an image that was held out has None.
    """
    held_out = ~np.isnan(logits[:, :, 0])  # (R, L)
    repeated = np.broadcast_to(labels, held_out.shape)[held_out]
    rows = np.bincount(labels[held_out.any(0)], minlength=len(counts))  # (K,)
    known = np.flatnonzero(rows)
    intervals: list[list[float] | None] = [None] * len(counts)
    result: dict[str, Any] = {
        "folds": folds,
        "repeats": len(logits),
        "rows": int(rows.sum()),
        "per_class_accuracy": [None] * len(counts),
        "per_class_interval": intervals,
        **classification(logits[held_out], repeated, counts, temperature),
    }
    if len(known):
        recall = np.array([result["per_class_accuracy"][k] for k in known])
        result["balanced_accuracy_interval"] = list(balanced_interval(recall, rows[known], folds))
        for k, value in zip(known, recall, strict=True):
            intervals[k] = list(recall_interval(float(value), int(rows[k]), folds))
    return result
