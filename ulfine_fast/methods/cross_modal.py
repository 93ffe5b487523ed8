"""Cross-modal linear probe: texts are labelled examples beside the images (arXiv 2301.06267, section 3).

Different here: every step sees all K texts where the paper draws as many as images, and the images' loss is adjusted by
tau, 0 in the paper. Not reproduced over a cache: fresh crops.
"""

from __future__ import annotations

import torch

from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import LabeledOptions
from ulfine_fast.methods.linear_probe import LinearProbe
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.losses import adjusted_cross_entropy


@register("cross_modal", options=LabeledOptions, source="arXiv 2301.06267")
class CrossModal(LinearProbe):
    """One head for both modalities, half of the loss for each."""

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Mean of the images' and the texts' cross-entropy; texts come once for each class and need no adjustment."""
        images = super().losses(trials, state, batch).labeled
        # where the cache has no text these are class means, and examples all the same
        logits = self.logits(trials, state.tensors, trials.prototypes)  # (T, K, K)
        labels = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
        texts = adjusted_cross_entropy(logits, labels, trials.log_prior, trials.zeros())
        loss = (images + texts.mean(-1)) / 2
        return Losses.labeled_only(loss)
