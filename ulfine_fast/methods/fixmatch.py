"""FixMatch (arXiv 2001.07685): confident predictions on a weak view are the labels of the strong one.

Published: threshold 0.95, lambda_u 1, 2^20 steps of 64 + 448. Not reproduced over a cache: fresh augmentations at every
step (a few cached views replace them), training of the encoder (adapter and head replace it) and the average of the
weights over time that the paper tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ulfine_fast.core.fused.step import FusedStep, UnadjustedStep
from ulfine_fast.core.heads import Tensors, apply_adapter, cosine_logits
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import PseudoLabelOptions
from ulfine_fast.methods.lightweight import Lightweight
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.losses import PseudoLabels, adjusted_cross_entropy, masked_mean, pseudo_labels


@register("fixmatch", options=PseudoLabelOptions, source="FixMatch, arXiv 2001.07685")
class FixMatch(Lightweight):
    """The adapter and head of `lightweight`, by the published losses; other methods change single parts of it.

    Attributes:
        adjusted: whether the labelled loss is logit-adjusted by `tau`. Not in FixMatch, as published; in methods that
            are usually reported with and without it, tau = 0 is the published loss.
    """

    adjusted: bool = False

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """CE(z, y) + lambda_u CE(z(strong), argmax z(weak)) where the weak view is confident (section 2.2)."""
        labeled = self.labeled_loss(trials, self.linear_logits(trials, state, batch.labeled), batch.labels)
        if batch.weak is None or batch.strong is None:
            return Losses.labeled_only(labeled)
        with torch.no_grad():
            pseudo = self.pseudo_labels(trials, state, batch)
        strong = self.linear_logits(trials, state, batch.strong)  # (T, U, K)
        unlabeled = masked_mean(self.pseudo_label_losses(trials, strong, batch.weak, pseudo), pseudo.mask)
        extra = self.extra_loss(trials, state, batch, strong, pseudo)
        return Losses(labeled, trials.values["lambda_u"] * unlabeled, extra, pseudo)

    def fused(self, trials: Trials, state: State) -> type[FusedStep] | None:
        """The published losses alone have one."""
        return UnadjustedStep if type(self) is FixMatch else None

    def linear_logits(self, trials: Trials, state: State, features: Tensor) -> Tensor:
        """The linear head's logits (T, B, K), whatever a method predicts from."""
        return Lightweight.logits(self, trials, state.tensors, features)

    def labeled_loss(self, trials: Trials, logits: Tensor, labels: Tensor) -> Tensor:
        """Labelled loss (T,) of logits (T, B, K)."""
        tau = trials.values["tau"] if self.adjusted else trials.zeros()
        return adjusted_cross_entropy(logits, labels, trials.log_prior, tau).mean(-1)

    def pseudo_labels(self, trials: Trials, state: State, batch: Batch) -> PseudoLabels:
        """Classes of the batch's unlabelled images, and how much each trains; called without gradients."""
        assert batch.weak is not None
        logits = self.pseudo_logits(trials, state.tensors, batch.weak)
        # methods that weigh pseudo-labels in another way have no threshold
        threshold = trials.values.get("threshold", trials.zeros())
        return pseudo_labels(logits, threshold, trials.values["sharpen"])

    def pseudo_label_losses(self, trials: Trials, strong: Tensor, weak: Tensor, pseudo: PseudoLabels) -> Tensor:
        """Losses (T, U) of the pseudo-labels, from strong views' logits (T, U, K) and weak views (T, U, D)."""
        return plain_cross_entropy(strong, pseudo.labels)

    def extra_loss(self, trials: Trials, state: State, batch: Batch, strong: Tensor, pseudo: PseudoLabels) -> Tensor:
        """What a method adds to the losses (T,), from the strong views' logits (T, U, K); zero for FixMatch."""
        return trials.zeros()


def plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (T, B) of logits (T, B, K) and classes (T, B)."""
    return -torch.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (T, B) of logits (T, B, K) and probabilities (T, B, K)."""
    return -(targets * torch.log_softmax(logits, -1)).sum(-1)


def plain_and_balanced(trials: Trials, tensors: Tensors, features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, B, K) of the heads "linear" and "balanced" over one adapter."""
    adapted = apply_adapter(tensors, features, trials.values["adapter_scale"])
    scale = trials.values["scale"]
    return cosine_logits(adapted, tensors["linear"], scale), cosine_logits(adapted, tensors["balanced"], scale)
