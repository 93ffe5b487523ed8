"""Losses against reference models, PoFT (arXiv 2412.12865), and controls with the same references."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def mean_log_likelihood(heads: Sequence[Tensor], scale: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Mean log-likelihood of labels by reference classifiers.

    Args:
        heads: class vectors of each reference (K, D), or those of each trial (T, K, D).
        scale: factor on their logits (T,).
        features: unit rows (T, B, D).
        labels: int64 in [0, K), shape (T, B).

    Returns:
        Mean over references of log p_j(y|x), at most 0, shape (T, B).
    """
    total = torch.zeros_like(features[..., 0])
    # one by one: the logits of eighty prompts together would be more than memory holds
    for head in heads:
        logits = features @ head.expand(len(features), -1, -1).transpose(1, 2)  # (T, B, K)
        log = torch.log_softmax(scale.view(-1, 1, 1) * logits, -1)
        total += log.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return total / len(heads)


def preferred(rows: Tensor, reference: Tensor, form: str, mask: Tensor | None = None) -> Tensor:
    """Losses of rows, given the references' log-likelihood of their labels.

    "preference" is -log sigmoid(log p - log g), with g the references' geometric mean: its gradient is that of
    cross-entropy times g / (g + p), as in the paper. Two controls have row weights of mean 1, as cross-entropy has,
    since a smaller gradient alone is a smaller learning rate: "equal" is the preference loss scaled to that, "weighted"
    cross-entropy with weights in proportion to g.

    Args:
        rows: cross-entropies -log p(y|x), shape (T, B).
        reference: log g, shape (T, B).
        form: "preference", "equal" or "weighted".
        mask: weight of each row (T, B), in the mean of the row weights; None where all are equal.

    Returns:
        Losses (T, B), before any mask.
    """
    mask = torch.ones_like(rows) if mask is None else mask
    if form == "weighted":
        # the largest is 1, so that weights do not round to zero where all references are small
        weights = torch.exp(reference - reference.amax(-1, keepdim=True))
        return rows * weights * _level(weights, mask)
    losses = F.softplus(rows + reference)
    if form == "preference":
        return losses
    return losses * _level(torch.sigmoid(rows.detach() + reference), mask)


def _level(weights: Tensor, mask: Tensor) -> Tensor:
    """The factor (T, 1) that makes weights (T, B) 1 on average, rows weighted by the mask (T, B)."""
    smallest = torch.finfo(weights.dtype).tiny
    return mask.sum(-1, keepdim=True) / (weights * mask).sum(-1, keepdim=True).clamp(min=smallest)
