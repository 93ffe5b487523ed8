"""DASO (arXiv 2106.05682): predictions of the head and of class means are blended, more for frequent classes.

Published: semantic temperature 0.05, blend temperature 1.5 (0.3 where the distributions differ), semantic weight 1,
threshold 0.95; labelled losses plain or logit-adjusted (tau 0 or 1). Different here: the class means start from all
labelled images and then move by `visual_momentum`, instead of a queue of an averaged encoder's features and 5,000 steps
without any blending; the pseudo-labels' distribution starts as the labelled one and moves by `rho` at each step, not
after every 100. Not reproduced over a cache: as for FixMatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.config import option
from ulfine_fast.core.heads import Tensors, apply_adapter
from ulfine_fast.core.types import Batch, Losses, Pool, State, Trials
from ulfine_fast.methods.base import LabeledOptions, PseudoLabelOptions, RunningOptions
from ulfine_fast.methods.fixmatch import FixMatch, soft_cross_entropy
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.losses import PseudoLabels
from ulfine_fast.ops.prototypes import class_means, move_visual, normalize
from ulfine_fast.ops.thresholds import histogram, running

_EPS = 1e-12


@dataclass(frozen=True)
class DASOOptions(PseudoLabelOptions, RunningOptions, LabeledOptions):
    """Options of :class:`DASO`."""

    visual_momentum: float = option(0.95, "momentum m of the visual prototypes", low=0.0, high=0.9999)
    semantic_temperature: float = option(0.05, "temperature of the cosines with the class means", low=0.001)
    semantic_weight: float = option(1.0, "weight of the semantic alignment of strong and weak views", low=0.0)
    blend_temperature: float = option(
        1.5, "temperature of the pseudo-labels' distribution, by which class means are blended in", low=0.01
    )


@register("daso", options=DASOOptions, source="DASO, arXiv 2106.05682")
class DASO(FixMatch):
    """FixMatch with blended pseudo-labels, and strong views pulled to the class means near their weak views."""

    adjusted = True
    uses_pool = True

    def start(self, trials: Trials) -> State:
        """Adapter and head; the pseudo-labels' distribution (T, K), class means (T, K, D), which classes have one."""
        state = super().start(trials)
        state.memory |= {
            "guessed": trials.log_prior.exp(),
            "visual": torch.zeros_like(trials.prototypes),
            "seen": torch.zeros_like(trials.log_prior, dtype=torch.bool),
        }
        return state

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Class means of all labelled images, before the first step."""
        if step > 0:
            return
        # padding counts as one more class, which is left out
        classes = trials.prototypes.shape[1]
        labels = torch.where(pool.labels < 0, classes, pool.labels)
        adapted = apply_adapter(state.tensors, pool.labeled, trials.values["adapter_scale"])
        means, counts = class_means(adapted, labels, classes + 1)
        state.memory["visual"].copy_(normalize(means[:, :classes]))
        state.memory["seen"].copy_(counts[:, :classes] > 0)

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Logits of (1 - m) times the head's probabilities plus m times the class means', m by the head's class."""
        sharpen = trials.values["sharpen"].view(-1, 1, 1)
        linear = torch.softmax(self.logits(trials, tensors, features) / sharpen, -1)  # (T, B, K)
        semantic = torch.softmax(self.semantic(trials, tensors, features), -1)
        weights = blend_weights(tensors["guessed"], trials.values["blend_temperature"])
        m = weights.gather(1, linear.argmax(-1)).unsqueeze(-1)  # (T, B, 1)
        # the caller divides by the temperature, and must get the blended probabilities back
        return sharpen * torch.log((1 - m) * linear + m * semantic + _EPS)

    def extra_loss(self, trials: Trials, state: State, batch: Batch, strong: Tensor, pseudo: PseudoLabels) -> Tensor:
        """Semantic alignment: cross-entropy of the class means' predictions, weak view to strong view."""
        assert batch.weak is not None
        assert batch.strong is not None
        with torch.no_grad():
            targets = torch.softmax(self.semantic(trials, state.tensors, batch.weak), -1)
        logits = self.semantic(trials, state.tensors, batch.strong)
        return trials.values["semantic_weight"] * soft_cross_entropy(logits, targets).mean(-1)

    def semantic(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Cosines with the class means over the semantic temperature (T, B, K); very low for classes without one."""
        adapted = apply_adapter(tensors, features, trials.values["adapter_scale"])
        cosines = adapted @ normalize(tensors["visual"]).transpose(1, 2)
        logits = cosines / trials.values["semantic_temperature"].view(-1, 1, 1)
        # finite, as 0 * -inf in a cross-entropy is no number
        return logits.masked_fill(~tensors["seen"].unsqueeze(1), -1e4)

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Move the class means by the batch's labels, the pseudo-labels' distribution by all of its predictions."""
        memory, values = state.memory, trials.values
        adapted = apply_adapter(state.tensors, batch.labeled, values["adapter_scale"])
        means, counts = class_means(adapted, batch.labels, memory["seen"].shape[1])
        memory["visual"].copy_(move_visual(memory["visual"], means, counts, memory["seen"], values["visual_momentum"]))
        memory["seen"].logical_or_(counts > 0)
        if losses.pseudo is None:
            return
        rows = torch.full_like(losses.pseudo.mask, 1.0 / losses.pseudo.mask.shape[1])
        predicted = histogram(losses.pseudo.labels, rows, memory["seen"].shape[1])
        memory["guessed"].copy_(running(memory["guessed"], predicted, values["rho"]))


def blend_weights(predicted: Tensor, temperature: Tensor) -> Tensor:
    """Weight of the class means for each predicted class: (p_k / max p)^(1 / temperature), (T, K).

    Args:
        predicted: distribution p of the pseudo-labels (T, K).
        temperature: positive (T,); where it is large all weights are near 1, where it is small only the most frequent
            class has any.
    """
    return (predicted / predicted.amax(-1, keepdim=True)) ** (1 / temperature.view(-1, 1))
