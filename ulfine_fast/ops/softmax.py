"""Softmax over classes, fast for few of them too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# of fewer classes than a vector holds, the processor's kernel for a last dimension takes one value at a time, which is
# 6 to 20 times slower than along any other dimension
_FEW = 16


def softmax(logits: Tensor) -> Tensor:
    """Class probabilities (..., K) of logits (..., K)."""
    return _over_classes(torch.softmax, logits)


def log_softmax(logits: Tensor) -> Tensor:
    """Their logarithms (..., K)."""
    return _over_classes(torch.log_softmax, logits)


def class_scores(vectors: Tensor, rows: Tensor) -> Tensor:
    """Inner products of vectors (T, ..., K, D) with rows (T, n, D), as one matrix product: (T, ..., K, n).

    In memory the classes of a row lie side by side, but for few of them the rows of a class: each is the order in which
    :func:`class_softmax` is fast.
    """
    flat = vectors.flatten(1, -2)
    scores = flat @ rows.transpose(1, 2) if _are_few(vectors.shape[-2], rows) else (rows @ flat.mT).mT
    return scores.unflatten(1, vectors.shape[1:-1])


def class_softmax(scores: Tensor) -> Tensor:
    """Class probabilities (T, ..., K, n) of scores (T, ..., K, n), in the same order of memory."""
    if _are_few(scores.shape[-2], scores):
        return torch.softmax(scores, -2)
    return torch.softmax(scores.movedim(-1, 1), -1).movedim(1, -1)


def _are_few(classes: int, values: Tensor) -> bool:
    return classes < _FEW and values.device.type == "cpu"


def _over_classes(function: Callable[[Tensor, int], Tensor], logits: Tensor) -> Tensor:
    if not _are_few(logits.shape[-1], logits) or logits.dim() < 2:
        return function(logits, -1)
    columns = logits.flatten(0, -2).t().contiguous()  # (K, rows)
    return function(columns, 0).t().contiguous().view(logits.shape)
