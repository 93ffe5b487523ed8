"""FreeMatch (arXiv 2205.07246): thresholds that follow the model's own confidence, and a loss for fairness.

Published: momentum 0.999 over 2^20 steps, fairness 0.001 to 0.05, plain cross-entropy (tau 0). Different here: the
momentum is `rho`, as runs are short. Not reproduced over a cache: as for FixMatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.config import option
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import LabeledOptions, RunningOptions, SharpeningOptions
from ulfine_fast.methods.fixmatch import FixMatch
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.losses import PseudoLabels
from ulfine_fast.ops.thresholds import adaptive_thresholds, fairness_loss, histogram, running


@dataclass(frozen=True)
class FreeMatchOptions(SharpeningOptions, RunningOptions, LabeledOptions):
    """Options of :class:`FreeMatch`."""

    fairness: float = option(0.01, "weight of the fairness loss", low=0.0)


@register("freematch", options=FreeMatchOptions, source="FreeMatch, arXiv 2205.07246")
class FreeMatch(FixMatch):
    """FixMatch with an adaptive threshold for each class."""

    adjusted = True
    uses_threshold = False

    def start(self, trials: Trials) -> State:
        """Adapter and head; mean confidence (T,), probabilities and histogram of the classes (T, K), all at 1 / K."""
        state = super().start(trials)
        uniform = torch.full_like(trials.log_prior, 1.0 / trials.log_prior.shape[1])
        state.memory |= {"confidence": uniform[:, 0].clone(), "shares": uniform.clone(), "histogram": uniform.clone()}
        return state

    def pseudo_labels(self, trials: Trials, state: State, batch: Batch) -> PseudoLabels:
        """Pseudo-labels over their class's threshold, which has already moved with this batch."""
        assert batch.weak is not None
        logits = self.pseudo_logits(trials, state.tensors, batch.weak)
        probabilities = torch.softmax(logits / trials.values["sharpen"].view(-1, 1, 1), -1)  # (T, U, K)
        confidence, labels = probabilities.max(-1)
        moved = moved_confidence(trials, state, probabilities)
        thresholds = adaptive_thresholds(moved["confidence"], moved["shares"])
        mask = (confidence >= thresholds.gather(1, labels)).to(logits.dtype)
        return PseudoLabels(labels, mask, probabilities)

    def extra_loss(self, trials: Trials, state: State, batch: Batch, strong: Tensor, pseudo: PseudoLabels) -> Tensor:
        """The fairness loss (T,), weighted."""
        moved = moved_confidence(trials, state, pseudo.probabilities)
        return trials.values["fairness"] * fairness_loss(strong, pseudo.mask, moved["shares"], moved["histogram"])

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Keep the running means."""
        if losses.pseudo is not None:
            for name, moved in moved_confidence(trials, state, losses.pseudo.probabilities).items():
                state.memory[name].copy_(moved)


def moved_confidence(trials: Trials, state: State, probabilities: Tensor) -> dict[str, Tensor]:
    """The running means after a batch of probabilities (T, U, K) (section 4.1)."""
    confidence, labels = probabilities.max(-1)
    rows = torch.full_like(confidence, 1.0 / confidence.shape[-1])
    means = {
        "confidence": confidence.mean(-1),
        "shares": probabilities.mean(1),
        "histogram": histogram(labels, rows, probabilities.shape[-1]),
    }
    return {name: running(state.memory[name], mean, trials.values["rho"]) for name, mean in means.items()}
