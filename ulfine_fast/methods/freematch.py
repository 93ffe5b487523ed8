"""FreeMatch (arXiv 2205.07246): thresholds that follow the model's own confidence, and a loss for fairness.

Published: momentum 0.999 over 2^20 steps, fairness 0.001 to 0.05, plain cross-entropy (tau 0). Ours: the momentum is
`rho`, as runs here are short. Lost to the cache: what FixMatch loses.
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
    """FixMatch with one threshold for each class, none of them a setting."""

    adjusted = True
    thresholds = False

    def start(self, trials: Trials) -> State:
        """Adapter and head; mean confidence (T,), class shares and histogram of guesses (T, K), all at 1 / K."""
        state = super().start(trials)
        even = torch.full_like(trials.log_prior, 1.0 / trials.log_prior.shape[1])
        state.memory |= {"confidence": even[:, 0].clone(), "shares": even.clone(), "histogram": even.clone()}
        return state

    def guess(self, trials: Trials, state: State, batch: Batch) -> PseudoLabels:
        """Guesses over their class's threshold, which has already moved with this batch."""
        assert batch.weak is not None
        logits = self.pseudo_logits(trials, state.tensors, batch.weak)
        probabilities = torch.softmax(logits / trials.values["sharpen"].view(-1, 1, 1), -1)  # (T, U, K)
        confidence, labels = probabilities.max(-1)
        moved = moved_confidence(trials, state, probabilities)
        thresholds = adaptive_thresholds(moved["confidence"], moved["shares"])
        mask = (confidence >= thresholds.gather(1, labels)).to(logits.dtype)
        return PseudoLabels(labels, mask, probabilities)

    def beside(self, trials: Trials, state: State, batch: Batch, strong: Tensor, pseudo: PseudoLabels) -> Tensor:
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
