"""Softmax over the last dimension, fast for few classes too."""

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


def _over_classes(function: Callable[[Tensor, int], Tensor], logits: Tensor) -> Tensor:
    if logits.shape[-1] >= _FEW or logits.device.type != "cpu" or logits.dim() < 2:
        return function(logits, -1)
    columns = logits.flatten(0, -2).t().contiguous()  # (K, rows)
    return function(columns, 0).t().contiguous().view(logits.shape)
