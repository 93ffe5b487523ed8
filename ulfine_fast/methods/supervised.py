"""Losses for long-tailed labels, on the head of `linear_probe`: labelled images alone, no adapter.

`linear_probe` itself is the logit-adjusted member of the family. Nothing is lost to the cache but fresh crops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ulfine_fast.core.fused.step import FusedStep, UnadjustedStep
from ulfine_fast.core.types import Batch, Losses, Pool, State, Trials
from ulfine_fast.methods.linear_probe import LinearProbe
from ulfine_fast.ops.losses import adjusted_cross_entropy
from ulfine_fast.ops.margins import class_counts, effective_weights, ldam_margins, with_margin


class CrossEntropy(LinearProbe):
    """Plain cross-entropy, whatever the class frequencies; `tau` is not read."""

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Mean of the rows' losses by their weights, as PyTorch weighs classes (T,)."""
        logits = self.logits(trials, state.tensors, batch.labeled)  # (T, B, K)
        weights = self.weights(trials, state).gather(1, batch.labels)  # (T, B)
        rows = self.row_losses(trials, state, logits, batch.labels)
        # dividing by the weights, not by the rows, keeps the learning rate's meaning
        loss = (weights * rows).sum(-1) / weights.sum(-1)
        return Losses(loss, torch.zeros_like(loss), torch.zeros_like(loss))

    def fused(self, trials: Trials, state: State) -> type[FusedStep] | None:
        """One head, by hand."""
        return UnadjustedStep if type(self) is CrossEntropy else None

    def row_losses(self, trials: Trials, state: State, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses (T, B) of logits (T, B, K)."""
        return adjusted_cross_entropy(logits, labels, trials.log_prior, torch.zeros_like(trials.values["tau"]))

    def weights(self, trials: Trials, state: State) -> Tensor:
        """Weights of the classes (T, K)."""
        return torch.ones_like(trials.log_prior)


class BalancedSoftmax(CrossEntropy):
    """Softmax over n_k exp(z_k) (arXiv 2007.10740, theorem 1): logit adjustment at tau = 1 whatever `tau` says."""

    def row_losses(self, trials: Trials, state: State, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses (T, B) of logits (T, B, K)."""
        return adjusted_cross_entropy(logits, labels, trials.log_prior, torch.ones_like(trials.values["tau"]))


class ClassBalanced(CrossEntropy):
    """Cross-entropy weighted by effective numbers (arXiv 1901.05555, section 4)."""

    uses_pool = True

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Count the labelled images of each class (T, K)."""
        state.scratch["counts"] = class_counts(pool.labels, trials.log_prior.shape[1])

    def weights(self, trials: Trials, state: State) -> Tensor:
        """Inverse effective numbers of the classes (T, K)."""
        return effective_weights(state.scratch["counts"], trials.values["effective_beta"])


class LDAM(ClassBalanced):
    """Label-distribution-aware margins, re-weighted late: LDAM-DRW (arXiv 1906.07413, algorithm 1)."""

    def start(self, trials: Trials) -> State:
        """The head of the linear probe, and a count of steps (T,)."""
        state = super().start(trials)
        state.scratch["steps"] = torch.zeros_like(trials.values["tau"])
        return state

    def row_losses(self, trials: Trials, state: State, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy (T, B) after taking sigma Delta_k from the label's logit."""
        margins = ldam_margins(state.scratch["counts"], trials.values["largest_margin"])
        scaled = trials.values["scale"].unsqueeze(-1) * margins
        return super().row_losses(trials, state, with_margin(logits, labels, scaled), labels)

    def weights(self, trials: Trials, state: State) -> Tensor:
        """All alike for the first `defer` of the steps, by effective number afterwards (T, K)."""
        late = state.scratch["steps"] >= trials.values["defer"] * trials.config.steps
        weights = super().weights(trials, state)
        return torch.where(late.unsqueeze(-1), weights, torch.ones_like(weights))

    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Count the step."""
        state.scratch["steps"] += 1
