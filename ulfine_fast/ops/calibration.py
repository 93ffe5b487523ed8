"""Temperatures and confidences of T trials; :mod:`ulfine_fast.metrics.calibration` has them for one, in NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# values of a block of rows: so many fit in a processor's cache, or keep a GPU busy
_VALUES = 1 << 18
_VALUES_GPU = 1 << 24
# Newton's method takes about six, bisection to float32's precision thirty
_MOST_STEPS = 60


def shift_to_largest_(logits: Tensor) -> Tensor:
    """Subtract each row's largest logit, in place; softmax does not change.

    Args:
        logits: (T, n, K).

    Returns:
        Predicted classes, the first of equal ones, int64 (T, n).
    """
    predicted = torch.empty(logits.shape[:2], dtype=torch.int64, device=logits.device)
    for rows in _blocks(logits):
        largest, predicted[:, rows] = logits[:, rows].max(-1)
        logits[:, rows].sub_(largest.unsqueeze(-1))
    return predicted


def confidences(shifted: Tensor, temperature: Tensor) -> Tensor:
    """Largest probability of each row (T, n), from logits (T, n, K) whose largest is 0, and temperatures (T,)."""
    result = shifted.new_empty(shifted.shape[:2])
    inverse = (1.0 / temperature).to(shifted).view(-1, 1, 1)
    for rows in _blocks(shifted):
        result[:, rows] = (shifted[:, rows] * inverse).exp_().sum(-1).reciprocal_()
    return result


def fit_temperatures(
    shifted: Tensor, labels: Tensor, present: Tensor, *, low: float = 0.2, high: float = 5.0, least: int = 20
) -> Tensor:
    """The temperature of each trial with the lowest negative log-likelihood on validation rows.

    The likelihood is convex in the inverse temperature b. With p = softmax(b z), its slope is the mean of
    sum_k p_k z_k - z_y and its curvature the mean variance of z under p, so Newton's method finds the minimum. A step
    that leaves the bracket, or is not half of the last one, is replaced by the geometric mean of the bracket's ends.

    Args:
        shifted: logits (T, n, K) whose largest is 0.
        labels: int64 in [0, K), shape (T, n).
        present: False for padding (T, n).
        low: smallest temperature.
        high: largest temperature.
        least: rows needed for a fit.

    Returns:
        Temperatures in [low, high], float64 (T,); 1 for trials with fewer than `least` rows.
    """
    counts = present.sum(1)
    of_labels = shifted.gather(2, labels.unsqueeze(2)).squeeze(2).double()  # (T, n)
    label_mean = torch.where(present, of_labels, 0.0).sum(1) / counts.clamp(min=1)

    # inverse temperatures, the ends where the slope is known, and the last step of those that still move
    beta = torch.ones_like(label_mean)
    below = torch.zeros_like(beta)
    above = torch.full_like(beta, torch.inf)
    last = above
    for _ in range(_MOST_STEPS):
        mean, variance = _moments(shifted, present, beta)
        slope = mean - label_mean
        # where all probabilities are 0 or 1 the slope is 0, and of equal temperatures the lowest is taken
        below = torch.where(slope <= 0, beta, below)
        above = torch.where(slope > 0, beta, above)
        newton = (beta - slope / variance.clamp(min=1e-30)).clamp(1 / high, 1 / low)
        # an end that is not known yet is 0 or infinite, and so is the mean
        middle = (below * above).sqrt().clamp(1 / high, 1 / low)
        good = (newton >= below) & (newton <= above) & ((newton - beta).abs() <= 0.5 * last)
        moved = torch.where(good, newton, middle)
        # a trial that has arrived stays, however long its neighbours take
        last = torch.where(last > 1e-7 * beta, (moved - beta).abs(), 0.0)
        beta = torch.where(last > 0, moved, beta)
        if not bool((last > 1e-7 * beta).any()):
            break
    return torch.where(counts >= least, 1.0 / beta, 1.0)


def _moments(shifted: Tensor, present: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the logits under softmax(beta logits), averaged over each trial's rows: float64 (T,)."""
    first = shifted.new_empty(present.shape)
    second = torch.empty_like(first)
    factor = beta.to(shifted).view(-1, 1, 1)
    for rows in _blocks(shifted):
        z = shifted[:, rows]
        weighted = torch.softmax(z * factor, dim=-1).mul_(z)
        torch.sum(weighted, -1, out=first[:, rows])
        torch.sum(weighted.mul_(z), -1, out=second[:, rows])
    counts = present.sum(1).clamp(min=1)
    # one sum over all rows, so that the blocks do not show
    mean, square = (torch.where(present, rows, 0.0).double() for rows in (first, second))
    return mean.sum(1) / counts, (square - mean.square()).sum(1) / counts


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Blocks of rows whose temporaries fit in a cache."""
    trials, total, classes = logits.shape
    size = max(1, (_VALUES_GPU if logits.is_cuda else _VALUES) // (trials * classes))
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
