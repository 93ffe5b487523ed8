"""A cosine probe fitted to all its rows together, on labelled images alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ulfine_fast.ops.prototypes import normalize


def fit_probe(
    views: Tensor, targets: Tensor, start: Tensor, scale: Tensor, rate: float, steps: int, decay: float = 5e-4
) -> Tensor:
    """Logit-adjusted cosine classifiers (arXiv 2007.07314, equation 10) by gradient descent with momentum 0.9.

    Each step reads every row once, the steps cycling through its views, so that all views count the same.

    Args:
        views: unit rows (T, n, V, D).
        targets: weight of each row as a member of a class (T, n, S, K), zero for rows left out; S classifiers a trial.
        start: weights to begin with (T, K, D).
        scale: cosine scale sigma (T,).
        rate: peak learning rate, cosine schedule to zero.
        steps: gradient steps.
        decay: weight decay.

    Returns:
        Unit class vectors (T, S, K, D).
    """
    counts = targets.sum(1)  # (T, S, K)
    total = counts.sum(-1, keepdim=True).clamp(min=1e-9)
    log_prior = torch.log((counts / total).clamp(min=1e-8)).unsqueeze(1)  # (T, 1, S, K)
    members = targets.sum(-1, keepdim=True)  # (T, n, S, 1)
    row_weight = 1.0 / total.unsqueeze(1)  # (T, 1, S, 1)
    weights = start.unsqueeze(1).repeat(1, counts.shape[1], 1, 1)  # (T, S, K, D)
    velocity = torch.zeros_like(weights)
    sigma = scale.view(-1, 1, 1, 1)
    for step in range(steps):
        rows = views[:, :, step % views.shape[2]]  # (T, n, D)
        unit, length = normalize(weights), weights.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        flat = unit.flatten(1, 2)  # (T, S K, D)
        logits = sigma * (rows @ flat.transpose(1, 2)).unflatten(-1, counts.shape[1:])
        error = (torch.softmax(logits + log_prior, -1) * members - targets) * row_weight * sigma  # (T, n, S, K)
        gradient = (error.flatten(2).transpose(1, 2) @ rows).unflatten(1, counts.shape[1:])
        # the cosine does not see a vector's length, so neither does its gradient
        gradient = (gradient - (gradient * unit).sum(-1, keepdim=True) * unit) / length
        velocity = 0.9 * velocity + gradient + decay * weights
        weights = weights - 0.5 * rate * (1 + math.cos(math.pi * step / steps)) * velocity
    return normalize(weights)
