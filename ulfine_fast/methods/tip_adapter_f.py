"""Tip-Adapter-F: the cache's keys are trained, from the labelled features on (arXiv 2111.03930, section 3).

Ours trains on cached plain and weak views in place of fresh crops, by SGD where the paper has AdamW.
"""

from __future__ import annotations

import torch

from ulfine_fast.core.types import Batch, Losses, Pool, State, Trials
from ulfine_fast.methods.registry import register
from ulfine_fast.methods.tip_adapter import TipAdapter, TipAdapterOptions
from ulfine_fast.ops.losses import adjusted_cross_entropy


@register("tip_adapter_f", options=TipAdapterOptions, source="Tip-Adapter-F, arXiv 2111.03930")
class TipAdapterF(TipAdapter):
    """Tip-Adapter whose keys learn from CE(z + tau log pi, y); values and text stay. With tau = 0 it is the paper's."""

    trains = True

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Fill the cache once and hand its keys (T, L, D) to the optimiser."""
        super().refresh(trials, state, pool, step)
        if step == 0:
            state.parameters["keys"] = state.memory.pop("keys")

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Adjusted cross-entropy of the labelled images."""
        logits = self.logits(trials, state.tensors, batch.labeled)  # (T, B, K)
        loss = adjusted_cross_entropy(logits, batch.labels, trials.log_prior, trials.values["tau"]).mean(-1)
        return Losses(loss, torch.zeros_like(loss), torch.zeros_like(loss))
