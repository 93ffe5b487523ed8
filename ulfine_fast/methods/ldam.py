"""LDAM-DRW (arXiv 1906.07413): label-distribution-aware margins, and class weights late in training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.config import option
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.class_balanced import ClassBalanced, ClassBalancedOptions
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.margins import ldam_margins, with_margin


@dataclass(frozen=True)
class LDAMOptions(ClassBalancedOptions):
    """Options of :class:`LDAM`."""

    largest_margin: float = option(0.5, "margin of the rarest class, in cosines", low=0.0, high=2.0)
    reweight_after: float = option(
        0.8, "fraction of the steps before classes are weighted", low=0.0, high=1.0, was=("defer",)
    )


@register("ldam", options=LDAMOptions, source="LDAM-DRW, arXiv 1906.07413")
class LDAM(ClassBalanced):
    """Label-distribution-aware margins, re-weighted late: LDAM-DRW (arXiv 1906.07413, algorithm 1)."""

    def start(self, trials: Trials) -> State:
        """The head of the linear probe, and a count of steps (T,)."""
        state = super().start(trials)
        state.scratch["steps"] = trials.zeros()
        return state

    def row_losses(self, trials: Trials, state: State, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy (T, B) after taking sigma Delta_k from the label's logit."""
        margins = ldam_margins(state.scratch["counts"], trials.values["largest_margin"])
        scaled = trials.values["scale"].unsqueeze(-1) * margins
        return super().row_losses(trials, state, with_margin(logits, labels, scaled), labels)

    def weights(self, trials: Trials, state: State) -> Tensor:
        """Equal for the first `reweight_after` of the steps, by effective number afterwards (T, K)."""
        late = state.scratch["steps"] >= trials.values["reweight_after"] * trials.config.steps
        weights = super().weights(trials, state)
        return torch.where(late.unsqueeze(-1), weights, torch.ones_like(weights))

    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Count the step."""
        state.scratch["steps"] += 1
