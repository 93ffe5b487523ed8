"""LIFT+'s schedule of crops (arXiv 2504.13282), over views that were drawn and stored before."""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST = 0.08  # smallest fraction of the image that a crop of the first epoch shows


def smallest_crop(steps: Tensor, total: int, epochs: Tensor) -> Tensor:
    """Smallest fraction of the image that a crop of each step shows.

    a(t) = 0.08 + 0.92 (1 - sqrt(1 - t^2)), with t = epoch / (epochs - 1): the last of several epochs has whole
    images (the convex schedule of arXiv 2504.13282).

    Args:
        steps: numbers of steps, int64 (S,), below `total`.
        total: steps of all epochs, at least 1.
        epochs: of each trial (T,), whole numbers; 0 asks for no schedule.

    Returns:
        Fractions in [0.08, 1], 0 without a schedule: float64 (S, T).
    """
    counted = epochs.double().unsqueeze(0)  # (1, T)
    epoch = torch.floor(steps.unsqueeze(1) * counted / total)  # (S, T)
    time = epoch / (counted - 1).clamp(min=1)
    # written so that it ends at 1 exactly
    area = 1 - (1 - _FIRST) * torch.sqrt(1 - time.square())
    return torch.where(counted > 0, area, torch.zeros_like(area))


def choose_crops(areas: Tensor, smallest: Tensor, words: Tensor) -> Tensor:
    """One of each row's views that are large enough, with equal probability; where none is, the largest.

    Args:
        areas: fraction of the image that each view shows (..., V).
        smallest: smallest fraction wanted (...).
        words: random numbers, int64 in [0, 2**32), (...).

    Returns:
        Numbers of views, int64 (...).
    """
    order = areas.argsort(dim=-1, descending=True, stable=True)
    enough = (areas >= smallest.unsqueeze(-1)).sum(-1).clamp(min=1)  # (...)
    # multiply-shift: exact in int64
    return order.gather(-1, ((words * enough) >> 32).unsqueeze(-1)).squeeze(-1)
