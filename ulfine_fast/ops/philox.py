"""Counter-based random numbers: a draw depends on (trial seed, step, purpose) alone, never on neighbours or device.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), in int64 tensor arithmetic.
"""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor

from ulfine_fast.ops import kernels

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


class Purpose(enum.IntEnum):
    """What a stream of numbers is for; streams of different purposes are independent."""

    WEIGHTS = 0
    LABELED = 1
    LABELED_VIEW = 2
    UNLABELED = 3
    WEAK_VIEW = 4
    STRONG_VIEW = 5
    LABELED_NOISE = 6
    STRONG_NOISE = 7
    FOLDS = 8
    BLEND = 9
    SAMPLES = 20


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter: int64 words in [0, 2**32), shape (..., 4).
        key: int64 words in [0, 2**32), shape (..., 2), broadcast against the counter.

    Returns:
        int64 words in [0, 2**32), shape (..., 4).
    """
    a, b, c, d = counter.unbind(-1)
    low, high = key.unbind(-1)
    for _ in range(10):
        # int64 products wrap, but their 64 bits are those of the unsigned product
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((second >> 32) & _MASK) ^ b ^ low,
            second & _MASK,
            ((first >> 32) & _MASK) ^ d ^ high,
            first & _MASK,
        )
        low, high = (low + _WEYL[0]) & _MASK, (high + _WEYL[1]) & _MASK
    return torch.stack(torch.broadcast_tensors(a, b, c, d), dim=-1)


def words(seeds: Tensor, steps: Tensor, purpose: Purpose, count: int) -> Tensor:
    """Random 32-bit words for every step and trial.

    Args:
        seeds: trial seeds, int64 (T,).
        steps: step numbers, int64 (S,).
        purpose: the stream.
        count: how many words B for each step and trial.

    Returns:
        int64 words in [0, 2**32), shape (S, T, B).
    """
    blocks = torch.arange((count + 3) // 4, device=seeds.device)  # (N,)
    shape = (len(steps), len(seeds), len(blocks))
    purposes = torch.full(shape, int(purpose), device=seeds.device)
    counter = torch.stack(
        [blocks.expand(shape), steps.view(-1, 1, 1).expand(shape), purposes, torch.zeros_like(purposes)], dim=-1
    )  # (S, T, N, 4)
    key = torch.stack([seeds & _MASK, (seeds >> 32) & _MASK], dim=-1)  # (T, 2)
    return philox(counter, key.view(1, -1, 1, 2)).flatten(-2)[..., :count]


def integers(seeds: Tensor, steps: Tensor, purpose: Purpose, count: int, below: Tensor) -> Tensor:
    """Uniform integers in [0, below), with a bound for each trial.

    Args:
        seeds: trial seeds, int64 (T,).
        steps: step numbers, int64 (S,).
        purpose: the stream.
        count: how many numbers B for each step and trial.
        below: positive bounds, int64 (T,).

    Returns:
        int64 of shape (S, T, B).
    """
    if kernels.runs_on(seeds.device):
        return kernels.random_integers(seeds, steps, int(purpose), count, below)
    # multiply-shift: exact in int64, so that CPU and GPU draw the same rows
    return (words(seeds, steps, purpose, count) * below.view(1, -1, 1)) >> 32


def uniforms(seeds: Tensor, step: int | Tensor, purpose: Purpose, count: int) -> Tensor:
    """Numbers strictly between 0 and 1, float64 (T, count); the step is a number, or a tensor (1,) on the device."""
    return (words(seeds, _one_step(step, seeds), purpose, count)[0].double() + 0.5) / 2.0**32


def normals(seeds: Tensor, step: int | Tensor, purpose: Purpose, count: int) -> Tensor:
    """Standard normal numbers (T, count), float32, by the Box-Muller transform."""
    if kernels.runs_on(seeds.device):
        return kernels.random_normals(seeds, _one_step(step, seeds), int(purpose), count)
    uniform = uniforms(seeds, step, purpose, 2 * count)  # (T, 2 count)
    radius = torch.sqrt(-2.0 * torch.log(uniform[:, :count]))
    return (radius * torch.cos(2.0 * math.pi * uniform[:, count:])).float()


def _one_step(step: int | Tensor, seeds: Tensor) -> Tensor:
    """The step as int64 (1,); filled on the device, as a copy from main memory would wait for the work before it."""
    return step if isinstance(step, Tensor) else torch.full((1,), step, device=seeds.device)
