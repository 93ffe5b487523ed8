"""Dual logit fusion (DLF): one logit vector from the linear head and the similarity head."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-6


def align(linear: Tensor, similarity: Tensor, rule: str) -> Tensor:
    """Bring the linear head's logits to the similarity head's scale, row by row.

    ULFine's abstract says that both logits are aligned; the rule is ours.

    Args:
        linear: logits (T, B, K).
        similarity: logits (T, B, K).
        rule: "standardize" gives each row the similarity row's mean and standard deviation; "max-ratio" gives it the
            same largest magnitude; "none" leaves it.

    Returns:
        Aligned linear logits (T, B, K).
    """
    if rule == "none":
        return linear
    if rule == "max-ratio":
        ratio = similarity.abs().amax(-1, keepdim=True) / (linear.abs().amax(-1, keepdim=True) + _EPS)
        return linear * ratio
    mean, level = linear.mean(-1, keepdim=True), similarity.mean(-1, keepdim=True)
    centred = linear - mean
    # lengths instead of variances, which are slow; their epsilon: a single class (K = 1) has none, and must not
    # divide by zero
    spread, wanted = (
        torch.linalg.vector_norm(rows, dim=-1, keepdim=True) + _EPS for rows in (centred, similarity - level)
    )
    return torch.addcmul(level, centred, wanted / spread)


def fuse(linear: Tensor, similarity: Tensor, eta: Tensor, rule: str) -> Tensor:
    """Z = eta * aligned linear logits + (1 - eta) * similarity logits.

    Args:
        linear: (T, B, K).
        similarity: (T, B, K).
        eta: weight of the linear head in [0, 1], shape (T,).
        rule: see :func:`align`.

    Returns:
        Fused logits (T, B, K), on the similarity head's scale.
    """
    return torch.lerp(similarity, align(linear, similarity, rule), eta.view(-1, 1, 1))
