"""FineSSL: balanced margin softmax and decoupled label smoothing (arXiv 2405.11756; formulas as its code has them).

Published: threshold 0.7, margin 8, smoothing 0.5, lambda_u 1 or 3, scale 1 / 0.07, learning rate 0.03, 15,000 steps of
32 + 32. Ours: both heads start at the text, and the labelled losses are logit-adjusted by tau, 0 in the paper. Lost to
the cache: prompts inside the blocks (an adapter behind the encoder stands in for them) and a second strong view of each
image in a step. An image's class is kept over the whole fit, where the paper forgets it after each epoch.
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
from ulfine_fast.ops.losses import PseudoLabels, adjusted_cross_entropy, pseudo_labels
from ulfine_fast.ops.margins import balanced_margins, class_counts, smoothed_cross_entropy, with_margin


@dataclass(frozen=True)
class FineSSLOptions(PseudoLabelOptions, LabeledOptions):
    """Options of :class:`FineSSL`."""

    margin: float = option(8.0, "largest balanced margin, in logits", low=0.0)
    smoothing: float = option(0.5, "label smoothing of the auxiliary head", low=0.0, high=1.0)


@register("finessl", options=FineSSLOptions, source="FineSSL, arXiv 2405.11756")
class FineSSL(Method):
    """A head with margins for classes that few images are given to; an auxiliary one says how sure to be of each."""

    uses_pool = True
    thresholds = False

    def start(self, trials: Trials) -> State:
        """Both heads (T, K, D) at the textual prototypes, their scales (T,), and the adapter."""
        adapter = {}
        if trials.config.adapter == "residual":
            adapter = new_adapter(trials.seeds, trials.prototypes.shape[-1], trials.values["rank"])
        heads = {name: trials.prototypes.clone() for name in ("linear", "auxiliary")}
        scales = {f"{name}.scale": trials.values["scale"].clone() for name in heads}
        return State({**heads, **scales, **adapter})

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Room for the class each unlabelled image was last given, -1 for none (T, N)."""
        if step == 0:
            state.scratch["given"] = torch.full_like(pool.unlabeled_rows, -1)

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Both heads' labelled losses; lambda_u times the main head's pseudo-labelled one, plus the auxiliary's."""
        margins = self.margins(trials, state)
        adapted = apply_adapter(state.tensors, batch.labeled, trials.values["adapter_scale"])  # (T, B, D)
        main, auxiliary = _both(state.tensors, adapted)
        prior, tau = trials.log_prior, trials.values["tau"]
        labeled = adjusted_cross_entropy(with_margin(main, batch.labels, margins), batch.labels, prior, tau)
        labeled = (labeled + adjusted_cross_entropy(auxiliary, batch.labels, prior, tau)).mean(-1)
        if batch.weak is None or batch.strong is None:
            return Losses(labeled, torch.zeros_like(labeled), torch.zeros_like(labeled))
        with torch.no_grad():
            weak = _both(state.tensors, apply_adapter(state.tensors, batch.weak, trials.values["adapter_scale"]))
        pseudo = pseudo_labels(weak[0], trials.values["threshold"], trials.values["sharpen"])
        unlabeled = self._unlabeled(trials, state.tensors, batch.strong, pseudo, weak[1], margins)
        return Losses(labeled, unlabeled, torch.zeros_like(labeled), pseudo)

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Note the classes given to images of which the main head is sure."""
        if losses.pseudo is None or batch.positions is None:
            return
        sure = torch.where(losses.pseudo.mask > 0, losses.pseudo.labels, -torch.ones_like(losses.pseudo.labels))
        given = state.scratch["given"]
        # an image drawn twice takes the larger class: any rule will do that does not depend on the device
        news = torch.full_like(given, -1).scatter_reduce(1, batch.positions, sure, "amax")
        given.copy_(torch.where(news >= 0, news, given))

    def margins(self, trials: Trials, state: State) -> Tensor:
        """Balanced margins (T, K) by how many unlabelled images each class was given."""
        # images given to no class yet are -1, which counts nowhere
        counts = class_counts(state.scratch["given"], trials.log_prior.shape[1])
        return balanced_margins(counts, trials.values["margin"])

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The main head's logits (T, B, K), without margins."""
        adapted = apply_adapter(tensors, features, trials.values["adapter_scale"])
        return cosine_logits(adapted, tensors["linear"], tensors["linear.scale"])

    def _unlabeled(
        self,
        trials: Trials,
        tensors: Tensors,
        strong: Tensor,
        pseudo: PseudoLabels,
        auxiliary_weak: Tensor,
        margins: Tensor,
    ) -> Tensor:
        """All images train the main head, by the auxiliary's confidence; sure ones the auxiliary, smoothed (T,)."""
        values = trials.values
        main, auxiliary = _both(tensors, apply_adapter(tensors, strong, values["adapter_scale"]))
        confidence = torch.softmax(auxiliary_weak, -1).amax(-1)  # (T, U)
        none = trials.zeros()
        losses = adjusted_cross_entropy(
            with_margin(main, pseudo.labels, margins), pseudo.labels, trials.log_prior, none
        )
        smoothed = smoothed_cross_entropy(auxiliary, pseudo.labels, values["smoothing"]) * pseudo.mask
        # the mean over kept images, as published, where the main loss has the whole batch
        kept = pseudo.mask.sum(-1).clamp(min=1)
        return values["lambda_u"] * (losses * confidence).mean(-1) + smoothed.sum(-1) / kept


def _both(tensors: Tensors, adapted: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, B, K) of the main head, and of the auxiliary one, which teaches the adapter nothing."""
    main = cosine_logits(adapted, tensors["linear"], tensors["linear.scale"])
    return main, cosine_logits(adapted.detach(), tensors["auxiliary"], tensors["auxiliary.scale"])
