"""SoftMatch (arXiv 2301.10921): every pseudo-label trains, by a weight that falls off under the mean confidence.

Published: momentum 0.999 over 2^20 steps, width 2, uniform alignment, lambda_u 1, plain cross-entropy (tau 0).
Different here: the momentum is `rho`, as runs are short. Not reproduced over a cache: as for FixMatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import LabeledOptions, RunningOptions, SharpeningOptions
from ulfine_fast.methods.fixmatch import FixMatch
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.distributions import aligned
from ulfine_fast.ops.losses import PseudoLabels
from ulfine_fast.ops.thresholds import running, truncated_weights


@dataclass(frozen=True)
class SoftMatchOptions(SharpeningOptions, RunningOptions, LabeledOptions):
    """Options of :class:`SoftMatch`."""


@register("softmatch", options=SoftMatchOptions, source="SoftMatch, arXiv 2301.10921")
class SoftMatch(FixMatch):
    """FixMatch with a truncated Gaussian of the aligned confidence instead of the threshold."""

    adjusted = True
    uses_threshold = False

    def start(self, trials: Trials) -> State:
        """Adapter and head; mean 1 / K and variance 1 of the confidence (T,), class probabilities 1 / K (T, K)."""
        state = super().start(trials)
        uniform = torch.full_like(trials.log_prior, 1.0 / trials.log_prior.shape[1])
        state.memory |= {"mean": uniform[:, 0].clone(), "variance": torch.ones_like(uniform[:, 0]), "shares": uniform}
        return state

    def pseudo_labels(self, trials: Trials, state: State, batch: Batch) -> PseudoLabels:
        """The most probable classes; their weights are those of the probabilities aligned to a uniform distribution."""
        pseudo = super().pseudo_labels(trials, state, batch)
        moved, confidence = moved_gaussian(trials, state, pseudo.probabilities)
        return pseudo._replace(mask=truncated_weights(confidence, moved["mean"], moved["variance"]))

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Keep the running means."""
        if losses.pseudo is not None:
            for name, moved in moved_gaussian(trials, state, losses.pseudo.probabilities)[0].items():
                state.memory[name].copy_(moved)


def moved_gaussian(trials: Trials, state: State, probabilities: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The running means after a batch of probabilities (T, U, K), and its aligned confidence (T, U)."""
    memory, rho = state.memory, trials.values["rho"]
    class_mean = running(memory["shares"], probabilities.mean(1), rho)
    confidence = aligned(probabilities, torch.ones_like(class_mean), class_mean).amax(-1)
    mean = running(memory["mean"], confidence.mean(-1), rho)
    # a batch of one image has no variance
    spread = confidence.var(-1, unbiased=confidence.shape[1] > 1)
    variance = running(memory["variance"], spread, rho)
    return {"mean": mean, "variance": variance, "shares": class_mean}, confidence
