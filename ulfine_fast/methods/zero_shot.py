"""Zero-shot classification by textual prototypes (CLIP, arXiv 2103.00020): nothing is trained."""

from __future__ import annotations

from torch import Tensor

from ulfine_fast.core.heads import Tensors, cosine_logits
from ulfine_fast.core.types import State, Trials
from ulfine_fast.methods.base import Method
from ulfine_fast.methods.registry import register


@register("zero_shot", source="CLIP, arXiv 2103.00020")
class ZeroShot(Method):
    """Logits are scaled cosines to the textual prototypes."""

    uses_labels = False
    trains = False
    uses_unlabeled = False

    def start(self, trials: Trials) -> State:
        """Keep the prototypes."""
        return State({}, {"prototypes": trials.prototypes.clone()})

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Sigma * cos(x, t_k), shape (T, B, K)."""
        return cosine_logits(features, tensors["prototypes"], trials.values["scale"])
