"""Metrics of a run that followed a stream: accuracy, spread over classes, and known classes against unknown ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from ulfine_fast.metrics.classification import per_class_accuracy

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.related.test_time_adaptation.adapt import AdaptedStream
    from ulfine_fast.runs.run import Run


def stream_labels(run: Run, cache: FeatureCache) -> NDArray[np.int64]:
    """Labels of a cache's rows by the run's classes (n,): -1 unknown, K for a class that the run does not have."""
    index = {name: k for k, name in enumerate(run.class_names)}
    # label -1 takes the last entry
    run_class = np.array([*(index.get(name, len(index)) for name in cache.class_names), -1], dtype=np.int64)
    labels: NDArray[np.int64] = run_class[cache.labels]
    return labels


def stream_metrics(stream: AdaptedStream, labels: NDArray[np.int64], *, open_set: bool = False) -> dict[str, Any]:
    """Metrics of a stream with the labels it has, and whether predictions have collapsed to few classes.

    Args:
        stream: what :func:`ulfine_fast.related.test_time_adaptation.adapt.adapt` returned.
        labels: of its rows (n,), see :func:`stream_labels`.
        open_set: whether to tell images of known classes from others.

    Returns:
        images, exact, classes_predicted and effective_classes (the exponential of the entropy of how often each class
        is predicted) over the last half of the stream, the same before adaptation as classes_predicted_before; where
        there are labels of known classes accuracy, accuracy_before, balanced_accuracy, accuracy_by_quarter; with
        `open_set` and labels of both kinds auroc, fpr95, and both before.
    """
    classes, last_half = stream.logits.shape[1], len(stream.rows) // 2
    predicted, predicted_before = stream.logits.argmax(1), stream.before.argmax(1)
    metrics = {
        "images": len(predicted),
        "exact": stream.exact,
        **_class_spread("", predicted[last_half:], classes),
        **_class_spread("_before", predicted_before[last_half:], classes),
    }

    known, unknown = (labels >= 0) & (labels < classes), labels == classes
    if known.any():
        correct = (predicted == labels)[known]
        metrics |= {
            "accuracy": float(correct.mean()),
            "accuracy_before": float((predicted_before == labels)[known].mean()),
            "balanced_accuracy": float(np.nanmean(per_class_accuracy(labels[known], predicted[known], classes))),
            "accuracy_by_quarter": [float(part.mean()) for part in np.array_split(correct, 4) if len(part)],
        }
    if open_set and known.any() and unknown.any():
        metrics |= open_set_metrics(stream.scores[known], stream.scores[unknown])
        before = open_set_metrics(stream.scores_before[known], stream.scores_before[unknown])
        metrics |= {f"{name}_before": value for name, value in before.items()}
    return metrics


def open_set_metrics(known: NDArray[np.floating[Any]], unknown: NDArray[np.floating[Any]]) -> dict[str, float]:
    """How well a score, high for known classes, tells images (n,) of known classes from those of unknown ones (m,).

    Returns:
        auroc, the probability that a known one scores above an unknown one; fpr95, the fraction of unknown ones that
        score at least as high as all but 5% of the known.
    """
    ranks = rankdata(np.concatenate([known, unknown]))[: len(known)]
    pairs_above = ranks.sum() - len(known) * (len(known) + 1) / 2
    threshold = np.sort(known)[len(known) * 5 // 100]
    return {
        "auroc": float(pairs_above / (len(known) * len(unknown))),
        "fpr95": float((unknown >= threshold).mean()),
    }


def _class_spread(ending: str, predicted: NDArray[np.int64], classes: int) -> dict[str, Any]:
    frequencies = np.bincount(predicted, minlength=classes) / len(predicted)
    frequencies = frequencies[frequencies > 0]
    effective = float(np.exp(-(frequencies * np.log(frequencies)).sum()))
    return {f"classes_predicted{ending}": len(frequencies), f"effective_classes{ending}": effective}
