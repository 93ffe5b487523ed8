"""Adapters and cosine heads over a leading trials axis T."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ulfine_fast.ops.philox import Purpose, normals
from ulfine_fast.ops.prototypes import normalize

Tensors = dict[str, Tensor]

_DRAWN_TOGETHER = 64
_LN_EPS = 1e-5


def padded_normals(seeds: Tensor, draw: int, ranks: Tensor, shape: Callable[[int], tuple[int, int]]) -> Tensor:
    """Standard normal weights whose shape depends on each trial's rank, zero beyond it.

    Args:
        seeds: (T,).
        draw: number of the stream of weights.
        ranks: of each trial (T,).
        shape: of one trial's weights, for a rank.

    Returns:
        (T, *shape(R)) for the largest rank R; each trial draws what it would draw alone.
    """
    weights = torch.zeros(len(seeds), *shape(int(ranks.max())), device=seeds.device)
    for rank in ranks.unique().tolist():
        high, wide = shape(int(rank))
        # the generator needs some hundred bytes for each number
        for part in (ranks == rank).nonzero().squeeze(1).split(_DRAWN_TOGETHER):
            drawn = normals(seeds[part], draw, Purpose.WEIGHTS, high * wide)
            weights[part, :high, :wide] = drawn.view(-1, high, wide)
    return weights


def unpadded(tensors: Tensors, rank: int) -> Tensors:
    """One trial's tensors without padding: those of low rank, (D, R) and (R, D), reduced to its `rank`."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        kind = name.rpartition(".")[2]
        if kind in ("down", "up"):
            result[name] = (tensor[:, :rank] if kind == "down" else tensor[:rank]).contiguous()
    return result


def new_adapter(seeds: Tensor, dim: int, ranks: Tensor) -> Tensors:
    """Residual adapters that start as the identity: `down` (T, D, R) drawn from each trial's seed, `up` (T, R, D) zero.

    The layer norm before `down` has scale (T, D) and shift (T, D). R is the largest of the ranks (T,); a trial of a
    smaller one has zeros in the columns of `down` and rows of `up` beyond it. They stay zero to the bit: their hidden
    values are relu(0), so that neither matrix gets a gradient there, and decay does not move zeros.
    """
    trials = len(seeds)
    down = padded_normals(seeds, 0, ranks, lambda rank: (dim, rank))
    return {
        "adapter.scale": torch.ones(trials, dim, device=seeds.device),
        "adapter.shift": torch.zeros(trials, dim, device=seeds.device),
        "adapter.down": down * (2.0 / dim) ** 0.5,
        "adapter.up": torch.zeros(trials, down.shape[2], dim, device=seeds.device),
    }


def frozen_end(head: Mapping[str, Tensor], trials: int) -> Tensors:
    """What the encoder does to its class token last, for an adapter in front of it; shared by T trials.

    Args:
        head: `ln_post_weight` (W,), `ln_post_bias` (W,), `projection` (W, D), and perhaps `ln_post_eps` (1,).
        trials: T.

    Returns:
        "backbone.scale" and "backbone.shift" (T, W), "backbone.eps" (T, 1), "backbone.projection" (T, W, D).
    """
    weight = head["ln_post_weight"]
    tensors = {
        "scale": weight,
        "shift": head["ln_post_bias"],
        "eps": head.get("ln_post_eps", torch.full_like(weight[:1], _LN_EPS)),
        "projection": head["projection"],
    }
    return {f"backbone.{name}": tensor.expand(trials, *tensor.shape) for name, tensor in tensors.items()}


def apply_adapter(tensors: Tensors, features: Tensor, strength: Tensor) -> Tensor:
    """f(x) = normalize(x + s W_up relu(W_down LN(x))) (after CLIP-Adapter, arXiv 2110.04544).

    With the encoder's frozen end among the tensors it is an adapter in the encoder's last block instead, see
    :func:`apply_last_block`.

    Args:
        tensors: the heads; without adapter tensors f is the identity.
        features: unit rows (T, B, D), or the last block's tokens (T, B, 2 W).
        strength: s (T,).

    Returns:
        Unit rows (T, B, D).
    """
    if "adapter.up" not in tensors:
        return features
    if "backbone.projection" in tensors:
        return apply_last_block(tensors, features, strength)
    if not torch.is_grad_enabled():
        return _apply_folded(tensors, features, strength.view(-1, 1, 1))
    return normalize(features + strength.view(-1, 1, 1) * _bottleneck(tensors, features))


def apply_last_block(tensors: Tensors, tokens: Tensor, strength: Tensor) -> Tensor:
    """AdaptFormer (arXiv 2205.13535) beside the MLP of a ViT's last block, exactly as in the encoder.

    The class token leaves the block as x + MLP(LN_2(x)) + s W_up relu(W_down LN(x)), where the first two terms are
    frozen and cached; the frozen ln_post and projection follow, and length 1.

    Args:
        tensors: the adapter's, W wide, and those of :func:`frozen_end`.
        tokens: class tokens before and after the frozen MLP, side by side (T, B, 2 W).
        strength: s (T,).

    Returns:
        Unit rows (T, B, D).
    """
    return normalize(last_norm(tensors, tokens, strength) @ tensors["backbone.projection"])


def last_norm(tensors: Tensors, tokens: Tensor, strength: Tensor) -> Tensor:
    """The class token as it leaves the encoder's last norm, before the projection.

    Args:
        tensors: those of :func:`frozen_end`, and of an adapter in the last block where there is one.
        tokens: as for :func:`apply_last_block` (T, B, 2 W).
        strength: s (T,), of the adapter.

    Returns:
        Rows of any length (T, B, W).
    """
    before, token = tokens.chunk(2, -1)  # (T, B, W) each
    if "adapter.up" in tensors:
        token = token + strength.view(-1, 1, 1) * _bottleneck(tensors, before)
    centred = token - token.mean(-1, keepdim=True)
    # not by torch's layer norm, which takes one scale and shift for all trials
    spread = torch.rsqrt(centred.square().mean(-1, keepdim=True) + tensors["backbone.eps"].unsqueeze(1))
    return centred * spread * tensors["backbone.scale"].unsqueeze(1) + tensors["backbone.shift"].unsqueeze(1)


def _bottleneck(tensors: Tensors, rows: Tensor) -> Tensor:
    """W_up relu(W_down LN(x)) of rows (T, B, D)."""
    standard = F.layer_norm(rows, rows.shape[-1:], eps=_LN_EPS)
    standard = standard * tensors["adapter.scale"].unsqueeze(1) + tensors["adapter.shift"].unsqueeze(1)
    hidden = torch.relu(standard @ tensors["adapter.down"])  # (T, B, r)
    return hidden @ tensors["adapter.up"]


def _apply_folded(tensors: Tensors, features: Tensor, strength: Tensor) -> Tensor:
    """The same with the norm folded into the product, which halves the memory traffic of evaluations.

    With m and r a row's mean and inverse deviation, a and b the norm's scale and shift:
    LN(x) W = r x (a W) - r m sum_d (a W)_d + b W.
    """
    down = tensors["adapter.down"]
    folded = tensors["adapter.scale"].unsqueeze(2) * down  # (T, D, r)
    offset = tensors["adapter.shift"].unsqueeze(1) @ down  # (T, 1, r)
    mean = features.mean(-1, keepdim=True)
    # unit rows: their mean square is 1 / D
    inverse = torch.rsqrt(1.0 / features.shape[-1] - mean.square() + _LN_EPS)  # (T, B, 1)
    centred = features @ folded - mean * folded.sum(1, keepdim=True)
    hidden = torch.relu(inverse * centred + offset)
    return normalize(torch.baddbmm(features, hidden, strength * tensors["adapter.up"]))


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
