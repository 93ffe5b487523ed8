"""Cross-entropies over a trials axis, and pseudo-labels."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ulfine_fast.ops.softmax import softmax


def adjusted_cross_entropy(logits: Tensor, labels: Tensor, log_prior: Tensor, tau: Tensor) -> Tensor:
    """Logit-adjusted cross-entropy of each row, Menon et al. (arXiv 2007.07314, equation 10).

    Args:
        logits: (T, B, K).
        labels: int64 in [0, K), shape (T, B).
        log_prior: log class frequencies (T, K).
        tau: strength (T,); 0 is plain cross-entropy.

    Returns:
        Losses of shape (T, B).
    """
    adjusted = logits + (tau.view(-1, 1) * log_prior).unsqueeze(1)  # (T, B, K)
    return F.cross_entropy(adjusted.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


class PseudoLabels(NamedTuple):
    """Pseudo-labels of a batch.

    Attributes:
        labels: classes, int64 (T, B).
        mask: how much each row trains, mostly 0 or 1 (T, B).
        probabilities: of all classes (T, B, K).
    """

    labels: Tensor
    mask: Tensor
    probabilities: Tensor


def pseudo_labels(logits: Tensor, threshold: Tensor, temperature: Tensor) -> PseudoLabels:
    """Hard pseudo-labels, kept where the largest probability reaches the threshold (FixMatch, arXiv 2001.07685).

    Args:
        logits: of the weak view (T, B, K).
        threshold: in [0, 1], shape (T,); a probability equal to it is kept.
        temperature: positive divisor of the logits (T,).

    Returns:
        Labels, float mask of 0 and 1, and probabilities; none carries a gradient.
    """
    probabilities = softmax(logits.detach() / temperature.view(-1, 1, 1))  # (T, B, K)
    confidence, labels = probabilities.max(dim=-1)
    mask = (confidence >= threshold.view(-1, 1)).to(logits.dtype)
    return PseudoLabels(labels, mask, probabilities)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the kept values over the whole batch size (T,): few kept rows weigh little, as in FixMatch."""
    return (values * mask).mean(dim=-1)
