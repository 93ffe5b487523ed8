"""Preference-oriented fine-tuning, PoFT (arXiv 2412.12865), over classes instead of answers.

There a language model learns to rate its answer higher than other, aligned models do. Here the references are the
zero-shot classifiers of the cache, one for each prompt, or the initial head where the cache has no texts. Different
here: p may be adjusted for class frequencies. Not reproduced: references that are stronger than the trained model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ulfine_fast.config import option
from ulfine_fast.core.fused.step import FusedStep
from ulfine_fast.core.types import Batch, Inputs, Losses, State, Trials
from ulfine_fast.data.splits import Split
from ulfine_fast.methods.base import LabeledOptions, PseudoLabelOptions
from ulfine_fast.methods.fixmatch import FixMatch, plain_cross_entropy
from ulfine_fast.methods.linear_probe import LinearProbe
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.losses import PseudoLabels, adjusted_cross_entropy
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.related.preference.losses import mean_log_likelihood, preferred

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache


@dataclass(frozen=True)
class ReferenceOptions:
    """Options of methods that compare with references."""

    reference_scale: float = option(1.0, "factor on the logits of the references; 0 for uniform references", low=0.0)


@dataclass(frozen=True)
class PoFTOptions(ReferenceOptions, LabeledOptions):
    """Options of :class:`PoFT`."""

    poft_form: str = option(
        "preference",
        "the paper's loss, the same with rows that weigh 1 on average, or cross-entropy weighted by the references",
        choices=("preference", "equal", "weighted"),
        structural=True,
    )


@dataclass(frozen=True)
class PreferenceFixMatchOptions(ReferenceOptions, PseudoLabelOptions):
    """Options of :class:`PreferenceFixMatch`."""

    pseudo_loss: str = option(
        "preference",
        "loss of the pseudo-labels, as poft_form of poft",
        choices=("preference", "equal", "weighted"),
        structural=True,
        off="cross-entropy",
    )


@register("poft", options=PoFTOptions, source="PoFT, arXiv 2412.12865", defaults={"lr": 0.03})
class PoFT(LinearProbe):
    """The head of `linear_probe`, trained to rate a label higher than the zero-shot classifiers do.

    The loss is that of the paper for answers of length 1: -log sigmoid(log p(y|x) - mean_j log p_j(y|x)), with
    references j.
    """

    def inputs(self, cache: FeatureCache, splits: Sequence[Split], device: torch.device) -> Inputs:
        """The texts."""
        return text_references(cache, device)

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Mean over the labelled images, by `poft_form`."""
        logits = self.logits(trials, state.tensors, batch.labeled)  # (T, B, K)
        rows = adjusted_cross_entropy(logits, batch.labels, trials.log_prior, trials.values["tau"])  # (T, B)
        loss = preferred(rows, reference(trials, batch.labeled, batch.labels), trials.config.poft_form).mean(-1)
        return Losses.labeled_only(loss)

    def fused(self, trials: Trials, state: State) -> type[FusedStep] | None:
        """None: the loss is another one."""
        return None


@register(
    "preference_fixmatch",
    options=PreferenceFixMatchOptions,
    source="after PoFT, arXiv 2412.12865",
    replaces="fixmatch",
    defaults={"lr": 0.03},
)
class PreferenceFixMatch(FixMatch):
    """FixMatch whose pseudo-labels train by the preference loss, with the zero-shot classifiers as references."""

    # texts are compared with features
    takes_tokens = False

    def inputs(self, cache: FeatureCache, splits: Sequence[Split], device: torch.device) -> Inputs:
        """The texts."""
        return text_references(cache, device)

    def pseudo_label_losses(self, trials: Trials, strong: Tensor, weak: Tensor, pseudo: PseudoLabels) -> Tensor:
        """Losses (T, U) by `pseudo_loss`, from strong views' logits (T, U, K) and weak views (T, U, D)."""
        rows = plain_cross_entropy(strong, pseudo.labels)
        # the references see the easier view, from which the pseudo-label was drawn
        return preferred(rows, reference(trials, weak, pseudo.labels), trials.config.pseudo_loss, pseudo.mask)


def text_references(cache: FeatureCache, device: torch.device) -> Inputs:
    """Features of the class names in each prompt (P, K, D), as long as the logit scale; none without texts."""
    if cache.text_features is None:
        return Inputs()
    texts = torch.from_numpy(np.asarray(cache.text_features)).float().to(device).transpose(0, 1)
    return Inputs(shared={"references": cache.logit_scale * normalize(texts)})


def reference(trials: Trials, features: Tensor, labels: Tensor) -> Tensor:
    """Mean log-likelihood of labels (T, B) by the trials' references, for unit features (T, B, D)."""
    scale = trials.values["reference_scale"]
    heads = trials.inputs.shared.get("references")
    if heads is None:
        return mean_log_likelihood([trials.prototypes], scale * trials.values["scale"], features, labels)
    return mean_log_likelihood(heads.unbind(0), scale, features, labels)
