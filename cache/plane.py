"""The plane of the first two principal components: a 2-d map of features, fitted block by block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Plane:
    """A plane through the mean of unit features.

    Attributes:
        mean: (D,).
        axes: (D, 2), of length 1, the largest variance first; the largest entry of each is positive.
        variance: fraction of the variance inside the plane, 0..1.
    """

    mean: NDArray[np.float64]
    axes: NDArray[np.float64]
    variance: float

    def positions(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Positions (n, 2) of features (n, D) of any length."""
        return (_unit(features) - self.mean) @ self.axes


def fit_plane(blocks: Iterable[NDArray[Any]], dim: int) -> Plane:
    """Fits the plane to features, of which one block is in memory at a time.

    Args:
        blocks: (n, D) each, of any length.
        dim: D, at least 2.
    """
    count, total, products = 0, np.zeros(dim), np.zeros((dim, dim))
    for block in blocks:
        unit = _unit(block)
        count += len(unit)
        total += unit.sum(axis=0)
        products += unit.T @ unit
    mean = total / max(count, 1)
    values, vectors = np.linalg.eigh(products / max(count, 1) - np.outer(mean, mean))
    axes = vectors[:, [-1, -2]]
    # an axis has no direction of its own, and another library would turn the map round
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0)
    whole = float(values.clip(0).sum())
    return Plane(mean, axes, float(values[-2:].clip(0).sum()) / whole if whole else 0.0)


def _unit(features: NDArray[Any]) -> NDArray[np.float64]:
    wide = np.asarray(features, dtype=np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
