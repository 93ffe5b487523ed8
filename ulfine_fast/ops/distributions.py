"""Class distributions over a trials axis: distances between them, alignment, and how rare classes are."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-12


def symmetric_divergence(one: Tensor, other: Tensor) -> Tensor:
    """Mean of both Kullback-Leibler divergences (T,) between distributions (T, K), in nats."""
    one, other = one.clamp(min=_EPS), other.clamp(min=_EPS)
    return 0.5 * ((one - other) * (one.log() - other.log())).sum(-1)


def reversed_ranks(prior: Tensor) -> Tensor:
    """The distribution (T, K) with reversed ranks: the most frequent class gets the rarest one's prior, and so on."""
    ordered, order = prior.sort(stable=True, dim=-1, descending=True)
    return torch.empty_like(prior).scatter_(-1, order, ordered.flip(-1))


def distance_from_labeled(estimated: Tensor, prior: Tensor) -> Tensor:
    """How far an estimated distribution is from the labelled one, against two other anchors (ACR), (T,).

    The softmax over its divergences from the labelled distribution, the uniform one and the labelled one with reversed
    ranks: near 0 where it is the labelled one, near 1/2 where it is the reverse of a steep one.

    Args:
        estimated: class distribution of the unlabelled images (T, K).
        prior: that of the labelled ones (T, K).
    """
    anchors = (prior, torch.full_like(prior, 1.0 / prior.shape[-1]), reversed_ranks(prior))
    divergences = torch.stack([symmetric_divergence(estimated, anchor) for anchor in anchors], -1)  # (T, 3)
    return torch.softmax(divergences, -1)[:, 0]


def aligned(probabilities: Tensor, target: Tensor, mean: Tensor) -> Tensor:
    """Probabilities (T, B, K) times target over mean, each row normalised (distribution alignment, arXiv 1911.09785).

    Args:
        probabilities: (T, B, K).
        target: wanted class distribution, up to a factor (T, K).
        mean: running mean of the probabilities (T, K).
    """
    moved = probabilities * (target / mean.clamp(min=_EPS)).unsqueeze(1)
    return moved / moved.sum(-1, keepdim=True).clamp(min=_EPS)


def rarity(log_prior: Tensor) -> Tensor:
    """Count of the rarest labelled class over that of each (T, K), in (0, 1]; 1 for classes without labels.

    Args:
        log_prior: log class frequencies (T, K); under 1e-7 a class counts as one without labels.
    """
    labeled = log_prior.exp() > 1e-7
    # an absent class must not set the scale for all others
    least = log_prior.masked_fill(~labeled, torch.inf).amin(-1, keepdim=True)
    return torch.where(labeled, torch.exp(least - log_prior), torch.ones_like(log_prior))


def filled_prior(log_prior: Tensor, fraction: float = 0.25) -> Tensor:
    """Class frequencies (T, K) in which a class without labels has a fraction of the rarest other one's.

    Args:
        log_prior: log class frequencies (T, K); under 1e-7 a class counts as one without labels.
        fraction: above 0.
    """
    labeled = log_prior.exp() > 1e-7
    least = log_prior.masked_fill(~labeled, torch.inf).amin(-1, keepdim=True)
    # without any label all classes are the same
    least = torch.where(torch.isinf(least), torch.zeros_like(least), least)
    filled = torch.where(labeled, log_prior.exp(), fraction * least.exp())
    return filled / filled.sum(-1, keepdim=True)


def rank_thirds(prior: Tensor) -> Tensor:
    """Third of each class by frequency (T, K): 0 for the most frequent classes, 1, and 2 for the rarest."""
    classes = prior.shape[-1]
    ranks = prior.argsort(stable=True, dim=-1, descending=True).argsort(-1)
    return ranks * 3 // classes
