"""The trainable tensors, each with a leading trials axis T, and the logits they give."""

from __future__ import annotations

import torch
from torch import Tensor

from ulfine_fast.ops.philox import Purpose, normals
from ulfine_fast.ops.prototypes import normalize

Tensors = dict[str, Tensor]


def new_adapter(seeds: Tensor, dim: int, rank: int) -> Tensors:
    """Residual adapters that start as the identity: `down` (T, D, r) drawn from each trial's seed, `up` (T, r, D) zero.

    The layer norm before `down` has scale (T, D) and shift (T, D).
    """
    trials = len(seeds)
    down = normals(seeds, 0, Purpose.WEIGHTS, dim * rank).view(trials, dim, rank)
    return {
        "adapter.scale": torch.ones(trials, dim, device=seeds.device),
        "adapter.shift": torch.zeros(trials, dim, device=seeds.device),
        "adapter.down": down * (2.0 / dim) ** 0.5,
        "adapter.up": torch.zeros(trials, rank, dim, device=seeds.device),
    }


def adapt(tensors: Tensors, features: Tensor, strength: Tensor) -> Tensor:
    """f(x) = normalize(x + s W_up relu(W_down LN(x))) (after CLIP-Adapter, arXiv 2110.04544).

    Args:
        tensors: the heads; without adapter tensors f is the identity.
        features: unit rows (T, B, D).
        strength: s (T,).

    Returns:
        Unit rows (T, B, D).
    """
    if "adapter.up" not in tensors:
        return features
    mean = features.mean(-1, keepdim=True)
    variance = features.var(-1, unbiased=False, keepdim=True)
    standard = (features - mean) * torch.rsqrt(variance + 1e-5)
    standard = standard * tensors["adapter.scale"].unsqueeze(1) + tensors["adapter.shift"].unsqueeze(1)
    hidden = torch.relu(standard @ tensors["adapter.down"])  # (T, B, r)
    return normalize(features + strength.view(-1, 1, 1) * (hidden @ tensors["adapter.up"]))


def cosine_logits(features: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """Sigma * cos(f(x), w_k).

    Args:
        features: unit rows (T, B, D).
        weights: class vectors of any length (T, K, D).
        scale: sigma (T,).

    Returns:
        Logits (T, B, K) in [-sigma, sigma].
    """
    return scale.view(-1, 1, 1) * (features @ normalize(weights).transpose(1, 2))
