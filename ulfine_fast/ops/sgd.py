"""Stochastic gradient descent with a learning rate, momentum and weight decay for each trial."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ulfine_fast.ops import kernels


def cosine_rate(step: int, steps: int) -> float:
    """Factor of the peak learning rate: 1 at step 0, falling to 0 after the last step along a half cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


@torch.no_grad()
def sgd_step(
    parameters: Mapping[str, Tensor],
    velocity: Mapping[str, Tensor],
    lr: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
) -> None:
    """One step of torch.optim.SGD's rule (no Nesterov, no dampening), in place, for T trials.

    Args:
        parameters: leaf tensors of shape (T, ...) with gradients; one without a gradient is not moved.
        velocity: momentum buffers of the same names and shapes, zero before the first step.
        lr: learning rate of each trial (T,).
        momentum: in [0, 1), shape (T,).
        weight_decay: (T,).
    """
    for name, parameter in parameters.items():
        if parameter.grad is None:
            continue
        shape = (-1,) + (1,) * (parameter.dim() - 1)
        gradient = parameter.grad + weight_decay.view(shape) * parameter
        velocity[name].mul_(momentum.view(shape)).add_(gradient)
        parameter.sub_(lr.view(shape) * velocity[name])
        parameter.grad = None


def decay_velocity_(velocity: Tensor, parameters: Tensor, momentum: Tensor, decay: Tensor) -> None:
    """Velocity <- m velocity + d parameters, in place: all of :func:`sgd_step` that needs no gradient.

    Args:
        velocity: (T, P).
        parameters: (T, P).
        momentum: m (T,).
        decay: weight decay d (T,).
    """
    if kernels.usable(velocity):
        kernels.decay_velocity_(velocity, parameters, momentum, decay)
        return
    velocity.mul_(momentum.unsqueeze(1)).addcmul_(parameters, decay.unsqueeze(1))
