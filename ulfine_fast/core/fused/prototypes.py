"""Prototype adaptive fitting in place: class means, moving averages and fitting without temporaries of size K x D."""

from __future__ import annotations

import torch
from torch import Tensor

from ulfine_fast.core.fused.buffers import Buffers
from ulfine_fast.core.fused.heads import inverse_lengths


def move_visual_(
    visual: Tensor, seen: Tensor, rows: Tensor, inverse: Tensor, labels: Tensor, momentum: Tensor, buffers: Buffers
) -> None:
    """Move the visual prototypes to the class means of a batch, in place.

    The specification is :func:`ulfine_fast.ops.prototypes.class_means` followed by
    :func:`ulfine_fast.ops.prototypes.move_visual`.

    Args:
        visual: (T, K, D), contiguous.
        seen: bool (T, K); classes of the batch are set.
        rows: labelled rows of any length (T, B, D).
        inverse: 1 / ||row|| (T, B, 1).
        labels: int64 (T, B).
        momentum: m (T,).
        buffers: where the weighted rows go.
    """
    trials, classes, _ = visual.shape
    counts = torch.zeros_like(visual[..., 0]).scatter_add_(1, labels, torch.ones_like(inverse.squeeze(2)))  # (T, K)
    kept = seen * momentum.unsqueeze(1)  # a class that is met for the first time keeps nothing
    row_weight = ((1.0 - kept) / counts.clamp(min=1.0)).gather(1, labels).unsqueeze(2)
    visual.mul_(torch.where(counts > 0, kept, 1.0).unsqueeze(2))
    # each row is added to its class alone; a product with one-hot classes would read K of them
    index = labels + classes * torch.arange(trials, device=labels.device).unsqueeze(1)
    weighted = torch.mul(rows, row_weight * inverse, out=buffers.lend("weighted", *rows.shape))
    visual.flatten(0, 1).index_add_(0, index.flatten(), weighted.flatten(0, 1))
    seen.logical_or_(counts > 0)
    visual.mul_(torch.where(counts > 0, inverse_lengths(visual), 1.0).unsqueeze(2))


def fit_prototypes_(textual: Tensor, visual: Tensor, alpha: Tensor, seen: Tensor) -> None:
    """c_k <- normalised ((1 - alpha_k) c_k + alpha_k v_k) for classes seen, in place.

    The specification is :func:`ulfine_fast.ops.prototypes.fit_prototypes`.

    Args:
        textual: c (T, K, D).
        visual: v (T, K, D).
        alpha: pace in [0, 1], shape (T, K).
        seen: bool (T, K); other classes keep their prototype.
    """
    # only the direction of the sum matters: c + alpha / (1 - alpha) ||c|| v has it too, with one product less
    factor = alpha / (1.0 - alpha).clamp(min=1e-12) * torch.linalg.vector_norm(textual, dim=-1)
    textual.addcmul_(visual, (factor * seen).unsqueeze(2))
    textual.mul_(torch.where(seen, inverse_lengths(textual), 1.0).unsqueeze(2))
