"""FineSSL: balanced margin softmax and decoupled label smoothing (arXiv 2405.11756; formulas as its code has them).

Published: threshold 0.7, margin 8, smoothing 0.5, lambda_u 1 or 3, scale 1 / 0.07, learning rate 0.03, 15,000 steps of
32 + 32. Different here: both heads start at the text; the labelled losses are logit-adjusted by tau, 0 in the paper;
an image's class is kept over the whole fit, where the paper forgets it after each epoch. Not reproduced over a cache:
prompts inside the blocks (an adapter behind the encoder replaces them), and a second strong view of each image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.config import option
from ulfine_fast.core.heads import Tensors, apply_adapter, cosine_logits, new_adapter
from ulfine_fast.core.types import Batch, Losses, Pool, State, Trials
from ulfine_fast.methods.base import LabeledOptions, Method, PseudoLabelOptions
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.losses import adjusted_cross_entropy, pseudo_labels
from ulfine_fast.ops.margins import balanced_margins, class_counts, smoothed_cross_entropy, with_margin
from ulfine_fast.ops.thresholds import updated_classes


@dataclass(frozen=True)
class FineSSLOptions(PseudoLabelOptions, LabeledOptions):
    """Options of :class:`FineSSL`."""

    margin: float = option(8.0, "largest balanced margin, in logits", low=0.0)
    smoothing: float = option(0.5, "label smoothing of the auxiliary head", low=0.0, high=1.0)


@register("finessl", options=FineSSLOptions, source="FineSSL, arXiv 2405.11756")
class FineSSL(Method):
    """A head with margins for classes with few pseudo-labels, which an auxiliary head weighs by its confidence."""

    uses_pool = True
    uses_threshold = False

    def start(self, trials: Trials) -> State:
        """Both heads (T, K, D) at the textual prototypes, their scales (T,), and the adapter."""
        adapter = {}
        if trials.config.adapter == "residual":
            adapter = new_adapter(trials.seeds, trials.prototypes.shape[-1], trials.values["rank"])
        heads = {name: trials.prototypes.clone() for name in ("linear", "auxiliary")}
        scales = {f"{name}.scale": trials.values["scale"].clone() for name in heads}
        return State({**heads, **scales, **adapter})

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Start with no class for each unlabelled image: -1, (T, N)."""
        if step == 0:
            state.scratch["assigned"] = torch.full_like(pool.unlabeled_rows, -1)

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Both heads' labelled losses; lambda_u times the main head's pseudo-labelled one, plus the auxiliary's."""
        margins = self.margins(trials, state)
        adapted = apply_adapter(state.tensors, batch.labeled, trials.values["adapter_scale"])  # (T, B, D)
        main, auxiliary = _main_and_auxiliary(state.tensors, adapted)
        prior, tau = trials.log_prior, trials.values["tau"]
        labeled = adjusted_cross_entropy(with_margin(main, batch.labels, margins), batch.labels, prior, tau)
        labeled = (labeled + adjusted_cross_entropy(auxiliary, batch.labels, prior, tau)).mean(-1)
        if batch.weak is None or batch.strong is None:
            return Losses.labeled_only(labeled)
        with torch.no_grad():
            adapted = apply_adapter(state.tensors, batch.weak, trials.values["adapter_scale"])
            weak, auxiliary_weak = _main_and_auxiliary(state.tensors, adapted)
            confidence = torch.softmax(auxiliary_weak, -1).amax(-1)  # (T, U)
        pseudo = pseudo_labels(weak, trials.values["threshold"], trials.values["sharpen"])

        # all images train the main head, by the auxiliary's confidence
        adapted = apply_adapter(state.tensors, batch.strong, trials.values["adapter_scale"])
        main, auxiliary = _main_and_auxiliary(state.tensors, adapted)
        shifted = with_margin(main, pseudo.labels, margins)
        main_losses = adjusted_cross_entropy(shifted, pseudo.labels, prior, trials.zeros())  # (T, U)
        main_loss = trials.values["lambda_u"] * (main_losses * confidence).mean(-1)

        # confident ones train the auxiliary head, smoothed; the mean is over these alone, as published
        smoothed = smoothed_cross_entropy(auxiliary, pseudo.labels, trials.values["smoothing"]) * pseudo.mask
        auxiliary_loss = smoothed.sum(-1) / pseudo.mask.sum(-1).clamp(min=1)
        return Losses(labeled, main_loss + auxiliary_loss, trials.zeros(), pseudo)

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Keep the classes of images that the main head is confident about."""
        if losses.pseudo is None or batch.positions is None:
            return
        pseudo = losses.pseudo
        classes = torch.where(pseudo.mask > 0, pseudo.labels, -torch.ones_like(pseudo.labels))
        state.scratch["assigned"].copy_(updated_classes(state.scratch["assigned"], batch.positions, classes))

    def margins(self, trials: Trials, state: State) -> Tensor:
        """Balanced margins (T, K) by how many unlabelled images each class has."""
        # images without a class yet are -1, which counts nowhere
        counts = class_counts(state.scratch["assigned"], trials.log_prior.shape[1])
        return balanced_margins(counts, trials.values["margin"])

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The main head's logits (T, B, K), without margins."""
        adapted = apply_adapter(tensors, features, trials.values["adapter_scale"])
        return cosine_logits(adapted, tensors["linear"], tensors["linear.scale"])


def _main_and_auxiliary(tensors: Tensors, adapted: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, B, K) of the main head, and of the auxiliary one, which does not train the adapter."""
    main = cosine_logits(adapted, tensors["linear"], tensors["linear.scale"])
    return main, cosine_logits(adapted.detach(), tensors["auxiliary"], tensors["auxiliary.scale"])
