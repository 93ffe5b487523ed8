"""Dual logit fusion (DLF): one logit vector from the linear head and the similarity head."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-6


def align(linear: Tensor, similarity: Tensor, rule: str) -> Tensor:
    """Bring the linear head's logits to the similarity head's scale, row by row.

    ULFine's abstract says that both logits are aligned; the rule is our completion.

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
    centred = linear - linear.mean(-1, keepdim=True)
    deviation = _deviation(linear)
    return centred / deviation * _deviation(similarity) + similarity.mean(-1, keepdim=True)


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
    weight = eta.view(-1, 1, 1)
    return weight * align(linear, similarity, rule) + (1 - weight) * similarity


def _deviation(logits: Tensor) -> Tensor:
    # population deviation with epsilon inside the root: a single class (K = 1) has none, and must not divide by zero
    return torch.sqrt(logits.var(dim=-1, unbiased=False, keepdim=True) + _EPS**2)
