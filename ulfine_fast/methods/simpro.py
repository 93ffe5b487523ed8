"""SimPro (arXiv 2402.13505; as its code has it): expectation maximisation over classes and their distribution.

Published: tau 1, threshold 0.95, momentum 0.9 between epochs of 500 steps, lambda_u 1. Different here: the
distributions move at every step, by `rho`, and by counts, so that steps with few confident images move them little. Not
reproduced over a cache: as for FixMatch, the strong view of labelled images, and a second one of unlabelled images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.core.heads import Tensors
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import LabeledOptions, PseudoLabelOptions, RunningOptions
from ulfine_fast.methods.fixmatch import FixMatch, soft_cross_entropy
from ulfine_fast.methods.lightweight import Lightweight
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.losses import adjusted_cross_entropy, masked_mean, pseudo_labels
from ulfine_fast.ops.thresholds import histogram, running

_EPS = 1e-8


@dataclass(frozen=True)
class SimProOptions(PseudoLabelOptions, RunningOptions, LabeledOptions):
    """Options of :class:`SimPro`."""


@register("simpro", options=SimProOptions, source="SimPro, arXiv 2402.13505")
class SimPro(FixMatch):
    """A head without a class prior: that of all images is added in training, the unlabelled one for pseudo-labels."""

    def start(self, trials: Trials) -> State:
        """Adapter and head; class counts (T, K) of a step: "hidden" of unlabelled images, uniform; "all" as labels."""
        state = super().start(trials)
        config = trials.config
        uniform = torch.full_like(trials.log_prior, 1.0 / trials.log_prior.shape[1])
        state.memory |= {
            "hidden": config.batch_unlabeled * uniform,
            "all": config.batch_labeled * trials.log_prior.exp(),
        }
        return state

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """CE(z + tau log phi, y) + lambda_u CE(z(strong) + tau log phi, soft pseudo-labels), phi of all images."""
        values, prior = trials.values, _log_normalized(state.memory["all"])
        plain = self.linear_logits(trials, state, batch.labeled)
        labeled = adjusted_cross_entropy(plain, batch.labels, prior, values["tau"]).mean(-1)
        if batch.weak is None or batch.strong is None:
            return Losses.labeled_only(labeled)
        with torch.no_grad():
            weak = self.pseudo_logits(trials, state.tensors, batch.weak)
        pseudo = pseudo_labels(weak, values["threshold"], values["sharpen"])
        strong = self.linear_logits(trials, state, batch.strong) + _shift(prior, values["tau"])  # (T, U, K)
        unlabeled = masked_mean(soft_cross_entropy(strong, pseudo.probabilities), pseudo.mask)
        return Losses(labeled, values["lambda_u"] * unlabeled, trials.zeros(), pseudo)

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Move both distributions by the batch's confident pseudo-labels and its labels."""
        if losses.pseudo is None:
            return
        hidden = (losses.pseudo.probabilities * losses.pseudo.mask.unsqueeze(-1)).sum(1)  # (T, K)
        ones = torch.ones_like(batch.labels, dtype=hidden.dtype)
        labeled = histogram(batch.labels, ones, hidden.shape[1])
        for name, counts in (("hidden", hidden), ("all", hidden + labeled)):
            state.memory[name].copy_(running(state.memory[name], counts, trials.values["rho"]))

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Logits (T, B, K) plus tau log of the unlabelled images' distribution."""
        return self.logits(trials, tensors, features) + _shift(_log_normalized(tensors["hidden"]), trials.values["tau"])

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The head's own logits (T, B, K), those of balanced classes."""
        return Lightweight.logits(self, trials, tensors, features)


def _log_normalized(counts: Tensor) -> Tensor:
    """Log of counts (T, K) over their sum; uniform where all counts have faded to zero."""
    counts = counts + _EPS
    return torch.log(counts / counts.sum(-1, keepdim=True))


def _shift(log_prior: Tensor, tau: Tensor) -> Tensor:
    """Tau times the log prior, for logits (T, 1, K)."""
    return (tau.view(-1, 1) * log_prior).unsqueeze(1)
