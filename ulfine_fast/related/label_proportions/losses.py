"""Losses of class proportions of bags, over axes of trials T and bags G, with at most m images in a bag."""

from __future__ import annotations

import torch
from torch import Tensor

# log 0 of the reverse cross-entropy, as symmetric cross-entropy has it (arXiv 1908.06112, section 4)
_CLIP = 1e-4


def proportion_loss(logits: Tensor, proportions: Tensor, present: Tensor) -> Tensor:
    """Cross-entropy of a bag's proportions with its mean prediction: -sum_k rho_k log(1/m sum_i p_ik).

    The bag-level loss of proportions (arXiv 1905.12909; stage one of arXiv 2105.10635), without its constant.

    Args:
        logits: (T, G, m, K).
        proportions: rho, sums to 1 (T, G, K).
        present: bool (T, G, m), at least one in each bag; padding does not count.

    Returns:
        Losses of the bags (T, G).
    """
    log_probabilities = torch.log_softmax(logits, -1).masked_fill(~present.unsqueeze(-1), -1e30)
    sizes = present.sum(-1, keepdim=True).to(logits.dtype)  # (T, G, 1)
    # in logarithms, as a class that no image reaches must not become log 0
    return -(proportions * (torch.logsumexp(log_probabilities, 2) - torch.log(sizes))).sum(-1)


def symmetric_cross_entropy(logits: Tensor, targets: Tensor, reverse: Tensor) -> Tensor:
    """CE(target, p) + beta CE(p, target), log 0 taken as log 1e-4 (arXiv 1908.06112, equation 7, alpha = 1).

    Args:
        logits: (T, B, K).
        targets: probabilities (T, B, K).
        reverse: beta (T,).

    Returns:
        Losses (T, B).
    """
    log_probabilities = torch.log_softmax(logits, -1)
    backward = -(log_probabilities.exp() * torch.log(targets.clamp(min=_CLIP))).sum(-1)
    return reverse.unsqueeze(-1) * backward - (targets * log_probabilities).sum(-1)


def beta_draws(uniforms: Tensor) -> Tensor:
    """Draws from Beta(a, a), a whole number: the middle one of 2 a - 1 uniform numbers (..., 2 a - 1) -> (...)."""
    return uniforms.median(-1).values
