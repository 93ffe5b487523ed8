"""Thresholds and weights of pseudo-labels that follow what a model is sure of, over a trials axis."""

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


def adaptive_thresholds(overall: Tensor, shares: Tensor) -> Tensor:
    """Threshold of each class (T, K), lower for classes that get less of the probability (FreeMatch, section 4.1).

    Args:
        overall: running mean of the largest probability (T,).
        shares: running mean probability of each class (T, K).
    """
    return overall.unsqueeze(-1) * shares / shares.amax(-1, keepdim=True)


def fairness_loss(logits: Tensor, mask: Tensor, shares: Tensor, counts: Tensor) -> Tensor:
    """Negative cross-entropy of a batch's class shares to the running ones (FreeMatch, section 4.2), (T,).

    Both shares are divided by the histograms of the predicted classes first, so that what is compared is how sure the
    model is of each class and not how often it is met. The sign is that of the paper and of its code, by which even
    shares give -log K and uneven ones less.

    Args:
        logits: of strong views (T, U, K).
        mask: 1 for rows that train (T, U); a trial without any has the loss 0.
        shares: running mean probability of each class (T, K).
        counts: running histogram of the predicted classes, positive (T, K).
    """
    probabilities = torch.softmax(logits, -1)
    mean = (probabilities * mask.unsqueeze(-1)).sum(1) / mask.sum(-1, keepdim=True).clamp(min=1)  # (T, K)
    seen = histogram(logits.argmax(-1), mask, logits.shape[-1])
    # a class that no row of the batch is predicted as has no say, as in the published code
    batch = _share(torch.where(seen > 0, mean / seen.clamp(min=_EPS), torch.zeros_like(mean)))
    return (_share(shares / counts.clamp(min=_EPS)) * torch.log(batch + _EPS)).sum(-1) * (mask.sum(-1) > 0)


def _share(values: Tensor) -> Tensor:
    """Values (T, K) over their sum."""
    return values / values.sum(-1, keepdim=True).clamp(min=_EPS)


def note_classes(given: Tensor, places: Tensor, classes: Tensor) -> Tensor:
    """Classes of the pool's images (T, N) after a batch that stands at `places` (T, U) and was given `classes`.

    A negative class leaves an image as it was; one drawn twice takes the larger class, on every device.
    """
    news = torch.full_like(given, -1).scatter_reduce(1, places, classes, "amax")
    return torch.where(news >= 0, news, given)


def learning_effect(given: Tensor, present: Tensor, classes: int) -> Tensor:
    """Share of each class among the images given to it, over the largest one (FlexMatch, section 3.1), (T, K).

    As long as more images are given to no class than to any, it is over those, so that all effects start at 0.

    Args:
        given: class of each unlabelled image, -1 for none (T, N).
        present: False for padding (T, N).
        classes: K.
    """
    # images of no class are counted first, padding nowhere
    counts = torch.zeros(len(given), classes + 1, device=given.device)
    counts.scatter_add_(1, given + 1, present.to(counts.dtype))
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
