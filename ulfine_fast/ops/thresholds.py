"""Thresholds and weights of pseudo-labels that follow the model's confidence, over a trials axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-12


def histogram(labels: Tensor, weights: Tensor, classes: int) -> Tensor:
    """Sum of the weights (T, B) of the rows of each class (T, K), among labels (T, B)."""
    chosen = F.one_hot(labels, classes).to(weights.dtype)  # (T, B, K)
    return (chosen * weights.unsqueeze(-1)).sum(1)


def running(old: Tensor, new: Tensor, momentum: Tensor) -> Tensor:
    """Running mean m old + (1 - m) new, for values (T, ...) and a momentum m of each trial (T,)."""
    m = momentum.view((-1,) + (1,) * (old.dim() - 1))
    return m * old + (1 - m) * new


def adaptive_thresholds(overall: Tensor, mean: Tensor) -> Tensor:
    """Threshold of each class (T, K), lower for classes of less probability (FreeMatch, section 4.1).

    Args:
        overall: running mean of the largest probability (T,).
        mean: running mean probability of each class (T, K).
    """
    return overall.unsqueeze(-1) * mean / mean.amax(-1, keepdim=True)


def fairness_loss(logits: Tensor, mask: Tensor, mean: Tensor, counts: Tensor) -> Tensor:
    """Negative cross-entropy of a batch's mean probabilities to the running ones (FreeMatch, section 4.2), (T,).

    Both are divided by the histograms of the predicted classes first, so that they compare the confidence in each class
    and not its frequency. The sign is that of the paper and of its code, by which a uniform distribution gives -log K
    and others give less.

    Args:
        logits: of strong views (T, U, K).
        mask: 1 for rows that train (T, U); a trial without any has the loss 0.
        mean: running mean probability of each class (T, K).
        counts: running histogram of the predicted classes, positive (T, K).
    """
    probabilities = torch.softmax(logits, -1)
    batch_mean = (probabilities * mask.unsqueeze(-1)).sum(1) / mask.sum(-1, keepdim=True).clamp(min=1)  # (T, K)
    seen = histogram(logits.argmax(-1), mask, logits.shape[-1])
    # a class that no row of the batch is predicted as does not count, as in the published code
    batch = torch.where(seen > 0, batch_mean / seen.clamp(min=_EPS), torch.zeros_like(batch_mean))
    cross_entropy = _normalized(mean / counts.clamp(min=_EPS)) * torch.log(_normalized(batch) + _EPS)
    return cross_entropy.sum(-1) * (mask.sum(-1) > 0)


def _normalized(values: Tensor) -> Tensor:
    """Values (T, K) over their sum."""
    return values / values.sum(-1, keepdim=True).clamp(min=_EPS)


def updated_classes(assigned: Tensor, positions: Tensor, classes: Tensor) -> Tensor:
    """Class of each image of the pool (T, N) after a batch of classes (T, U) at these positions (T, U).

    A negative class leaves an image as it was. An image drawn twice takes the larger class, on every device.
    """
    newest = torch.full_like(assigned, -1).scatter_reduce(1, positions, classes, "amax")
    return torch.where(newest >= 0, newest, assigned)


def learning_effect(assigned: Tensor, present: Tensor, classes: int) -> Tensor:
    """Images assigned to each class, over those of the largest class (FlexMatch, section 3.1), (T, K).

    As long as more images have no class than any class has, it is over those, so that all effects start at 0.

    Args:
        assigned: class of each unlabelled image, -1 for none (T, N).
        present: False for padding (T, N).
        classes: K.
    """
    # images of no class are counted first, padding nowhere
    counts = torch.zeros(len(assigned), classes + 1, device=assigned.device)
    counts.scatter_add_(1, assigned + 1, present.to(counts.dtype))
    return counts[:, 1:] / counts.amax(-1, keepdim=True).clamp(min=1)


def truncated_weights(confidence: Tensor, mean: Tensor, variance: Tensor, width: float = 2.0) -> Tensor:
    """Gaussian under its mean and 1 above it (SoftMatch, section 3.2), (T, U).

    Args:
        confidence: (T, U).
        mean: of the confidence (T,).
        variance: of the confidence (T,).
        width: by which the standard deviation is divided; 2 as published.
    """
    under = (confidence - mean.unsqueeze(-1)).clamp(max=0)
    return torch.exp(-(under**2) * width**2 / (2 * variance.unsqueeze(-1).clamp(min=_EPS)))
