"""Class distributions: distances between them, and what a method concludes from them, over a trials axis."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-12


def symmetric_divergence(one: Tensor, other: Tensor) -> Tensor:
    """Mean of both Kullback-Leibler divergences (T,) between distributions (T, K), in nats."""
    one, other = one.clamp(min=_EPS), other.clamp(min=_EPS)
    return 0.5 * ((one - other) * (one.log() - other.log())).sum(-1)


def reversed_ranks(prior: Tensor) -> Tensor:
    """The distribution (T, K) in which the most frequent class has the rarest one's share, and so on down the ranks."""
    ordered, order = prior.sort(stable=True, dim=-1, descending=True)
    return torch.empty_like(prior).scatter_(-1, order, ordered.flip(-1))


def distance_from_labeled(estimated: Tensor, prior: Tensor) -> Tensor:
    """How far an estimated distribution is from the labelled one, against two other anchors (ACR), (T,).

    The softmax over its divergences from the labelled distribution, the uniform one and the labelled one with reversed
    ranks: near 0 where it is the labelled one, near 1/2 where it is the reverse of a steep one.

    Args:
        estimated: class distribution of the unlabelled pictures (T, K).
        prior: that of the labelled ones (T, K).
    """
    anchors = (prior, torch.full_like(prior, 1.0 / prior.shape[-1]), reversed_ranks(prior))
    divergences = torch.stack([symmetric_divergence(estimated, anchor) for anchor in anchors], -1)  # (T, 3)
    return torch.softmax(divergences, -1)[:, 0]
