"""Classifiers with a sigmoid for each class: normalised class vectors and a bias, several side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ETA = 1 / 32


@dataclass
class Heads:
    """H classifiers of T trials.

    Attributes:
        parameters: "weights" (T, H, K, D) and "bias" (T, H, K), leaves with gradients.
        velocity: SGD's momentum, of the same names and shapes.
    """

    parameters: dict[str, Tensor]
    velocity: dict[str, Tensor]

    @classmethod
    def from_vectors(cls, vectors: Tensor, bias: Tensor, heads: int) -> Heads:
        """All H start from the same class vectors (T, K, D) and bias (T,)."""
        parameters = {
            "weights": vectors.unsqueeze(1).repeat(1, heads, 1, 1).requires_grad_(),
            "bias": bias.view(-1, 1, 1).repeat(1, heads, vectors.shape[1]).requires_grad_(),
        }
        return cls(parameters, {name: torch.zeros_like(parameter) for name, parameter in parameters.items()})


def normalised(weights: Tensor) -> Tensor:
    """COMIC's normalised class vectors w / (|w| + 1/32): shorter than one, the more so the shorter w is."""
    return weights / ((weights.square().sum(-1, keepdim=True) + 1e-12).sqrt() + _ETA)


def head_logits(parameters: dict[str, Tensor], features: Tensor, scale: Tensor) -> Tensor:
    """Rho w^T f / (|w| + 1/32) + b.

    Args:
        parameters: see :class:`Heads`.
        features: unit rows (T, B, D).
        scale: rho (T,).

    Returns:
        (T, H, B, K).
    """
    scores = features.unsqueeze(1) @ normalised(parameters["weights"]).transpose(-1, -2)  # (T, H, B, K)
    return scale.view(-1, 1, 1, 1) * scores + parameters["bias"].unsqueeze(2)
