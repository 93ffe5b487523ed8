"""Margins, weights and targets in favour of rare or hard classes, over a trials axis."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def class_counts(labels: Tensor, classes: int) -> Tensor:
    """Rows of each class (T, K) among labels (T, L), of which negative ones are padding and count nowhere."""
    chosen = F.one_hot(labels.clamp(min=0), classes) * (labels >= 0).unsqueeze(-1)  # (T, L, K)
    return chosen.sum(1).float()


def with_margin(logits: Tensor, labels: Tensor, margins: Tensor) -> Tensor:
    """Take each row's margin from the logit of its own class, so that it has to win by that much more.

    Args:
        logits: (T, B, K).
        labels: int64 (T, B).
        margins: of each class (T, K).

    Returns:
        Logits (T, B, K).
    """
    one_hot = F.one_hot(labels, logits.shape[-1])  # (T, B, K)
    # for a softmax this is the same as adding the margin to all other classes
    return logits - one_hot * margins.unsqueeze(1)


def balanced_one_hot(labels: Tensor, log_prior: Tensor, tau: Tensor) -> Tensor:
    """One-hot labels whose rows weigh (L / (K n_k))^tau, so that at tau = 1 all classes have the same total weight.

    Args:
        labels: int64 (T, L), negative for padding, whose rows are zero.
        log_prior: log(n_k / L), shape (T, K).
        tau: strength (T,); 0 gives plain one-hot rows, as any strength does in balanced data.

    Returns:
        Rows (T, L, K).
    """
    classes = log_prior.shape[1]
    one_hot = F.one_hot(labels.clamp(min=0), classes) * (labels >= 0).unsqueeze(-1)  # (T, L, K)
    return one_hot * torch.exp(-tau.view(-1, 1) * (log_prior + math.log(classes))).unsqueeze(1)


def ldam_margins(counts: Tensor, largest: Tensor) -> Tensor:
    """Delta_k = C / n_k^(1/4) with C giving the rarest class the largest margin (LDAM, arXiv 1906.07413, section 3).

    Args:
        counts: labelled rows of each class (T, K); classes without any are treated as if they had one.
        largest: the margin of the rarest class, in cosines, shape (T,).

    Returns:
        Margins in cosines (T, K).
    """
    # only ratios matter, so an empty class must not set the scale for all others
    margins = counts.clamp(min=1) ** -0.25
    return largest.view(-1, 1) * margins / margins.amax(-1, keepdim=True)


def effective_weights(counts: Tensor, beta: Tensor) -> Tensor:
    """Weights (1 - beta) / (1 - beta^n_k), scaled to a mean of 1 (class-balanced loss, arXiv 1901.05555, section 4).

    Args:
        counts: labelled rows of each class (T, K); classes without any are treated as if they had one.
        beta: in [0, 1), shape (T,); 0 weighs all classes the same, close to 1 by inverse frequency.

    Returns:
        Weights (T, K).
    """
    wide = beta.double().view(-1, 1)  # 1 - beta^n loses all its digits in float32
    weights = (1 - wide) / (1 - wide ** counts.double().clamp(min=1))
    return (weights / weights.mean(-1, keepdim=True)).to(counts.dtype)


def balanced_margins(counts: Tensor, strength: Tensor) -> Tensor:
    """Margins of FineSSL's balanced margin softmax (arXiv 2405.11756, as its code has them).

    beta_k = n_k / max n; alpha_k = strength (max beta - min beta) (1 - beta_k) / (1 + beta_k).

    Args:
        counts: images assigned to each class so far (T, K).
        strength: alpha in logits (T,).

    Returns:
        Margins in [0, strength], (T, K); all zero while no class has any, or all have the same.
    """
    # without any image all fractions are 0, their gap is 0, and so are the margins
    beta = counts / counts.amax(-1, keepdim=True).clamp(min=1)  # (T, K)
    gap = beta.amax(-1, keepdim=True) - beta.amin(-1, keepdim=True)
    return strength.view(-1, 1) * gap * (1 - beta) / (1 + beta)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
    """Cross-entropy (T, B) to (1 - s) on the label and s / (K - 1) on each other class.

    Args:
        logits: (T, B, K).
        labels: int64 (T, B).
        smoothing: s in [0, 1], shape (T,).
    """
    negative = -torch.log_softmax(logits, dim=-1)  # (T, B, K)
    label_loss = negative.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    s = smoothing.view(-1, 1)
    return (1 - s) * label_loss + s * (negative.sum(-1) - label_loss) / max(1, logits.shape[-1] - 1)
