"""Prototype adaptive fitting (PAF): textual prototypes move towards visual ones, at a pace set by pseudo-labels."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-12


def normalize(rows: Tensor) -> Tensor:
    """Rows of unit length; a zero row stays zero and has a finite gradient, unlike x / ||x||."""
    return rows * torch.rsqrt(rows.square().sum(-1, keepdim=True) + _EPS)


def class_means(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean feature of each class in a batch.

    Args:
        features: (T, B, D).
        labels: int64 (T, B).
        classes: K.

    Returns:
        Means (T, K, D), zero for absent classes, and counts (T, K).
    """
    chosen = torch.nn.functional.one_hot(labels, classes).to(features.dtype)  # (T, B, K)
    counts = chosen.sum(1)  # (T, K)
    sums = chosen.transpose(1, 2) @ features  # (T, K, D)
    return sums / counts.clamp(min=1).unsqueeze(-1), counts


def move_visual(visual: Tensor, means: Tensor, counts: Tensor, seen: Tensor, momentum: Tensor) -> Tensor:
    """v_k <- normalised (m v_k + (1 - m) mean_k) for classes in the batch; a first sighting takes the mean itself.

    Args:
        visual: visual prototypes (T, K, D).
        means: class means of the batch (T, K, D).
        counts: their rows (T, K).
        seen: bool, classes met before this batch (T, K).
        momentum: m in [0, 1), shape (T,).

    Returns:
        Visual prototypes (T, K, D).
    """
    m = torch.where(seen, momentum.view(-1, 1), torch.zeros_like(counts)).unsqueeze(-1)  # (T, K, 1)
    moved = normalize(m * visual + (1 - m) * means)
    return torch.where((counts > 0).unsqueeze(-1), moved, visual)


def fitting_pace(prior: Tensor, mu: Tensor, rule: str) -> Tensor:
    """alpha_k = mu * P_k / max_i P_i (ULFine, arXiv 2505.05062), or the constant mu.

    Args:
        prior: pseudo-label distribution P (T, K).
        mu: largest pace (T,).
        rule: "pseudo-label" or "constant".

    Returns:
        alpha in [0, mu], shape (T, K).
    """
    if rule == "constant":
        return mu.view(-1, 1).expand_as(prior)
    return mu.view(-1, 1) * prior / (prior.amax(-1, keepdim=True) + _EPS)


def fit_prototypes(textual: Tensor, visual: Tensor, alpha: Tensor, seen: Tensor) -> Tensor:
    """c_k <- normalised ((1 - alpha_k) c_k + alpha_k v_k) for classes seen; the others keep their prototype.

    Args:
        textual: c (T, K, D).
        visual: v (T, K, D).
        alpha: pace in [0, 1], shape (T, K).
        seen: classes that have a visual prototype, bool (T, K).

    Returns:
        Prototypes (T, K, D).
    """
    pace = (alpha * seen).unsqueeze(-1)
    return torch.where(seen.unsqueeze(-1), normalize((1 - pace) * normalize(textual) + pace * visual), textual)


def orthogonality(prototypes: Tensor) -> Tensor:
    """|| C C^T - I ||_F^2 / K^2 of normalised prototypes (T, K, D), shape (T,); the form is our completion."""
    unit = normalize(prototypes)
    gram = unit @ unit.transpose(1, 2)  # (T, K, K)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return (gram - identity).square().mean(dim=(1, 2))


def move_prior(prior: Tensor, probabilities: Tensor, mask: Tensor, rho: Tensor, rule: str) -> Tensor:
    """Running class distribution of the unlabelled set: P <- rho P + (1 - rho) p, normalised.

    Args:
        prior: P (T, K).
        probabilities: of unlabelled images (T, B, K).
        mask: 1 for pseudo-labels over the threshold (T, B).
        rho: momentum in [0, 1), shape (T,).
        rule: "soft" takes p as the mean probability; "hard" as the fraction of each class among kept
            pseudo-labels, and leaves P as it is where a batch keeps none.

    Returns:
        P of shape (T, K), summing to one.
    """
    if rule == "soft":
        batch = probabilities.mean(1)  # (T, K)
    else:
        classes = probabilities.shape[-1]
        kept = torch.nn.functional.one_hot(probabilities.argmax(-1), classes) * mask.unsqueeze(-1)  # (T, B, K)
        total = kept.sum((1, 2)).unsqueeze(-1)
        batch = torch.where(total > 0, kept.sum(1) / total.clamp(min=1), prior)
    moved = rho.view(-1, 1) * prior + (1 - rho.view(-1, 1)) * batch
    return moved / moved.sum(-1, keepdim=True)
