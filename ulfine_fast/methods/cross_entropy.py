"""Plain cross-entropy on the head of `linear_probe`: labelled images alone, no adapter.

Other losses for long-tailed labels inherit it; `linear_probe` is the logit-adjusted one. Not reproduced over a cache:
fresh crops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ulfine_fast.core.fused.step import FusedStep, UnadjustedStep
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.linear_probe import LinearProbe
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.losses import adjusted_cross_entropy


@register("cross_entropy", source="softmax cross-entropy")
class CrossEntropy(LinearProbe):
    """Plain cross-entropy, whatever the class frequencies."""

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Mean of the rows' losses by their weights, as PyTorch weighs classes (T,)."""
        logits = self.logits(trials, state.tensors, batch.labeled)  # (T, B, K)
        weights = self.weights(trials, state).gather(1, batch.labels)  # (T, B)
        rows = self.row_losses(trials, state, logits, batch.labels)
        # dividing by the weights, not by the rows, keeps the learning rate's meaning
        loss = (weights * rows).sum(-1) / weights.sum(-1)
        return Losses.labeled_only(loss)

    def fused(self, trials: Trials, state: State) -> type[FusedStep] | None:
        """One head, without adjustment."""
        return UnadjustedStep if type(self) is CrossEntropy else None

    def row_losses(self, trials: Trials, state: State, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses (T, B) of logits (T, B, K)."""
        return adjusted_cross_entropy(logits, labels, trials.log_prior, trials.zeros())

    def weights(self, trials: Trials, state: State) -> Tensor:
        """Weights of the classes (T, K)."""
        return torch.ones_like(trials.log_prior)
