"""Weighted sums of rows for each class, over rows that come chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ulfine_fast.ops.clustering import RowChunks

Weights = Callable[[slice, Tensor], Tensor]
"""Makes the weights (T, n, K) of a chunk from its position among all rows and its rows (T, n, D)."""


@dataclass(frozen=True)
class ClassTotals:
    """Sums over rows, by their weight in each class.

    Attributes:
        mass: of the weights (T, K).
        sums: of the rows (T, K, D).
        squares: of the rows' squared entries (T, K, D).
    """

    mass: Tensor
    sums: Tensor
    squares: Tensor

    def __add__(self, other: ClassTotals) -> ClassTotals:
        """Totals of both sets of rows."""
        return ClassTotals(self.mass + other.mass, self.sums + other.sums, self.squares + other.squares)

    def __mul__(self, factor: Tensor) -> ClassTotals:
        """Totals with all weights times a factor of their trial and class, which broadcasts to (T, K)."""
        wide = factor.unsqueeze(-1)
        return ClassTotals(self.mass * factor, self.sums * wide, self.squares * wide)


def class_totals(chunks: RowChunks, weights: Weights, like: Tensor) -> ClassTotals:
    """Totals of all rows that are present.

    Args:
        chunks: the rows.
        weights: of a chunk.
        like: any tensor (T, K, D).
    """
    mass, sums, squares = torch.zeros_like(like[..., 0]), torch.zeros_like(like), torch.zeros_like(like)
    for position, rows, present in chunks.split(max(like.shape[1:])):
        columns = (weights(position, rows) * present.unsqueeze(-1)).transpose(1, 2)  # (T, K, n)
        mass += columns.sum(-1)
        sums.baddbmm_(columns, rows)
        squares.baddbmm_(columns, rows.square())
    return ClassTotals(mass, sums, squares)


def label_weights(labels: Tensor, classes: int) -> Weights:
    """One in each labelled row's class; labels (T, n), negative for padding."""

    def one_hot(position: slice, rows: Tensor) -> Tensor:
        own = labels[:, position]
        return F.one_hot(own.clamp(min=0), classes).to(rows.dtype) * (own >= 0).unsqueeze(-1)

    return one_hot
