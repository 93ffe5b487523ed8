"""The adjustments of CCL, continuous contrastive learning (NeurIPS 2024; as its code has them), without its contrasts.

Published: tau 2, threshold 0.95, unlabelled weight 1.5 or more, distributions averaged every 500 steps by 0.5. Ours:
they move at every step, by `rho`, as counts; guesses count where they are sure, in place of a bound on the energy that
fits the unbounded logits of the paper's network. Lost to the cache: what FixMatch loses, and both contrastive losses,
which train the encoder through a projection head and a second strong view.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.core.heads import Tensors, apply_adapter, cosine_logits
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import LabeledOptions, PseudoLabelOptions, RunningOptions
from ulfine_fast.methods.fixmatch import FixMatch, plain_cross_entropy
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.losses import adjusted_cross_entropy, masked_mean, pseudo_labels
from ulfine_fast.ops.thresholds import running

_EPS = 1e-8


@dataclass(frozen=True)
class CCLOptions(PseudoLabelOptions, RunningOptions, LabeledOptions):
    """Options of :class:`CCL`."""


@register("ccl", options=CCLOptions, source="NeurIPS 2024")
class CCL(FixMatch):
    """A plain and a balanced head whose adjusted logits are averaged to teach both; the balanced one predicts."""

    def start(self, trials: Trials) -> State:
        """Two heads (T, K, D), the adapter, and two distributions (T, K): `hidden` uniform, `all` as in the labels."""
        state = super().start(trials)
        state.parameters["balanced"] = trials.prototypes.clone()
        prior = trials.log_prior.exp()
        even = torch.full_like(prior, 1.0 / prior.shape[1])
        size = trials.config.batch_unlabeled
        state.memory |= {"hidden": size * even, "all": size * prior}
        return state

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Both heads' losses; the balanced one is adjusted by the labelled prior, and by that of the guesses."""
        values = trials.values
        plain, balanced = _both(trials, state.tensors, batch.labeled)
        adjusted = adjusted_cross_entropy(balanced, batch.labels, trials.log_prior, values["tau"]).mean(-1)
        labeled = plain_cross_entropy(plain, batch.labels).mean(-1) + adjusted
        if batch.weak is None or batch.strong is None:
            return Losses(labeled, torch.zeros_like(labeled), torch.zeros_like(labeled))
        with torch.no_grad():
            weak = self.pseudo_logits(trials, state.tensors, batch.weak)
        pseudo = pseudo_labels(weak, values["threshold"], values["sharpen"])
        plain, balanced = _both(trials, state.tensors, batch.strong)
        prior = torch.log(_shares(state.memory["all"]))
        losses = plain_cross_entropy(plain, pseudo.labels)
        losses = losses + adjusted_cross_entropy(balanced, pseudo.labels, prior, values["tau"])
        unlabeled = values["lambda_u"] * masked_mean(losses, pseudo.mask)
        return Losses(labeled, unlabeled, torch.zeros_like(labeled), pseudo)

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Move both distributions by the batch's sure guesses."""
        if losses.pseudo is not None:
            counts = (losses.pseudo.probabilities * losses.pseudo.mask.unsqueeze(-1)).sum(1)
            for name in ("hidden", "all"):
                state.memory[name].copy_(running(state.memory[name], counts, trials.values["rho"]))

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Mean of the balanced logits and of the plain ones, made those of the unlabelled images (T, B, K).

        The plain head has learned the mixture of labels and guesses, whose log prior is taken off; that of the
        unlabelled images is added, 1 + tau / 2 times.
        """
        plain, balanced = _both(trials, tensors, features)
        config = trials.config
        part = config.batch_unlabeled / (config.batch_unlabeled + config.batch_labeled)
        learned = (1 - part) * trials.log_prior.exp() + part * _shares(tensors["all"])
        power = (1 + trials.values["tau"] / 2).view(-1, 1)
        shift = power * torch.log(_shares(tensors["hidden"])) - torch.log(learned)
        return 0.5 * (plain + shift.unsqueeze(1)) + 0.5 * balanced

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The balanced head's logits (T, B, K)."""
        return _both(trials, tensors, features)[1]


def _both(trials: Trials, tensors: Tensors, features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, B, K) of the plain and the balanced head."""
    adapted = apply_adapter(tensors, features, trials.values["adapter_scale"])
    scale = trials.values["scale"]
    return cosine_logits(adapted, tensors["linear"], scale), cosine_logits(adapted, tensors["balanced"], scale)


def _shares(counts: Tensor) -> Tensor:
    """Counts (T, K) over their sum, none of them 0."""
    counts = counts + _EPS
    return counts / counts.sum(-1, keepdim=True)
