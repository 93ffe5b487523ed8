"""Rejection and prediction sets, calibrated on held-out labels (conformal prediction).

An image is rejected, or a class left out of its set, where its score is lower than those of nearly all held-out
labelled images. By exchangeability a new image of the same kind falls there at most as often as the rate says, whatever
the scores are (Vovk et al., Algorithmic Learning in a Random World, 2005); with weights after Podkopaev and Ramdas,
arXiv 2103.03323.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]

# a rate of 0.1 is 1 - 0.9 with its rounding
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class SetThresholds:
    """Thresholds of class-conditional prediction sets.

    Attributes:
        threshold: a class is left out of the set of an image whose probability of it is lower (K,); -inf for a class
            that is never left out.
        rows: held-out images of each class (K,).
        pooled: classes with too few held-out images of their own, which share a threshold (K,) bool. The coverage holds
            for them together, not for each.
    """

    threshold: Floats
    rows: Labels
    pooled: NDArray[np.bool_]

    @property
    def always(self) -> NDArray[np.bool_]:
        """Classes that are in every set, as too few held-out images speak of them (K,)."""
        return np.isneginf(self.threshold)

    def sets(self, probabilities: Floats) -> NDArray[np.bool_]:
        """The classes of each image that cannot be left out (n, K); none where no class fits."""
        # compared in float32, as they are saved
        return np.asarray(probabilities, np.float32) >= self.threshold.astype(np.float32)


def exclusion_threshold(scores: Floats, rate: float, weights: Floats | None = None) -> float:
    """The threshold below which a new score falls with at most this probability.

    Args:
        scores: of held-out images (n,).
        rate: greatest probability, 0..1.
        weights: of the held-out images (n,), above 0; equal by default. The new score counts like the heaviest of
            them, which keeps the promise whatever its weight is.

    Returns:
        One of the scores; -inf, below which nothing falls, where there are too few images for the rate.
    """
    if not len(scores):
        return -math.inf
    order = np.argsort(scores, kind="stable")
    own = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    new = own.max()
    allowed = rate * (own.sum() + new) * (1 + _ROUNDING)
    if new > allowed:
        return -math.inf
    reached = np.cumsum(own[order]) + new
    # at rate 1 all scores may be excluded, and the highest is still a threshold
    position = min(int(np.searchsorted(reached, allowed, side="right")), len(scores) - 1)
    return float(scores[order[position]])


def least_rows(rate: float) -> int:
    """How many held-out images a threshold of this rate needs at least, where all weigh the same."""
    return math.ceil((1 / rate - 1) * (1 - _ROUNDING)) if rate > 0 else 0


def balanced_weights(labels: Labels, rate: float, heaviest: float = 0.2) -> Floats:
    """Weights (n,) by which classes count the same, as far as the rate allows it.

    As the new score counts like the heaviest image, one that weighs much leaves little to exclude. Weights are
    1 / max(n_k, m), with the smallest m by which no image weighs too much; or all equal where there is none.

    Args:
        labels: of held-out images (n,).
        rate: of the threshold, see :func:`exclusion_threshold`.
        heaviest: the part of what may be excluded that one image may weigh, above 0 and at most 1. The larger it is,
            the more rare classes count, and the less is excluded.
    """
    counts = np.bincount(labels)[labels].astype(np.float64)  # (n,)
    for least in range(1, int(counts.max(initial=0)) + 1):
        weights = 1 / np.maximum(counts, least)
        if weights.max() <= heaviest * rate * (weights.sum() + weights.max()) * (1 + _ROUNDING):
            return weights
    return np.ones(len(labels))


def rejection_threshold(scores: Floats, labels: Labels, rate: float) -> float:
    """The score below which images are rejected, so that at most this fraction of known classes' images is.

    Args:
        scores: of held-out images (n,), high for images of known classes.
        labels: their classes (n,); each class counts the same, see :func:`balanced_weights`.
        rate: fraction of images of known classes that may be rejected, 0..1.

    Returns:
        A score; -inf where there are too few held-out images to reject any.
    """
    return exclusion_threshold(scores, rate, balanced_weights(labels, rate))


def set_thresholds(probabilities: Floats, labels: Labels, classes: int, coverage: float) -> SetThresholds:
    """Thresholds of prediction sets that hold the true class with this probability, class by class.

    A class with enough held-out images has a threshold of its own (class-conditional, or Mondrian, conformal
    prediction; the score is the class's probability, Sadinle et al., arXiv 1609.00451). Classes with fewer share one,
    each counting the same (as the rare classes of clustered conformal prediction, Ding et al., arXiv 2306.09335). A
    class with none is in every set.

    Args:
        probabilities: of each held-out image's own class (n,).
        labels: the classes (n,).
        classes: K.
        coverage: 0..1.
    """
    rate = 1 - coverage
    rows = np.bincount(labels, minlength=classes).astype(np.int64)
    pooled = (rows > 0) & (rows < least_rows(rate))
    threshold = np.full(classes, -math.inf)
    for k in np.flatnonzero((rows > 0) & ~pooled):
        threshold[k] = exclusion_threshold(probabilities[labels == k], rate)
    shared = pooled[labels]
    # few images, and the rarest must count: better sets that are too wide
    weights = balanced_weights(labels[shared], rate, heaviest=1.0)
    threshold[pooled] = exclusion_threshold(probabilities[shared], rate, weights)
    return SetThresholds(threshold, rows, pooled & ~np.isneginf(threshold))
