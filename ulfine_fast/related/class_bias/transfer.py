"""How a model's own bias between classes carries over to what is adapted from it.

After a study of such gaps in language models (arXiv 2401.08511). Here a class's bias is how much of the probability it
gets on a balanced test set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Transfer:
    """One adapted classifier beside the zero-shot one, on the same test images.

    Attributes:
        bias_correlation: Pearson's r of both biases over the classes, -1..1; NaN where one of them is the same for all.
        count_correlation: r of the adapted bias with log labelled count, above 0 where frequent classes are favoured.
        drift: 1 - mean cosine of both predicted distributions, 0..1.
        spread: standard deviation of the adapted bias over classes, in nats.
        group_gap: largest minus smallest accuracy of a group of images, 0..1; NaN without groups.
    """

    bias_correlation: float
    count_correlation: float
    drift: float
    spread: float
    group_gap: float


def class_bias(probabilities: Floats, labels: NDArray[np.int64]) -> Floats:
    """How far above or below its share a class is predicted: log(K mean p_k), 0 for a fair one.

    Args:
        probabilities: (n, K).
        labels: (n,), at least 0; every class that occurs counts the same, whatever its number of images.

    Returns:
        (K,) in nats.
    """
    means = np.stack([probabilities[labels == k].mean(axis=0) for k in np.unique(labels)])  # (classes seen, K)
    return np.log(np.maximum(means.mean(axis=0) * probabilities.shape[1], 1e-12))


def transfer(
    zero_shot: Floats,
    adapted: Floats,
    labels: NDArray[np.int64],
    counts: Floats,
    groups: NDArray[np.str_] | None = None,
) -> Transfer:
    """Compares an adapted classifier with the zero-shot one.

    Args:
        zero_shot: its probabilities (n, K).
        adapted: (n, K) of the same images.
        labels: their classes (n,).
        counts: labelled training images of each class (K,); NaN where unknown.
        groups: another attribute of each image (n,), "" where unknown.
    """
    before, after = class_bias(zero_shot, labels), class_bias(adapted, labels)
    lengths = np.linalg.norm(zero_shot, axis=1) * np.linalg.norm(adapted, axis=1)
    cosines = (zero_shot * adapted).sum(axis=1) / np.maximum(lengths, 1e-12)
    right = adapted.argmax(axis=1) == labels
    return Transfer(
        bias_correlation=correlation(before, after),
        count_correlation=correlation(np.log(np.maximum(counts, 1.0)), after),
        drift=float(1 - cosines.mean()),
        spread=float(after.std()),
        group_gap=math.nan if groups is None else _gap(right, groups),
    )


def correlation(one: Floats, other: Floats) -> float:
    """Pearson's r of (K,) and (K,); NaN where either does not vary or holds NaN."""
    if len(one) < 2 or not one.std() > 0 or not other.std() > 0:
        return math.nan
    return float(np.corrcoef(one, other)[0, 1])


def _gap(right: NDArray[np.bool_], groups: NDArray[np.str_]) -> float:
    shares = [right[groups == name].mean() for name in np.unique(groups) if name]
    return float(max(shares) - min(shares)) if len(shares) > 1 else math.nan
