"""ACR, adaptive consistency regularizer (Wei and Gan, CVPR 2023, doi 10.1109/CVPR52729.2023.00338; as its code has it).

Published: tau 2 on the balanced branch, tau_u 2, threshold 0.95, rho 0.9, lambda_u 1. Ours: the strength of the
adjustment follows the estimated distribution at every step, where the code averages divergences over 500 steps and
leaves it at its largest for the first 3,000. Lost to the cache: what FixMatch loses, and a second strong view of each
image in a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.config import option
from ulfine_fast.core.heads import Tensors, apply_adapter, cosine_logits
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import LabeledOptions, PseudoLabelOptions, RunningOptions
from ulfine_fast.methods.fixmatch import FixMatch, plain_cross_entropy
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.distributions import distance_from_labeled
from ulfine_fast.ops.losses import PseudoLabels, adjusted_cross_entropy, masked_mean, pseudo_labels
from ulfine_fast.ops.thresholds import histogram, running


@dataclass(frozen=True)
class ACROptions(PseudoLabelOptions, RunningOptions, LabeledOptions):
    """Options of :class:`ACR`."""

    tau_u: float = option(
        2.0,
        "strength of the adjustment by the running pseudo-label distribution P",
        low=0.0,
        search={"low": 0.0, "high": 2.5},
    )


@register("acr", options=ACROptions, source="ACR, doi 10.1109/CVPR52729.2023.00338")
class ACR(FixMatch):
    """A plain and a balanced branch over one adapter; the plain one, made fairer, teaches both."""

    def start(self, trials: Trials) -> State:
        """Two heads (T, K, D) at the textual prototypes, the adapter; the estimated distribution (T, K), uniform."""
        state = super().start(trials)
        state.parameters["balanced"] = trials.prototypes.clone()
        state.memory["estimated"] = torch.full_like(trials.log_prior, 1.0 / trials.log_prior.shape[1])
        return state

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Cross-entropies of both branches, the balanced one's labelled loss adjusted."""
        values = trials.values
        plain, balanced = _both(trials, state.tensors, batch.labeled)
        adjusted = adjusted_cross_entropy(balanced, batch.labels, trials.log_prior, values["tau"]).mean(-1)
        labeled = plain_cross_entropy(plain, batch.labels).mean(-1) + adjusted
        if batch.weak is None or batch.strong is None:
            return Losses(labeled, torch.zeros_like(labeled), torch.zeros_like(labeled))
        with torch.no_grad():
            to_plain, to_balanced, own = self.targets(trials, state, batch.weak)
        plain, balanced = _both(trials, state.tensors, batch.strong)
        unlabeled = masked_mean(plain_cross_entropy(plain, to_plain.labels), to_plain.mask)
        unlabeled = unlabeled + masked_mean(plain_cross_entropy(balanced, to_balanced.labels), to_balanced.mask)
        return Losses(labeled, values["lambda_u"] * unlabeled, torch.zeros_like(labeled), own)

    def targets(self, trials: Trials, state: State, weak: Tensor) -> tuple[PseudoLabels, PseudoLabels, PseudoLabels]:
        """What is taught to the plain branch, to the balanced one, and what the balanced one would guess itself.

        An image trains a branch if the fairer logits are sure of it, or the branch itself is; it always trains the
        fairer logits' class.
        """
        threshold, sharpen = trials.values["threshold"], trials.values["sharpen"]
        plain, balanced = _both(trials, state.tensors, weak)
        strengths = self.strength(trials, state), trials.values["tau_u"]
        fairer = [pseudo_labels(_lessened(plain, trials, tau), threshold, sharpen) for tau in strengths]
        own = [pseudo_labels(logits, threshold, sharpen) for logits in (plain, balanced)]
        either = [f._replace(mask=torch.maximum(f.mask, o.mask)) for f, o in zip(fairer, own, strict=True)]
        return either[0], either[1], own[1]

    def strength(self, trials: Trials, state: State) -> Tensor:
        """Tau of the plain branch (T,): weaker where the unlabelled classes are distributed as the labelled ones."""
        return trials.values["tau_u"] * distance_from_labeled(state.memory["estimated"], trials.log_prior.exp())

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Move the estimated distribution by the balanced branch's sure guesses; it rests where there are none."""
        if losses.pseudo is None:
            return
        old = state.memory["estimated"]
        counts = histogram(losses.pseudo.labels, losses.pseudo.mask, old.shape[1])
        total = counts.sum(-1, keepdim=True)
        moved = running(old, counts / total.clamp(min=1), trials.values["rho"])
        old.copy_(torch.where(total > 0, moved, old))

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The fairer logits (T, B, K) that teach the branch that predicts."""
        return _lessened(_both(trials, tensors, features)[0], trials, trials.values["tau_u"])

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The balanced branch's logits (T, B, K)."""
        return _both(trials, tensors, features)[1]


def _both(trials: Trials, tensors: Tensors, features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, B, K) of the plain and the balanced branch."""
    adapted = apply_adapter(tensors, features, trials.values["adapter_scale"])
    scale = trials.values["scale"]
    return cosine_logits(adapted, tensors["linear"], scale), cosine_logits(adapted, tensors["balanced"], scale)


def _lessened(logits: Tensor, trials: Trials, tau: Tensor) -> Tensor:
    """Logits (T, B, K) less tau log pi."""
    return logits - (tau.view(-1, 1) * trials.log_prior).unsqueeze(1)
