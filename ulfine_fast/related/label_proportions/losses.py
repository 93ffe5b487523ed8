"""Learning from class shares of bags, over axes of trials T and bags G, with at most m images in a bag."""

from __future__ import annotations

import torch
from torch import Tensor

from ulfine_fast.ops.transport import transport

# the least share of a class in logarithms: exp of minus infinity minus itself would be no number
_LEAST = 1e-8
# log 0 of the reverse cross-entropy, as symmetric cross-entropy has it (arXiv 1908.06112, section 4)
_CLIP = 1e-4


def proportion_loss(logits: Tensor, shares: Tensor, present: Tensor) -> Tensor:
    """Cross-entropy of a bag's shares with its mean prediction: -sum_k rho_k log(1/m sum_i p_ik).

    The bag-level loss of proportions (arXiv 1905.12909; stage one of arXiv 2105.10635), without its constant.

    Args:
        logits: (T, G, m, K).
        shares: rho, sums to 1 (T, G, K).
        present: bool (T, G, m), at least one in each bag; other images have no weight.

    Returns:
        Losses of the bags (T, G).
    """
    log_probabilities = torch.log_softmax(logits, -1).masked_fill(~present.unsqueeze(-1), -1e30)
    sizes = present.sum(-1, keepdim=True).to(logits.dtype)  # (T, G, 1)
    # in logarithms, as a share that no image reaches must not become log 0
    return -(shares * (torch.logsumexp(log_probabilities, 2) - torch.log(sizes))).sum(-1)


def sinkhorn(logits: Tensor, shares: Tensor, present: Tensor, rounds: int = 100) -> Tensor:
    """Class probabilities of a bag's images whose mean is the bag's shares, nearest to softmax of the logits.

    The plan of entropic transport at epsilon = 1, for which the model's own probabilities are the kernel: columns and
    rows scaled in turn (:func:`ulfine_fast.ops.transport.transport`), ending on rows.

    Args:
        logits: (T, G, m, K).
        shares: sums to 1, zeros allowed (T, G, K).
        present: bool (T, G, m).
        rounds: alternations; the means reach the shares up to what they leave.

    Returns:
        Probabilities (T, G, m, K); those of absent images mean nothing.
    """
    log_shares = torch.log(shares.clamp(min=_LEAST)).flatten(0, 1).unsqueeze(1)  # (T G, 1, K)
    plan = transport(logits.flatten(0, 1).unsqueeze(2), log_shares, present.flatten(0, 1), rounds)
    return plan.squeeze(2).view_as(logits)


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
