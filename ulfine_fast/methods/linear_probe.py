"""Linear probe: a cosine classifier on frozen features, from the textual prototypes, on labelled images alone.

Semantic-aware initialisation, scale and logit adjustment follow LIFT (arXiv 2309.10019, section 4).
"""

from __future__ import annotations

from torch import Tensor

from ulfine_fast.core.fused.step import FusedStep
from ulfine_fast.core.heads import Tensors, cosine_logits
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import LabeledOptions, Method
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.losses import adjusted_cross_entropy


@register("linear_probe", options=LabeledOptions, source="after LIFT, arXiv 2309.10019")
class LinearProbe(Method):
    """CE(z + tau log pi, y) over a linear head; no adapter, no unlabelled images."""

    uses_unlabeled = False

    def start(self, trials: Trials) -> State:
        """A linear head (T, K, D) at the textual prototypes."""
        return State({"linear": trials.prototypes.clone()})

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Logit-adjusted cross-entropy of the labelled images."""
        logits = self.logits(trials, state.tensors, batch.labeled)  # (T, B, K)
        loss = adjusted_cross_entropy(logits, batch.labels, trials.log_prior, trials.values["tau"]).mean(-1)
        return Losses.labeled_only(loss)

    def fused(self, trials: Trials, state: State) -> type[FusedStep] | None:
        """One head."""
        return FusedStep if type(self) is LinearProbe else None

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Sigma * cos(x, w_k), shape (T, B, K)."""
        return cosine_logits(features, tensors["linear"], trials.values["scale"])
