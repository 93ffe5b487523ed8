"""Tip-Adapter-F: the cache's keys are trained, from the labelled features on (arXiv 2111.03930, section 3).

Different here: training on cached plain and weak views instead of fresh crops, by SGD instead of AdamW.
"""

from __future__ import annotations

from ulfine_fast.core.types import Batch, Losses, Pool, State, Trials
from ulfine_fast.methods.registry import register
from ulfine_fast.methods.tip_adapter import TipAdapter, TipAdapterOptions
from ulfine_fast.ops.losses import adjusted_cross_entropy


@register("tip_adapter_f", options=TipAdapterOptions, source="Tip-Adapter-F, arXiv 2111.03930")
class TipAdapterF(TipAdapter):
    """Tip-Adapter whose keys learn from CE(z + tau log pi, y); values and text stay. With tau = 0 it is the paper's."""

    trains = True

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Fill the cache once, and make its keys (T, L, D) parameters."""
        super().refresh(trials, state, pool, step)
        if step == 0:
            state.parameters["keys"] = state.memory.pop("keys")

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Adjusted cross-entropy of the labelled images."""
        logits = self.logits(trials, state.tensors, batch.labeled)  # (T, B, K)
        loss = adjusted_cross_entropy(logits, batch.labels, trials.log_prior, trials.values["tau"]).mean(-1)
        return Losses.labeled_only(loss)
