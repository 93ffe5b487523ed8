"""ABC, auxiliary balanced classifier (arXiv 2110.10368; as its code has it).

Published: threshold 0.95, weight of the auxiliary loss 1. Different here: images weigh by the probability that the
paper keeps them with, which has the same expected gradient. Not reproduced over a cache: as for FixMatch, and a second
strong view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ulfine_fast.core.heads import Tensors, apply_adapter, cosine_logits
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import PseudoLabelOptions
from ulfine_fast.methods.fixmatch import FixMatch, plain_cross_entropy, soft_cross_entropy
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.distributions import rarity
from ulfine_fast.ops.losses import masked_mean, pseudo_labels


@register("abc", options=PseudoLabelOptions, source="ABC, arXiv 2110.10368")
class ABC(FixMatch):
    """FixMatch, and a second head that predicts, in which frequent classes weigh as little as the rarest."""

    def start(self, trials: Trials) -> State:
        """Two heads (T, K, D) at the textual prototypes, the adapter, and the fraction of the steps done (T,)."""
        state = super().start(trials)
        state.parameters["auxiliary"] = trials.prototypes.clone()
        state.scratch["done"] = trials.zeros()
        return state

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """FixMatch's losses, and the auxiliary head's, weighted by class and with soft pseudo-labels."""
        main = super().losses(trials, state, batch)
        balance = rarity(trials.log_prior)  # (T, K)
        auxiliary = plain_cross_entropy(self.logits(trials, state.tensors, batch.labeled), batch.labels)
        labeled = main.labeled + masked_mean(auxiliary, balance.gather(1, batch.labels))
        if batch.weak is None or batch.strong is None:
            return main._replace(labeled=labeled)
        with torch.no_grad():
            weak = self.logits(trials, state.tensors, batch.weak)
        pseudo = pseudo_labels(weak, trials.values["threshold"], trials.values["sharpen"])
        # all classes weigh the same at first, when too few pseudo-labels are confident
        weights = 1 - state.scratch["done"].view(-1, 1) * (1 - balance)
        auxiliary = soft_cross_entropy(self.logits(trials, state.tensors, batch.strong), pseudo.probabilities)
        unlabeled = masked_mean(auxiliary, pseudo.mask * weights.gather(1, pseudo.labels))
        return main._replace(labeled=labeled, unlabeled=main.unlabeled + trials.values["lambda_u"] * unlabeled)

    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Count the step."""
        state.scratch["done"] += 1.0 / trials.config.steps

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The first head's logits (T, B, K), which teach the first head."""
        return super().logits(trials, tensors, features)

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The auxiliary head's logits (T, B, K)."""
        adapted = apply_adapter(tensors, features, trials.values["adapter_scale"])
        return cosine_logits(adapted, tensors["auxiliary"], trials.values["scale"])
