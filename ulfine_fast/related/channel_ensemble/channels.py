"""Heads over random channels of one feature, and terms that decorrelate their errors (after arXiv 2403.18407)."""

from __future__ import annotations

import torch
from torch import Tensor

from ulfine_fast.ops.philox import Purpose, words
from ulfine_fast.ops.prototypes import normalize

# a stream of weights that no adapter draws from
_CHANNELS = 1 << 20
_EPS = 1e-12


def draw_channels(seeds: Tensor, heads: int, dim: int, fraction: Tensor) -> Tensor:
    """Which channels each head sees: M random subsets, drawn from each trial's seed.

    Args:
        seeds: (T,).
        heads: M.
        dim: D.
        fraction: of the channels that are in a subset, in (0, 1], shape (T,); a subset has at least one channel.

    Returns:
        1 for channels of the subset, else 0: float32 (T, M, D). Subsets of two heads may overlap.
    """
    step = torch.tensor([_CHANNELS], device=seeds.device)
    drawn = words(seeds, step, Purpose.WEIGHTS, heads * dim)[0].view(-1, heads, dim)
    ranks = drawn.argsort(dim=-1, stable=True).argsort(dim=-1)  # (T, M, D)
    wanted = torch.round(fraction * dim).clamp(min=1)
    return (ranks < wanted.view(-1, 1, 1)).float()


def channel_logits(features: Tensor, weights: Tensor, channels: Tensor, scale: Tensor) -> Tensor:
    """Sigma * cos(x, w_mk) of each head m, over its channels alone.

    Args:
        features: unit rows (T, B, D).
        weights: class vectors of any length (T, M, K, D).
        channels: 0 or 1 (T, M, D).
        scale: sigma (T,).

    Returns:
        Logits (T, B, M, K).
    """
    masked = normalize(weights * channels.unsqueeze(2))  # (T, M, K, D)
    # a row's products need no mask, as the masked class vectors are zero there; its length does
    lengths = torch.sqrt(features.square() @ channels.transpose(1, 2) + _EPS)  # (T, B, M)
    products = (features @ masked.flatten(1, 2).transpose(1, 2)).unflatten(2, weights.shape[1:3])
    return scale.view(-1, 1, 1, 1) * products / lengths.unsqueeze(-1)


def low_bias(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean squared correlation of two heads' errors p_m - onehot(y) (T,), 0 for a single head (reconstruction).

    The variance of a mean of M heads is s^2 / M + (1 - 1 / M) r s^2: nothing is gained while the correlation r is 1.

    Args:
        logits: (T, B, M, K).
        labels: (T, B).
    """
    errors = _errors(torch.softmax(logits, -1), labels.unsqueeze(-1).expand(logits.shape[:-1]))
    # a row's errors sum to 0, so that cosines are correlations
    unit = normalize(errors.transpose(1, 2).flatten(2))  # (T, M, B K)
    squared = (unit @ unit.transpose(1, 2)).square()  # (T, M, M)
    heads = logits.shape[2]
    of_pairs = squared.sum((1, 2)) - squared.diagonal(dim1=1, dim2=2).sum(-1)
    return of_pairs / max(1, heads * (heads - 1))


def low_variance(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of the heads' mean probabilities from the labels (T,), a mean over rows (reconstruction).

    Args:
        logits: (T, B, M, K).
        labels: (T, B).
    """
    return _errors(torch.softmax(logits, -1).mean(2), labels).square().sum(-1).mean(-1)


def _errors(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Probabilities (..., K) less 1 at the class of labels (...)."""
    hot = torch.nn.functional.one_hot(labels, probabilities.shape[-1])
    return probabilities - hot.to(probabilities.dtype)
