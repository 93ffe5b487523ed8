"""FlexMatch (arXiv 2110.08263, sections 3.1 and 3.2): thresholds by the number of confident images of each class.

Published: threshold 0.95, convex mapping b / (2 - b), lambda_u 1, plain cross-entropy (tau 0), 2^20 steps. Not
reproduced over a cache: as for FixMatch.
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
from ulfine_fast.ops.thresholds import learning_effect, updated_classes


@dataclass(frozen=True)
class FlexMatchOptions(PseudoLabelOptions, LabeledOptions):
    """Options of :class:`FlexMatch`."""


@register("flexmatch", options=FlexMatchOptions, source="FlexMatch, arXiv 2110.08263")
class FlexMatch(FixMatch):
    """FixMatch whose threshold is lowered for classes that few images of the pool are confidently predicted as."""

    adjusted = True
    uses_pool = True
    uses_threshold = False

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Start with no confident class for each unlabelled image: -1, (T, N)."""
        if step == 0:
            state.scratch = {"assigned": torch.full_like(pool.unlabeled_rows, -1), "present": pool.present}

    def pseudo_labels(self, trials: Trials, state: State, batch: Batch) -> PseudoLabels:
        """Pseudo-labels over the threshold times b / (2 - b), b the learning effect of their class so far."""
        pseudo = super().pseudo_labels(trials, state, batch)
        thresholds = self.class_thresholds(trials, state).gather(1, pseudo.labels)  # (T, U)
        confidence = pseudo.probabilities.amax(-1)
        return pseudo._replace(mask=(confidence >= thresholds).to(confidence.dtype))

    def class_thresholds(self, trials: Trials, state: State) -> Tensor:
        """Threshold of each class (T, K); 0 for classes without a confident image."""
        effect = learning_effect(state.scratch["assigned"], state.scratch["present"], trials.log_prior.shape[1])
        return trials.values["threshold"].view(-1, 1) * effect / (2 - effect)

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Keep the classes of images that are confident by the fixed threshold."""
        if losses.pseudo is None or batch.positions is None:
            return
        confident = losses.pseudo.probabilities.amax(-1) >= trials.values["threshold"].view(-1, 1)
        classes = torch.where(confident, losses.pseudo.labels, -torch.ones_like(losses.pseudo.labels))
        state.scratch["assigned"].copy_(updated_classes(state.scratch["assigned"], batch.positions, classes))
