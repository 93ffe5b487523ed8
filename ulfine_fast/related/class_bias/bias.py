"""How much of the zero-shot classifier's bias between classes an adapted classifier keeps.

After a study of such gaps in language models (arXiv 2401.08511). Here a class's bias is how much of the predicted
probability it gets on a class-balanced test set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class BiasComparison:
    """An adapted classifier compared with the zero-shot one, on the same test images.

    Attributes:
        bias_correlation: Pearson's r of the two biases over classes, -1..1; NaN where one does not vary.
        count_correlation: r of the adapted bias and log labelled count; above 0, frequent classes are favoured.
        drift: 1 - mean cosine of the two predicted distributions, 0..1.
        spread: standard deviation of the adapted bias over classes, in nats.
        group_gap: largest minus smallest accuracy of a group of images, 0..1; NaN without groups.
    """

    bias_correlation: float
    count_correlation: float
    drift: float
    spread: float
    group_gap: float


def class_bias(probabilities: Floats, labels: NDArray[np.int64]) -> Floats:
    """Log of a class's mean predicted probability over the uniform one: log(K mean p_k), 0 without bias.

    Args:
        probabilities: (n, K).
        labels: (n,), at least 0; every class that occurs has the same weight, whatever its number of images.

    Returns:
        (K,) in nats.
    """
    means = np.stack([probabilities[labels == k].mean(axis=0) for k in np.unique(labels)])  # (classes seen, K)
    return np.log(np.maximum(means.mean(axis=0) * probabilities.shape[1], 1e-12))


def compare_bias(
    zero_shot: Floats,
    adapted: Floats,
    labels: NDArray[np.int64],
    counts: Floats,
    groups: NDArray[np.str_] | None = None,
) -> BiasComparison:
    """Compare an adapted classifier with the zero-shot one.

    Args:
        zero_shot: predicted probabilities (n, K).
        adapted: predicted probabilities for the same images (n, K).
        labels: classes of the images (n,).
        counts: labelled training images of each class (K,); NaN where unknown.
        groups: another attribute of each image (n,), "" where unknown.
    """
    zero_shot_bias = class_bias(zero_shot, labels)
    adapted_bias = class_bias(adapted, labels)
    norms = np.linalg.norm(zero_shot, axis=1) * np.linalg.norm(adapted, axis=1)
    cosines = (zero_shot * adapted).sum(axis=1) / np.maximum(norms, 1e-12)

    group_gap = math.nan
    if groups is not None:
        correct = adapted.argmax(axis=1) == labels
        accuracies = [correct[groups == name].mean() for name in np.unique(groups) if name]
        if len(accuracies) > 1:
            group_gap = float(max(accuracies) - min(accuracies))
    return BiasComparison(
        bias_correlation=correlation(zero_shot_bias, adapted_bias),
        count_correlation=correlation(np.log(np.maximum(counts, 1.0)), adapted_bias),
        drift=float(1 - cosines.mean()),
        spread=float(adapted_bias.std()),
        group_gap=group_gap,
    )


def correlation(x: Floats, y: Floats) -> float:
    """Pearson's r of (K,) and (K,); NaN where one does not vary or holds NaN."""
    if len(x) < 2 or not x.std() > 0 or not y.std() > 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])
