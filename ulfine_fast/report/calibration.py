"""How far confidence can be believed: reliability bins and the expected calibration error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ulfine_fast.report.load import Predictions

BINS = 15


@dataclass(frozen=True, slots=True)
class Reliability:
    """Equal-width confidence bins (i/B, (i+1)/B].

    Attributes:
        count: rows per bin (B,) int64.
        accuracy: share of right predictions per bin (B,), NaN where the bin is empty.
        confidence: mean confidence per bin (B,), NaN where the bin is empty.
    """

    count: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error, 0..1: the gap of accuracy and confidence, weighted by the bins' rows."""
        gap = np.abs(np.nan_to_num(self.accuracy) - np.nan_to_num(self.confidence))
        return float((gap * self.count).sum() / max(1, self.count.sum()))


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> Reliability:
    """Sort rows into confidence bins.

    Args:
        confidence: (n,) in 0..1.
        right: (n,) bool.
        bins: number of bins.
    """
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)  # (n,)
    count = np.bincount(place, minlength=bins)
    filled = np.where(count > 0, count, np.nan)
    accuracy = np.bincount(place, weights=right.astype(np.float64), minlength=bins) / filled
    return Reliability(count, accuracy, np.bincount(place, weights=confidence, minlength=bins) / filled)


def raw_confidence(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Confidence (n,) before temperature scaling, from the scaled probabilities (n, K) that a run saves.

    softmax(z) is proportional to softmax(z / T) ** T, so that logits are not needed.
    """
    largest = probabilities.max(axis=1, keepdims=True).astype(np.float64)  # (n, 1)
    # relative to the largest class, so that no row underflows to nothing
    return 1.0 / ((probabilities / largest) ** temperature).sum(axis=1)  # (n,)


def pooled(predictions: Sequence[Predictions], temperatures: Sequence[float] | None = None) -> Reliability:
    """Bins over the test rows of several runs together, rows without a label left out.

    Args:
        predictions: the runs' test rows.
        temperatures: of each run, to undo its scaling; None takes the confidences as they were saved.
    """
    confidence, right = [], []
    for i, rows in enumerate(predictions):
        known = rows.labels >= 0
        chosen = rows.confidence if temperatures is None else raw_confidence(rows.probabilities, temperatures[i])
        confidence.append(chosen[known])
        right.append((rows.labels == rows.predicted)[known])
    return reliability(np.concatenate(confidence), np.concatenate(right))
