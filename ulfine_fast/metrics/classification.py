"""Figures of a trial: accuracy by class group, calibration, pseudo-label health. All shares are in [0, 1]."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.metrics.calibration import expected_calibration_error

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]

SHOT_MANY, SHOT_FEW = 100, 20
"""Classes with more than 100 labelled images are "many-shot", with fewer than 20 "few-shot" (LIFT's groups)."""


def softmax(logits: Floats) -> Floats:
    """Row-wise softmax of (n, K) logits in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def per_class_accuracy(labels: Labels, predicted: Labels, classes: int) -> Floats:
    """Recall of each class (K,), NaN for a class without rows."""
    right = np.bincount(labels[labels == predicted], minlength=classes)
    there = np.bincount(labels, minlength=classes)
    return np.divide(right, there, out=np.full(classes, np.nan), where=there > 0)


def rank_thirds(counts: Labels) -> tuple[Labels, Labels, Labels]:
    """Classes of the many, medium and few thirds by labelled count; the first thirds take what does not divide."""
    order = np.argsort(-counts, kind="stable")
    many, medium, few = np.array_split(order, 3)
    return many, medium, few


def class_groups(counts: Labels) -> dict[str, Labels]:
    """Classes by name of their group, of labelled counts (K,): many / medium / few thirds, and *_shot by count."""
    return {
        **dict(zip(("many", "medium", "few"), rank_thirds(counts), strict=True)),
        "many_shot": np.flatnonzero(counts > SHOT_MANY),
        "medium_shot": np.flatnonzero((counts <= SHOT_MANY) & (counts >= SHOT_FEW)),
        "few_shot": np.flatnonzero(counts < SHOT_FEW),
    }


def classification(logits: Floats, labels: Labels, counts: Labels, temperature: float = 1.0) -> dict[str, Any]:
    """Accuracy and calibration on labelled rows.

    Args:
        logits: (n, K).
        labels: (n,).
        counts: labelled training images of each class (K,).
        temperature: fitted elsewhere, divides the logits for `ece_temperature_scaled`.

    Returns:
        accuracy, balanced_accuracy (mean recall over classes present), many / medium / few (rank thirds), many_shot /
        medium_shot / few_shot (by count), worst_class, macro_f1, ece, ece_temperature_scaled, per_class_accuracy. None
        where a figure has no rows to stand on.
    """
    classes = len(counts)
    if not len(labels):
        return {}
    predicted = logits.argmax(axis=1)
    recall = per_class_accuracy(labels, predicted, classes)
    return {
        "accuracy": float((predicted == labels).mean()),
        "balanced_accuracy": _mean(recall),
        **{name: _mean(recall[group]) for name, group in class_groups(counts).items()},
        "worst_class": float(np.nanmin(recall)),
        "macro_f1": _macro_f1(labels, predicted, classes),
        "ece": expected_calibration_error(softmax(logits), labels),
        "ece_temperature_scaled": expected_calibration_error(softmax(logits / temperature), labels),
        "per_class_accuracy": [_number(value) for value in recall],
    }


def pseudo_label_health(
    probabilities: Floats, labels: Labels, threshold: float, classes: int
) -> dict[str, float | list[float | None] | None]:
    """How many pseudo-labels pass the threshold, and how right they are.

    Args:
        probabilities: of unlabelled images (n, K).
        labels: their hidden labels, -1 unknown (n,).
        threshold: in [0, 1].
        classes: K.

    Returns:
        pseudo_label_rate (kept over all), pseudo_label_precision (right over kept with known label) and
        confidence_on_false (mean probability of kept false ones); per class (K,): per_class_pseudo_label_rate (kept
        labels of the class over all rows), per_class_pseudo_label_precision, per_class_pseudo_label_recall (kept and
        right over the class's rows).
    """
    confidence, guess = probabilities.max(axis=1), probabilities.argmax(axis=1)
    kept = confidence >= threshold
    known, right = labels >= 0, guess == labels
    drawn = np.bincount(guess[kept], minlength=classes)
    judged = np.bincount(guess[kept & known], minlength=classes)
    correct = np.bincount(guess[kept & right], minlength=classes)
    there = np.bincount(labels[known], minlength=classes)
    return {
        "pseudo_label_rate": _mean(kept.astype(float)),
        "pseudo_label_precision": _mean(right[kept & known].astype(float)),
        "confidence_on_false": _mean(confidence[kept & known & ~right]),
        "per_class_pseudo_label_rate": [float(v) for v in drawn / max(len(labels), 1)],
        "per_class_pseudo_label_precision": _shares(correct, judged),
        "per_class_pseudo_label_recall": _shares(correct, there),
    }


def _macro_f1(labels: Labels, predicted: Labels, classes: int) -> float:
    """Mean F1 over classes that have rows or predictions."""
    right = np.bincount(labels[labels == predicted], minlength=classes)
    both = np.bincount(labels, minlength=classes) + np.bincount(predicted, minlength=classes)
    return float(np.mean(2 * right[both > 0] / both[both > 0]))


def _shares(part: Labels, whole: Labels) -> list[float | None]:
    return [float(p / w) if w else None for p, w in zip(part, whole, strict=True)]


def _mean(values: Floats) -> float | None:
    finite = values[~np.isnan(values)]
    return float(finite.mean()) if len(finite) else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
