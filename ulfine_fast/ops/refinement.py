"""Refinement of pseudo-labels to wanted class totals (DARP, arXiv 2007.08844, section 3), over a trials axis."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-6


def refine(probabilities: Tensor, present: Tensor, totals: Tensor, rounds: int = 50) -> Tensor:
    """Rows that sum to one and columns that sum to the totals, least far from the probabilities.

    Minimises the sum over rows of KL(x_n || p_n) / H(p_n), H the entropy: uncertain rows move more (equation 2).
    The solution has the form x_nk ~ p_nk exp(-nu_k H_n); the paper's coordinate ascent finds nu class by class, here
    all classes take a Newton step on the log of their column sum together.

    Args:
        probabilities: p (T, N, K).
        present: False for padding, which does not count (T, N).
        totals: wanted column sums, non-negative, which sum to the number of rows (T, K).
        rounds: Newton steps.

    Returns:
        x of shape (T, N, K); rows of padding are zero.
    """
    logs = torch.log(probabilities.clamp(min=1e-30))
    # a row without entropy would not move at all, and could leave totals out of reach
    entropy = (-(probabilities * logs).sum(-1)).clamp(min=1e-3)  # (T, N)
    rows = present.unsqueeze(-1).to(logs.dtype)
    nu = torch.zeros_like(totals)
    for _ in range(rounds):
        x = torch.softmax(logs - entropy.unsqueeze(-1) * nu.unsqueeze(1), -1) * rows  # (T, N, K)
        sums = x.sum(1).clamp(min=1e-12)
        slope = (x * entropy.unsqueeze(-1)).sum(1) / sums
        step = torch.log(sums / totals.clamp(min=1e-12)) / slope.clamp(min=1e-3)
        nu = nu + step.clamp(-5, 5)
    return torch.softmax(logs - entropy.unsqueeze(-1) * nu.unsqueeze(1), -1) * rows


def prune(probabilities: Tensor, present: Tensor, totals: Tensor, keep: Tensor) -> Tensor:
    """Of each class, keep the most probable rows, as many as its total times `keep`; rows are normalised (section 3.3).

    As in the published code, the kept entries of a class are first scaled to sum to its total.

    Args:
        probabilities: (T, N, K).
        present: False for padding (T, N).
        totals: wanted column sums (T, K).
        keep: multiple of the total that is kept, delta's counterpart (T,).
    """
    shown = probabilities.masked_fill(~present.unsqueeze(-1), -1.0)
    ranks = shown.argsort(1, descending=True).argsort(1)  # (T, N, K)
    kept = (ranks < torch.floor(keep.view(-1, 1) * totals).unsqueeze(1)) * probabilities
    scale = (totals + _EPS) / (kept.sum(1) + _EPS)
    moved = kept * scale.unsqueeze(1) + _EPS
    return moved / moved.sum(-1, keepdim=True)
