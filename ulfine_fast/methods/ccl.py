"""The adjustments of CCL, continuous contrastive learning (NeurIPS 2024; as its code has them), without its contrasts.

Published: tau 2, threshold 0.95, unlabelled weight 1.5 or more, distributions averaged every 500 steps by 0.5.
Different here: they move at every step, by `rho`, as counts; pseudo-labels count where they are confident, instead of a
bound on the energy that fits the unbounded logits of the paper's network. Not reproduced over a cache: as for FixMatch,
and both contrastive losses, which train the encoder through a projection head and a second strong view.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.core.heads import Tensors
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import LabeledOptions, PseudoLabelOptions, RunningOptions
from ulfine_fast.methods.fixmatch import FixMatch, plain_and_balanced, plain_cross_entropy
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
        """Two heads (T, K, D), the adapter, and two distributions (T, K), as counts in a mini-batch.

        "hidden" is that of the unlabelled images and starts uniform; "all" starts as that of the labels.
        """
        state = super().start(trials)
        state.parameters["balanced"] = trials.prototypes.clone()
        prior = trials.log_prior.exp()
        uniform = torch.full_like(prior, 1.0 / prior.shape[1])
        size = trials.config.batch_unlabeled
        state.memory |= {"hidden": size * uniform, "all": size * prior}
        return state

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Both heads' losses, the balanced one's adjusted by the class prior of labels or pseudo-labels."""
        values = trials.values
        plain, balanced = plain_and_balanced(trials, state.tensors, batch.labeled)
        adjusted = adjusted_cross_entropy(balanced, batch.labels, trials.log_prior, values["tau"]).mean(-1)
        labeled = plain_cross_entropy(plain, batch.labels).mean(-1) + adjusted
        if batch.weak is None or batch.strong is None:
            return Losses.labeled_only(labeled)
        with torch.no_grad():
            weak = self.pseudo_logits(trials, state.tensors, batch.weak)
        pseudo = pseudo_labels(weak, values["threshold"], values["sharpen"])
        plain, balanced = plain_and_balanced(trials, state.tensors, batch.strong)
        prior = torch.log(_normalized(state.memory["all"]))
        losses = plain_cross_entropy(plain, pseudo.labels)
        losses = losses + adjusted_cross_entropy(balanced, pseudo.labels, prior, values["tau"])
        unlabeled = values["lambda_u"] * masked_mean(losses, pseudo.mask)
        return Losses(labeled, unlabeled, trials.zeros(), pseudo)

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Move both distributions by the batch's confident pseudo-labels."""
        if losses.pseudo is not None:
            counts = (losses.pseudo.probabilities * losses.pseudo.mask.unsqueeze(-1)).sum(1)
            for name in ("hidden", "all"):
                state.memory[name].copy_(running(state.memory[name], counts, trials.values["rho"]))

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Mean of the balanced logits and of the plain ones, adjusted to the unlabelled images (T, B, K).

        The plain head has learned the mixture of labels and pseudo-labels, whose log prior is subtracted; that of the
        unlabelled images is added, 1 + tau / 2 times.
        """
        plain, balanced = plain_and_balanced(trials, tensors, features)
        config = trials.config
        fraction = config.batch_unlabeled / (config.batch_unlabeled + config.batch_labeled)
        learned = (1 - fraction) * trials.log_prior.exp() + fraction * _normalized(tensors["all"])
        power = (1 + trials.values["tau"] / 2).view(-1, 1)
        shift = power * torch.log(_normalized(tensors["hidden"])) - torch.log(learned)
        return 0.5 * (plain + shift.unsqueeze(1)) + 0.5 * balanced

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The balanced head's logits (T, B, K)."""
        return plain_and_balanced(trials, tensors, features)[1]


def _normalized(counts: Tensor) -> Tensor:
    """Counts (T, K) over their sum, none of them 0."""
    counts = counts + _EPS
    return counts / counts.sum(-1, keepdim=True)
