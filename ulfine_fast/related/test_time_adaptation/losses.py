"""Losses of test-time adaptation: CLIPTTA (arXiv 2507.14312) and its released code, TENT (arXiv 2006.10726)."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-12
_SOFTNESS = 0.005
"""gamma of the weights w_i in the outlier contrastive exposure, in units of the score (released code)."""


def soft_contrast(logits: Tensor) -> Tensor:
    """Soft contrastive loss of CLIPTTA: the mean entropy of the matches between images and predicted texts.

    With z_ij the logit of image i for the class that image j is predicted as, it is the mean entropy of softmax
    over j (image to texts) and over i (text to images), halved and added. The released code computes the first of
    them twice where the text tower is frozen.

    Args:
        logits: of B images (B, K), at the loss's temperature.

    Returns:
        A number in [0, log B].
    """
    contrast = logits[:, logits.argmax(1)]  # (B, B)
    return (entropy(contrast) + entropy(contrast.T)) / 2


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of softmax over the last axis of (B, n): TENT's loss where n are classes."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean of softmax over a batch (B, K), in [0, log K]."""
    mean = logits.softmax(-1).mean(0)
    return -(mean * (mean + _EPS).log()).sum()


def known_score(cosines: Tensor) -> Tensor:
    """Largest log softmax of cosines at temperature one, (B, K) to (B,); high for images of known classes."""
    return cosines.log_softmax(-1).amax(-1)


def exposure_loss(scores: Tensor, threshold: Tensor) -> Tensor:
    """Outlier contrastive exposure, -(mu_in - mu_out)^2: it moves the two sides of a threshold apart.

    Args:
        scores: (B,).
        threshold: alpha, ().

    Returns:
        A number <= 0; mu_in and mu_out are means of the scores weighted by w_i = sigmoid((s_i - alpha) / 0.005) and
        1 - w_i.
    """
    distance = (scores - threshold) / _SOFTNESS
    inside, outside = distance.sigmoid(), (-distance).sigmoid()
    gap = inside @ scores / (inside.sum() + _EPS) - outside @ scores / (outside.sum() + _EPS)
    return -gap.square()


def otsu(scores: Tensor) -> Tensor:
    """The threshold () between scores (B,) with the largest variance between its two sides (Otsu, 1979)."""
    ordered = scores.sort().values
    if len(ordered) == 1:
        return ordered[0]
    below = torch.arange(1, len(ordered), dtype=ordered.dtype)  # (B - 1,)
    above = len(ordered) - below
    sums = ordered.cumsum(0)
    gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    best = (below * above * gap.square()).argmax()
    return (ordered[best] + ordered[best + 1]) / 2
