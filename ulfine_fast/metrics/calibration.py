"""Calibration of one trial: reliability bins, the expected calibration error, and the temperature that reduces it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]

BINS = 15


@dataclass(frozen=True, slots=True)
class Reliability:
    """Equal-width confidence bins (i/B, (i+1)/B].

    Attributes:
        count: rows per bin (B,) int64.
        accuracy: fraction of correct predictions per bin (B,), NaN where the bin is empty.
        confidence: mean confidence per bin (B,), NaN where the bin is empty.
    """

    count: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error, 0..1 (Guo et al., arXiv 1706.04599, equation 3).

        The mean gap between accuracy and confidence, weighted by rows per bin; 0 without rows.
        """
        gap = np.abs(np.nan_to_num(self.accuracy) - np.nan_to_num(self.confidence))
        return float((gap * self.count).sum() / max(1, self.count.sum()))


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Reliability:
    """Sort rows into confidence bins.

    Args:
        confidence: (n,) in 0..1.
        correct: (n,) bool.
        bins: number of bins.
    """
    bin_of_row = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)  # (n,)
    count = np.bincount(bin_of_row, minlength=bins)
    rows = np.where(count > 0, count, np.nan)
    return Reliability(
        count=count,
        accuracy=np.bincount(bin_of_row, weights=correct.astype(np.float64), minlength=bins) / rows,
        confidence=np.bincount(bin_of_row, weights=confidence, minlength=bins) / rows,
    )


def raw_confidence(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Confidence (n,) before temperature scaling, from the scaled probabilities (n, K) that a run saves.

    No logits are needed, since softmax(z) is proportional to softmax(z / T) ** T.
    """
    largest = probabilities.max(axis=1, keepdims=True).astype(np.float64)  # (n, 1)
    # relative to the largest class, so that no row underflows to zero
    return 1.0 / ((probabilities / largest) ** temperature).sum(axis=1)  # (n,)


def fit_temperature(logits: Floats, labels: Labels, *, low: float = 0.2, high: float = 5.0, least: int = 20) -> float:
    """The temperature with the lowest negative log-likelihood on validation logits.

    Args:
        logits: (n, K).
        labels: (n,).
        low: smallest temperature.
        high: largest temperature.
        least: rows needed for a fit.

    Returns:
        A value in low..high, or 1 with fewer than `least` rows.
    """
    if len(labels) < least:
        return 1.0
    from scipy.optimize import minimize_scalar  # imported on use: it takes long to load

    def loss(log_temperature: float) -> float:
        scaled = logits.astype(np.float64) / np.exp(log_temperature)
        top = scaled.max(axis=1, keepdims=True)
        normalizer = np.log(np.exp(scaled - top).sum(axis=1)) + top[:, 0]
        return float(np.mean(normalizer - scaled[np.arange(len(labels)), labels]))

    optimum = minimize_scalar(loss, bounds=(np.log(low), np.log(high)), method="bounded")
    return float(np.exp(optimum.x))
