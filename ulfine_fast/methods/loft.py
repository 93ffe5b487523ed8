"""LoFT: hard pseudo-labels where the model is confident, soft ones elsewhere (arXiv 2509.09926, as its code has it).

Published: threshold 0.6, lambda_u 3, 10,000 steps of 16 + 112. Not reproduced over a cache: AdaptFormer inside the
blocks (one adapter behind the encoder replaces it). The filter of open-world data (LoFT-OW) is not part of this.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import LabeledOptions, PseudoLabelOptions
from ulfine_fast.methods.lightweight import Lightweight
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.losses import PseudoLabels, adjusted_cross_entropy, pseudo_labels


@dataclass(frozen=True)
class LoFTOptions(PseudoLabelOptions, LabeledOptions):
    """Options of :class:`LoFT`."""


@register("loft", options=LoFTOptions, source="LoFT, arXiv 2509.09926")
class LoFT(Lightweight):
    """The adapter and head of `lightweight`; every unlabelled image trains."""

    uses_threshold = False

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """CE(z + tau log pi, y) + lambda_u CE(z(strong), hard or soft label of z(weak))."""
        # without unlabelled views the parent's loss is the labelled one alone
        labeled = super().losses(trials, state, replace(batch, weak=None, strong=None)).labeled
        if batch.weak is None or batch.strong is None:
            return Losses.labeled_only(labeled)
        with torch.no_grad():
            weak = self.logits(trials, state.tensors, batch.weak)
        pseudo = pseudo_labels(weak, trials.values["threshold"], trials.values["sharpen"])
        strong = self.logits(trials, state.tensors, batch.strong)  # (T, U, K)
        unlabeled = trials.values["lambda_u"] * _mixed(trials, strong, pseudo).mean(-1)
        return Losses(labeled, unlabeled, trials.zeros(), pseudo)


def _mixed(trials: Trials, strong: Tensor, pseudo: PseudoLabels) -> Tensor:
    """Cross-entropy (T, U) to the most probable class over the threshold, to all probabilities under it."""
    hard = adjusted_cross_entropy(strong, pseudo.labels, trials.log_prior, trials.zeros())
    soft = -(pseudo.probabilities * torch.log_softmax(strong, -1)).sum(-1)
    return torch.where(pseudo.mask > 0, hard, soft)
