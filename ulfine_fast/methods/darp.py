"""DARP (arXiv 2007.08844): the guesses of all unlabelled images, refined to a given class distribution.

Published: refinement after 40% of the training, every 10 steps, twice a class's total kept, threshold 0.95; the
distribution is that of the labels, or one estimated beforehand. Ours: the distribution of the labels; all images are
guessed from their plain view and refined after every `eval_every` steps, where the code mixes guesses of different age;
labelled losses are adjusted by tau, 0 in the paper. Lost to the cache: what FixMatch loses.
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
    """FixMatch whose guesses come, after a while, from a table of refined ones."""

    adjusted = True
    uses_pool = True

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Guess all images (T, N, K), and refine them in trials that have come far enough."""
        logits = self.logits(trials, state.tensors, pool.unlabeled)
        raw = torch.softmax(logits / trials.values["sharpen"].view(-1, 1, 1), -1)
        totals = trials.log_prior.exp() * pool.present.sum(-1, keepdim=True)  # (T, K)
        refined = refine(prune(raw, pool.present, totals, trials.values["darp_keep"]), pool.present, totals)
        late = step >= trials.values["darp_start"] * trials.config.steps
        state.scratch = {"late": late, "table": torch.where(late.view(-1, 1, 1), refined, raw)}

    def guess(self, trials: Trials, state: State, batch: Batch) -> PseudoLabels:
        """FixMatch's guesses at first, later those of the table."""
        assert batch.positions is not None
        pseudo = super().guess(trials, state, batch)
        late, table = state.scratch["late"].view(-1, 1), state.scratch["table"]
        places = batch.positions.unsqueeze(-1).expand(-1, -1, table.shape[-1])
        chosen = torch.where(late.unsqueeze(-1), table.gather(1, places), pseudo.probabilities)  # (T, U, K)
        confidence, labels = chosen.max(-1)
        sure = confidence >= trials.values["threshold"].view(-1, 1)
        return PseudoLabels(labels, sure.to(chosen.dtype), chosen)

    def drawn(self, trials: Trials, state: State) -> Tensor | None:
        """The table (T, N, K)."""
        return state.scratch["table"]
