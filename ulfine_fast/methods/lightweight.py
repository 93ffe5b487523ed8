"""Lightweight fine-tuning (LFT): adapter and linear head by FixMatch (arXiv 2001.07685) with logit adjustment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.core.fused.step import FusedStep
from ulfine_fast.core.heads import Tensors, apply_adapter, cosine_logits
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import LabeledOptions, Method, PseudoLabelOptions
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.losses import adjusted_cross_entropy, masked_mean, pseudo_labels


@dataclass(frozen=True)
class LightweightOptions(PseudoLabelOptions, LabeledOptions):
    """Options of :class:`Lightweight`."""


@register(
    "lightweight",
    options=LightweightOptions,
    searches=("adapter_scale",),
    source="FixMatch with logit adjustment, arXiv 2001.07685",
)
class Lightweight(Method):
    """The baseline that ULFine starts from: labelled loss adjusted, pseudo-labels by a fixed threshold."""

    takes_tokens = True

    def start(self, trials: Trials) -> State:
        """A linear head (T, K, D) at the textual prototypes and, unless switched off, an adapter."""
        adapter, frozen = trials.adapter()
        return State({"linear": trials.prototypes.clone(), **adapter}, frozen)

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """CE(z + tau log pi, y) + lambda_u CE(z(strong), argmax z(weak)) where the weak view is confident."""
        values = trials.values
        logits = self.logits(trials, state.tensors, batch.labeled)  # (T, B, K)
        labeled = adjusted_cross_entropy(logits, batch.labels, trials.log_prior, values["tau"]).mean(-1)
        if batch.weak is None or batch.strong is None:
            return Losses.labeled_only(labeled)
        with torch.no_grad():
            weak = self.logits(trials, state.tensors, batch.weak)
        pseudo = pseudo_labels(weak, values["threshold"], values["sharpen"])
        strong = self.logits(trials, state.tensors, batch.strong)  # (T, U, K)
        losses = adjusted_cross_entropy(strong, pseudo.labels, trials.log_prior, trials.zeros())
        unlabeled = values["lambda_u"] * masked_mean(losses, pseudo.mask)
        return Losses(labeled, unlabeled, trials.zeros(), pseudo)

    def fused(self, trials: Trials, state: State) -> type[FusedStep] | None:
        """The adapter and one head."""
        return FusedStep if type(self) is Lightweight else None

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Sigma * cos(f(x), w_k), shape (T, B, K)."""
        adapted = apply_adapter(tensors, features, trials.values["adapter_scale"])
        return cosine_logits(adapted, tensors["linear"], trials.values["scale"])
