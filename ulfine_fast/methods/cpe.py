"""CPE, complementary experts (arXiv 2312.15702; as its code has it).

Published: logit adjustments of strength 0, 2 and 4 (here 0, tau and 2 tau), threshold 0.95, lambda_u 1. Different
here: classes are split into thirds, where the code splits after given ranks. Not reproduced over a cache: as for
FixMatch, and normalisation by groups of classes inside the encoder; of that the weights stay, by which pseudo-labels of
rarer classes count two or three times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.core.heads import Tensors, apply_adapter, cosine_logits
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import LabeledOptions, PseudoLabelOptions
from ulfine_fast.methods.fixmatch import FixMatch, plain_cross_entropy
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.distributions import rank_thirds
from ulfine_fast.ops.losses import adjusted_cross_entropy, pseudo_labels

_EXPERTS = {"linear": 0.0, "balanced": 1.0, "inverse": 2.0}


@dataclass(frozen=True)
class CPEOptions(PseudoLabelOptions, LabeledOptions):
    """Options of :class:`CPE`."""


@register("cpe", options=CPEOptions, source="arXiv 2312.15702")
class CPE(FixMatch):
    """Three heads over one adapter, one for each kind of unlabelled distribution, each its own teacher."""

    def start(self, trials: Trials) -> State:
        """Three heads (T, K, D) at the textual prototypes, and the adapter."""
        state = super().start(trials)
        for name in _EXPERTS:
            state.parameters[name] = trials.prototypes.clone()
        return state

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """The sum of the experts' losses; the second one's pseudo-labels are reported."""
        experts = {name: self.expert(trials, state, batch, name) for name in _EXPERTS}
        labeled = torch.stack([losses.labeled for losses in experts.values()]).sum(0)
        unlabeled = torch.stack([losses.unlabeled for losses in experts.values()]).sum(0)
        return Losses(labeled, unlabeled, trials.zeros(), experts["balanced"].pseudo)

    def expert(self, trials: Trials, state: State, batch: Batch, name: str) -> Losses:
        """FixMatch's losses of one head, adjusted by its multiple of tau, pseudo-labels weighted by their class."""
        values, tensors = trials.values, state.tensors
        logits = _logits(trials, tensors, batch.labeled, name)
        tau = values["tau"] * _EXPERTS[name]
        labeled = adjusted_cross_entropy(logits, batch.labels, trials.log_prior, tau).mean(-1)
        if batch.weak is None or batch.strong is None:
            return Losses.labeled_only(labeled)
        with torch.no_grad():
            weak = _logits(trials, tensors, batch.weak, name)
        pseudo = pseudo_labels(weak, values["threshold"], values["sharpen"])
        weights = pseudo.mask * (1 + rank_thirds(trials.log_prior).gather(1, pseudo.labels))
        losses = plain_cross_entropy(_logits(trials, tensors, batch.strong, name), pseudo.labels)
        # a mean over what trains, as published, and not over the batch
        unlabeled = (losses * weights).sum(-1) / weights.sum(-1).clamp(min=1)
        return Losses(labeled, values["lambda_u"] * unlabeled, trials.zeros(), pseudo)

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The second expert's logits (T, B, K), those of balanced classes."""
        return _logits(trials, tensors, features, "balanced")


def _logits(trials: Trials, tensors: Tensors, features: Tensor, name: str) -> Tensor:
    """One expert's logits (T, B, K)."""
    adapted = apply_adapter(tensors, features, trials.values["adapter_scale"])
    return cosine_logits(adapted, tensors[name], trials.values["scale"])
