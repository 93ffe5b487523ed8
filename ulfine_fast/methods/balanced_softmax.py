"""Balanced softmax (arXiv 2007.10740): logit adjustment of strength 1, on the head of `linear_probe`."""

from __future__ import annotations

from torch import Tensor

from ulfine_fast.core.types import State, Trials
from ulfine_fast.methods.cross_entropy import CrossEntropy
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.losses import adjusted_cross_entropy


@register("balanced_softmax", source="arXiv 2007.10740")
class BalancedSoftmax(CrossEntropy):
    """Softmax over n_k exp(z_k) (arXiv 2007.10740, theorem 1): logit adjustment at tau = 1."""

    def row_losses(self, trials: Trials, state: State, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses (T, B) of logits (T, B, K)."""
        return adjusted_cross_entropy(logits, labels, trials.log_prior, trials.zeros() + 1)
