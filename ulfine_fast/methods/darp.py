"""DARP (arXiv 2007.08844): the pseudo-labels of all unlabelled images, refined to a class distribution.

Published: refinement after 40% of the training, every 10 steps, twice a class's total kept, threshold 0.95; the
distribution is that of the labels, or one estimated beforehand. Different here: the distribution of the labels; all
images are predicted from their plain view and refined after every `eval_every` steps, where the code mixes predictions
of different age; labelled losses are adjusted by tau, 0 in the paper. Not reproduced over a cache: as for FixMatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.config import option
from ulfine_fast.core.types import Batch, Pool, State, Trials
from ulfine_fast.methods.base import LabeledOptions, PseudoLabelOptions
from ulfine_fast.methods.fixmatch import FixMatch
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.losses import PseudoLabels
from ulfine_fast.ops.refinement import prune, refine


@dataclass(frozen=True)
class DARPOptions(PseudoLabelOptions, LabeledOptions):
    """Options of :class:`DARP`."""

    darp_start: float = option(0.4, "fraction of the steps after which pseudo-labels are refined", low=0.0, high=1.0)
    darp_keep: float = option(2.0, "most pseudo-labels kept for a class, as a multiple of its wanted total", low=0.01)


@register("darp", options=DARPOptions, source="DARP, arXiv 2007.08844")
class DARP(FixMatch):
    """FixMatch whose pseudo-labels come, after some steps, from refined probabilities of all unlabelled images."""

    adjusted = True
    uses_pool = True

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Predict all unlabelled images (T, N, K); refine the predictions of trials that have come far enough."""
        logits = self.logits(trials, state.tensors, pool.unlabeled)
        predicted = torch.softmax(logits / trials.values["sharpen"].view(-1, 1, 1), -1)
        totals = trials.log_prior.exp() * pool.present.sum(-1, keepdim=True)  # (T, K)
        refined = refine(prune(predicted, pool.present, totals, trials.values["darp_keep"]), pool.present, totals)
        late = step >= trials.values["darp_start"] * trials.config.steps
        state.scratch = {"late": late, "probabilities": torch.where(late.view(-1, 1, 1), refined, predicted)}

    def pseudo_labels(self, trials: Trials, state: State, batch: Batch) -> PseudoLabels:
        """FixMatch's pseudo-labels at first, later the refined ones."""
        assert batch.positions is not None
        early = super().pseudo_labels(trials, state, batch)
        refined = state.scratch["probabilities"]
        index = batch.positions.unsqueeze(-1).expand(-1, -1, refined.shape[-1])
        late = state.scratch["late"].view(-1, 1, 1)
        chosen = torch.where(late, refined.gather(1, index), early.probabilities)  # (T, U, K)
        confidence, labels = chosen.max(-1)
        mask = confidence >= trials.values["threshold"].view(-1, 1)
        return PseudoLabels(labels, mask.to(chosen.dtype), chosen)

    def pool_probabilities(self, trials: Trials, state: State) -> Tensor | None:
        """The probabilities of the last refresh (T, N, K)."""
        return state.scratch["probabilities"]
