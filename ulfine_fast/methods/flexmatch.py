"""FlexMatch (arXiv 2110.08263, sections 3.1 and 3.2): thresholds by how many images each class has been sure of.

Published: threshold 0.95, convex mapping b / (2 - b), lambda_u 1, plain cross-entropy (tau 0), 2^20 steps. Lost to the
cache: what FixMatch loses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.core.types import Batch, Losses, Pool, State, Trials
from ulfine_fast.methods.base import LabeledOptions, PseudoLabelOptions
from ulfine_fast.methods.fixmatch import FixMatch
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.losses import PseudoLabels
from ulfine_fast.ops.thresholds import learning_effect, note_classes


@dataclass(frozen=True)
class FlexMatchOptions(PseudoLabelOptions, LabeledOptions):
    """Options of :class:`FlexMatch`."""


@register("flexmatch", options=FlexMatchOptions, source="FlexMatch, arXiv 2110.08263")
class FlexMatch(FixMatch):
    """FixMatch whose threshold is lowered for classes that few images of the pool have been sure of."""

    adjusted = True
    uses_pool = True
    thresholds = False

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Room for the class each unlabelled image was last sure of, -1 for none (T, N)."""
        if step == 0:
            state.scratch = {"given": torch.full_like(pool.unlabeled_rows, -1), "present": pool.present}

    def guess(self, trials: Trials, state: State, batch: Batch) -> PseudoLabels:
        """Guesses over the threshold times b / (2 - b), b the learning effect of their class so far."""
        pseudo = super().guess(trials, state, batch)
        thresholds = self.class_thresholds(trials, state).gather(1, pseudo.labels)  # (T, U)
        confidence = pseudo.probabilities.amax(-1)
        return pseudo._replace(mask=(confidence >= thresholds).to(confidence.dtype))

    def class_thresholds(self, trials: Trials, state: State) -> Tensor:
        """Threshold of each class (T, K); 0 for classes that no image has been sure of."""
        effect = learning_effect(state.scratch["given"], state.scratch["present"], trials.log_prior.shape[1])
        return trials.values["threshold"].view(-1, 1) * effect / (2 - effect)

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Note the classes of images that were sure by the fixed threshold."""
        if losses.pseudo is None or batch.positions is None:
            return
        confidence = losses.pseudo.probabilities.amax(-1)
        sure = confidence >= trials.values["threshold"].view(-1, 1)
        classes = torch.where(sure, losses.pseudo.labels, -torch.ones_like(losses.pseudo.labels))
        state.scratch["given"].copy_(note_classes(state.scratch["given"], batch.positions, classes))
