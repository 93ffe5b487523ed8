"""Losses with a sigmoid for each class, over a trials axis."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6


class Targets(NamedTuple):
    """Which labels count as present and which as absent; a label of which both are 0 is ignored.

    Attributes:
        present: 0 or 1 (T, B, K).
        absent: 0 or 1 (T, B, K).
    """

    present: Tensor
    absent: Tensor


class Focus(NamedTuple):
    """How much a loss focuses on labels that are hard to predict.

    Attributes:
        positive: powers of present labels (T, 1, K).
        negative: powers of absent labels (T, 1, K).
        clip: probability up to which an absent label costs nothing (T, 1, 1).
        weight: of a class (T, 1, K).
    """

    positive: Tensor
    negative: Tensor
    clip: Tensor
    weight: Tensor


def make_targets(labels: Tensor, ignore: Tensor) -> Targets:
    """Targets of labels 1, 0 and -1 (T, B, K); unknown ones are absent except in trials that ignore them, bool (T,)."""
    absent = (labels == 0) | ((labels < 0) & ~ignore.view(-1, 1, 1))
    return Targets((labels > 0).float(), absent.float())


def binary_cross_entropy(logits: Tensor, targets: Targets) -> Tensor:
    """Sum over classes, mean over images: logits (T, B, K) to (T,)."""
    loss = -targets.present * F.logsigmoid(logits) - targets.absent * F.logsigmoid(-logits)
    return loss.sum(-1).mean(-1)


def focal(log_probability: Tensor, targets: Targets, focus: Focus) -> Tensor:
    """Asymmetric loss (arXiv 2009.14119) with powers and weights of each class (COMIC's multi-focal modifier).

    With p_m = max(p - clip, 0) a present label costs -w (1 - p)^g+ log p and an absent one -w p_m^g- log(1 - p_m). The
    focusing factors carry no gradient, as in the code of both papers.

    Args:
        log_probability: log p (T, B, K), at most 0.
        targets: present and absent labels.
        focus: powers and weights.

    Returns:
        Sum over classes, mean over images (T,).
    """
    p = log_probability.exp()
    clipped = (p - focus.clip).clamp(min=0.0)  # (T, B, K)
    with torch.no_grad():
        factor = (1 - p).pow(focus.positive) * targets.present + clipped.pow(focus.negative) * targets.absent
    log_likelihood = targets.present * log_probability + targets.absent * torch.log((1 - clipped).clamp(min=_EPS))
    return -(focus.weight * factor * log_likelihood).sum(-1).mean(-1)


def rarity(counts: Tensor, power: Tensor) -> Tensor:
    """(1 - log(n_k / max_i n_i))^power, 1 for the largest class and more for rarer ones; counts (T, K), power (T,)."""
    fraction = counts.clamp(min=1.0) / counts.amax(-1, keepdim=True).clamp(min=1.0)
    return (1 - fraction.log()).pow(power.view(-1, 1))
