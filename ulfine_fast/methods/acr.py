"""ACR, adaptive consistency regularizer (Wei and Gan, CVPR 2023, doi 10.1109/CVPR52729.2023.00338; as its code has it).

Published: tau 2 on the balanced branch, tau_u 2, threshold 0.95, rho 0.9, lambda_u 1. Different here: the strength of
the adjustment follows the estimated distribution at every step, where the code averages divergences over 500 steps and
leaves it at its largest for the first 3,000. Not reproduced over a cache: as for FixMatch, and a second strong view of
each image in a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.core.heads import Tensors
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import LabeledOptions, PseudoLabelOptions, RunningAdjustmentOptions, RunningOptions
from ulfine_fast.methods.fixmatch import FixMatch, plain_and_balanced, plain_cross_entropy
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.distributions import distance_from_labeled
from ulfine_fast.ops.losses import PseudoLabels, adjusted_cross_entropy, masked_mean, pseudo_labels
from ulfine_fast.ops.thresholds import histogram, running


@dataclass(frozen=True)
class ACROptions(RunningAdjustmentOptions, PseudoLabelOptions, RunningOptions, LabeledOptions):
    """Options of :class:`ACR`."""


@register("acr", options=ACROptions, source="ACR, doi 10.1109/CVPR52729.2023.00338")
class ACR(FixMatch):
    """A plain and a balanced head over one adapter; the plain one, adjusted towards rare classes, teaches both."""

    def start(self, trials: Trials) -> State:
        """Two heads (T, K, D) at the textual prototypes, the adapter; the estimated distribution (T, K), uniform."""
        state = super().start(trials)
        state.parameters["balanced"] = trials.prototypes.clone()
        state.memory["estimated"] = torch.full_like(trials.log_prior, 1.0 / trials.log_prior.shape[1])
        return state

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Cross-entropies of both heads, the balanced one's labelled loss adjusted."""
        values = trials.values
        plain, balanced = plain_and_balanced(trials, state.tensors, batch.labeled)
        adjusted = adjusted_cross_entropy(balanced, batch.labels, trials.log_prior, values["tau"]).mean(-1)
        labeled = plain_cross_entropy(plain, batch.labels).mean(-1) + adjusted
        if batch.weak is None or batch.strong is None:
            return Losses.labeled_only(labeled)
        with torch.no_grad():
            for_plain, for_balanced, by_balanced = self.targets(trials, state, batch.weak)
        plain, balanced = plain_and_balanced(trials, state.tensors, batch.strong)
        unlabeled = masked_mean(plain_cross_entropy(plain, for_plain.labels), for_plain.mask)
        unlabeled = unlabeled + masked_mean(plain_cross_entropy(balanced, for_balanced.labels), for_balanced.mask)
        return Losses(labeled, values["lambda_u"] * unlabeled, trials.zeros(), by_balanced)

    def targets(self, trials: Trials, state: State, weak: Tensor) -> tuple[PseudoLabels, PseudoLabels, PseudoLabels]:
        """Pseudo-labels for the plain head, for the balanced one, and those of the balanced head itself.

        The class is always that of the adjusted plain logits. An image trains a head if they are confident, or the
        head itself is.
        """
        threshold, sharpen = trials.values["threshold"], trials.values["sharpen"]
        plain, balanced = plain_and_balanced(trials, state.tensors, weak)
        by_plain = pseudo_labels(plain, threshold, sharpen)
        by_balanced = pseudo_labels(balanced, threshold, sharpen)
        for_plain = pseudo_labels(_adjusted(plain, trials, self.strength(trials, state)), threshold, sharpen)
        for_balanced = pseudo_labels(_adjusted(plain, trials, trials.values["tau_u"]), threshold, sharpen)
        for_plain = for_plain._replace(mask=torch.maximum(for_plain.mask, by_plain.mask))
        for_balanced = for_balanced._replace(mask=torch.maximum(for_balanced.mask, by_balanced.mask))
        return for_plain, for_balanced, by_balanced

    def strength(self, trials: Trials, state: State) -> Tensor:
        """Tau of the plain head (T,): weaker where the unlabelled classes are distributed as the labelled ones."""
        return trials.values["tau_u"] * distance_from_labeled(state.memory["estimated"], trials.log_prior.exp())

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Move the estimated distribution by the balanced head's confident pseudo-labels; without any it stays."""
        if losses.pseudo is None:
            return
        old = state.memory["estimated"]
        counts = histogram(losses.pseudo.labels, losses.pseudo.mask, old.shape[1])
        total = counts.sum(-1, keepdim=True)
        moved = running(old, counts / total.clamp(min=1), trials.values["rho"])
        old.copy_(torch.where(total > 0, moved, old))

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The adjusted plain logits (T, B, K) that teach the head that predicts."""
        plain, _ = plain_and_balanced(trials, tensors, features)
        return _adjusted(plain, trials, trials.values["tau_u"])

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The balanced head's logits (T, B, K)."""
        return plain_and_balanced(trials, tensors, features)[1]


def _adjusted(logits: Tensor, trials: Trials, tau: Tensor) -> Tensor:
    """Logits (T, B, K) less tau log pi."""
    return logits - (tau.view(-1, 1) * trials.log_prior).unsqueeze(1)
