"""Metrics of a trial: accuracy by class group, calibration, quality of pseudo-labels. All fractions are in 0..1."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.metrics.calibration import reliability

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]

SHOT_MANY, SHOT_FEW = 100, 20
"""Classes with more than 100 labelled images are "many-shot", those with fewer than 20 "few-shot" (as in LIFT)."""


def softmax(logits: Floats) -> Floats:
    """Row-wise softmax of (n, K) logits in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def per_class_accuracy(labels: Labels, predicted: Labels, classes: int) -> Floats:
    """Recall of each class (K,), NaN for a class without rows."""
    correct = np.bincount(labels[labels == predicted], minlength=classes)
    rows = np.bincount(labels, minlength=classes)
    return np.divide(correct, rows, out=np.full(classes, np.nan), where=rows > 0)


def rank_thirds(counts: Labels) -> tuple[Labels, Labels, Labels]:
    """Classes of the many, medium and few thirds by labelled count (K,); a remainder goes to the first thirds."""
    order = np.argsort(-counts, kind="stable")
    many, medium, few = np.array_split(order, 3)
    return many, medium, few


def class_groups(counts: Labels) -> dict[str, Labels]:
    """Classes by group name, from labelled counts (K,): many / medium / few (rank thirds) and *_shot (by count)."""
    return {
        **dict(zip(("many", "medium", "few"), rank_thirds(counts), strict=True)),
        "many_shot": np.flatnonzero(counts > SHOT_MANY),
        "medium_shot": np.flatnonzero((counts <= SHOT_MANY) & (counts >= SHOT_FEW)),
        "few_shot": np.flatnonzero(counts < SHOT_FEW),
    }


class Predictions(NamedTuple):
    """What the metrics of n rows read of their logits.

    Attributes:
        classes: of the largest logit, the first of equal ones (n,).
        confidence: largest probability (n,).
        scaled_confidence: the same of the logits divided by the temperature (n,).
    """

    classes: Labels
    confidence: Floats
    scaled_confidence: Floats

    def first(self, rows: int) -> Predictions:
        """The predictions of the first rows alone."""
        return Predictions(self.classes[:rows], self.confidence[:rows], self.scaled_confidence[:rows])


def classification(logits: Floats, labels: Labels, counts: Labels, temperature: float = 1.0) -> dict[str, Any]:
    """Accuracy and calibration on labelled rows.

    Args:
        logits: (n, K).
        labels: (n,).
        counts: labelled training images of each class (K,).
        temperature: divides the logits for `ece_temperature_scaled`; fitted on validation.

    Returns:
        See :func:`of_predictions`.
    """
    predictions = Predictions(
        classes=logits.argmax(axis=1),
        confidence=softmax(logits).max(axis=1),
        scaled_confidence=softmax(logits / temperature).max(axis=1),
    )
    return of_predictions(predictions, labels, counts)


def of_predictions(predictions: Predictions, labels: Labels, counts: Labels) -> dict[str, Any]:
    """Accuracy and calibration on labelled rows.

    Args:
        predictions: of n rows.
        labels: (n,).
        counts: labelled training images of each class (K,).

    Returns:
        accuracy, balanced_accuracy (mean recall over the classes that have rows), many / medium / few (rank thirds),
        many_shot / medium_shot / few_shot (by count), worst_class, macro_f1, ece, ece_temperature_scaled,
        per_class_accuracy. A metric without rows is None; without any row the dictionary is empty.
    """
    classes = len(counts)
    if not len(labels):
        return {}
    correct = predictions.classes == labels
    recall = per_class_accuracy(labels, predictions.classes, classes)
    return {
        "accuracy": float(correct.mean()),
        "balanced_accuracy": _mean_or_none(recall),
        **{name: _mean_or_none(recall[group]) for name, group in class_groups(counts).items()},
        "worst_class": float(np.nanmin(recall)),
        "macro_f1": _macro_f1(labels, predictions.classes, classes),
        "ece": reliability(predictions.confidence, correct).ece,
        "ece_temperature_scaled": reliability(predictions.scaled_confidence, correct).ece,
        "per_class_accuracy": [None if np.isnan(value) else float(value) for value in recall],
    }


def pseudo_label_health(
    probabilities: Floats, labels: Labels, threshold: float, classes: int
) -> dict[str, float | list[float | None] | None]:
    """How many pseudo-labels reach the threshold, and how many of them are correct.

    Args:
        probabilities: of unlabelled images (n, K).
        labels: their hidden labels, -1 unknown (n,).
        threshold: least confidence of a pseudo-label that is kept, 0..1.
        classes: K.

    Returns:
        pseudo_label_rate (kept over all rows), pseudo_label_precision (correct over kept, known labels only),
        confidence_on_false (mean confidence of kept wrong ones) and, per class (K,): per_class_pseudo_label_rate (kept
        pseudo-labels of the class over all rows), per_class_pseudo_label_precision, per_class_pseudo_label_recall (kept
        and correct over the rows of the class).
    """
    confidence = probabilities.max(axis=1)
    pseudo_labels = probabilities.argmax(axis=1)
    kept = confidence >= threshold
    known = labels >= 0
    correct = pseudo_labels == labels

    # counts per class (K,)
    kept_count = np.bincount(pseudo_labels[kept], minlength=classes)
    known_count = np.bincount(pseudo_labels[kept & known], minlength=classes)
    correct_count = np.bincount(pseudo_labels[kept & correct], minlength=classes)
    class_rows = np.bincount(labels[known], minlength=classes)
    return {
        "pseudo_label_rate": _mean_or_none(kept.astype(float)),
        "pseudo_label_precision": _mean_or_none(correct[kept & known].astype(float)),
        "confidence_on_false": _mean_or_none(confidence[kept & known & ~correct]),
        "per_class_pseudo_label_rate": [float(value) for value in kept_count / max(len(labels), 1)],
        "per_class_pseudo_label_precision": _fractions(correct_count, known_count),
        "per_class_pseudo_label_recall": _fractions(correct_count, class_rows),
    }


def _macro_f1(labels: Labels, predicted: Labels, classes: int) -> float:
    """Mean F1 over classes that have rows or predictions."""
    correct = np.bincount(labels[labels == predicted], minlength=classes)
    total = np.bincount(labels, minlength=classes) + np.bincount(predicted, minlength=classes)
    return float(np.mean(2 * correct[total > 0] / total[total > 0]))


def _fractions(part: Labels, whole: Labels) -> list[float | None]:
    return [float(p / w) if w else None for p, w in zip(part, whole, strict=True)]


def _mean_or_none(values: Floats) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None
