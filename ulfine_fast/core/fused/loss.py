"""Cross-entropy and its gradient by the logits, without autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ulfine_fast.ops import kernels
from ulfine_fast.ops.softmax import softmax


def cross_entropy_gradient_(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Turn logits into the gradient of the weighted cross-entropies of all heads, in place.

    The specification is :func:`ulfine_fast.ops.losses.adjusted_cross_entropy` under autograd.

    Args:
        logits: adjusted already, z + tau log pi (T, n, H, K), H heads; becomes w (softmax(logits) - onehot(y)).
        labels: int64 (T, n), the same for all heads.
        weights: of each row, such as mask / n (T, n).

    Returns:
        log softmax(logits)_y of each row and head (T, n, H).
    """
    if kernels.usable(logits):
        return kernels.cross_entropy_gradient_(logits, labels, weights)
    logits.copy_(softmax(logits))
    chosen = labels.view(*labels.shape, 1, 1).expand(-1, -1, logits.shape[2], 1)  # (T, n, H, 1)
    picked = logits.gather(-1, chosen)
    logits.scatter_(-1, chosen, picked - 1.0)
    logits.mul_(weights.view(*weights.shape, 1, 1))
    # a probability that underflows would make the reported loss infinite; the gradient does not read its logarithm
    return picked.clamp_(min=torch.finfo(logits.dtype).tiny).log_().squeeze(-1)
