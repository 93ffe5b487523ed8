"""LIFT-head: what LIFT and LIFT+ (arXiv 2309.10019, 2504.13282) train outside the encoder's blocks, over the cache.

Kept: the cosine classifier of scale 25 on the output of the encoder's last norm, before its projection; its start from
the texts; logit adjustment; the schedule of crops, over the crops that were extracted. Not reproduced over a cache:
AdaptFormer in all blocks but the last, where `adapter="adaptformer"` trains the same one. Over projected features it is
`linear_probe` with LIFT+'s settings and crops. A residual adapter behind the encoder is not LIFT's: none is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig, option
from ulfine_fast.core.fused.step import FusedStep
from ulfine_fast.core.heads import Tensors, cosine_logits, frozen_end, last_norm
from ulfine_fast.core.types import State, Trials
from ulfine_fast.data.splits import Split
from ulfine_fast.methods.base import LabeledOptions
from ulfine_fast.methods.lift import lift_settings
from ulfine_fast.methods.linear_probe import LinearProbe
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.prototypes import normalize

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache


@dataclass(frozen=True)
class LiftHeadOptions(LabeledOptions):
    """Options of :class:`LiftHead`."""

    feature: str = option(
        "projected",
        "what the head classifies; pre-projection is what the encoder has before its projection, and needs a cache "
        "made by extract --features last-block or pre-projection",
        choices=("projected", "pre-projection"),
        structural=True,
        tokens="pre-projection",
    )


@register("lift_head", options=LiftHeadOptions, source="LIFT+, arXiv 2504.13282")
class LiftHead(LinearProbe):
    """CE(z + tau log pi, y) over a cosine head, with the feature that LIFT gives its head; labelled images alone."""

    takes_tokens = True

    def check(self, cache: FeatureCache, config: FitConfig, split: Split) -> None:
        """Refuse the feature before the projection where the cache does not hold it."""
        if config.feature == "pre-projection" and not cache.trainable_tokens:
            raise InputError(
                "feature pre-projection trains on what the encoder has before its projection, which this cache does "
                "not hold; extract again with --features last-block or pre-projection, or take feature projected"
            )

    def start(self, trials: Trials) -> State:
        """A linear head at the texts, (T, K, D), or (T, K, W) before the projection; and an adapter where wanted."""
        linear = trials.prototypes.clone()
        if trials.config.feature == "pre-projection":
            linear = text_start(trials.prototypes, trials.head["projection"])
        adapter = trials.adapter()[0] if trials.config.adapter == "adaptformer" else {}
        # a cache of tokens behind the norm has none to apply
        frozen = frozen_end(trials.head, len(trials.seeds)) if "ln_post_weight" in trials.head else {}
        return State({"linear": linear, **adapter}, frozen)

    def fused(self, trials: Trials, state: State) -> type[FusedStep] | None:
        """One head, over features; tokens go through autograd."""
        return FusedStep if type(self) is LiftHead else None

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Sigma * cos(x, w_k) of unit features (T, B, D) or tokens (T, B, S W), shape (T, B, K)."""
        return cosine_logits(self._rows(trials, tensors, features), tensors["linear"], trials.values["scale"])

    def _rows(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """What the head classifies: unit rows (T, B, D), or (T, B, W) before the projection."""
        if not trials.config.reads_tokens:
            return features
        if "backbone.projection" not in tensors:
            return normalize(features)
        rows = last_norm(tensors, features, trials.values["adapter_scale"])
        return normalize(rows if trials.config.feature == "pre-projection" else rows @ tensors["backbone.projection"])


def text_start(prototypes: Tensor, projection: Tensor) -> Tensor:
    """Class vectors before the projection, w_k = norm(norm(t_k) P^T) (semantic-aware initialisation, arXiv 2309.10019).

    For a feature h before the projection, h . w_k is the zero-shot logit of h P up to a factor for each class.

    Args:
        prototypes: of any length (T, K, D).
        projection: P (W, D).

    Returns:
        Unit rows (T, K, W).
    """
    return normalize(normalize(prototypes) @ projection.T)


def lift_head_settings(labeled: int, classes: int, layers: int = 1, epochs: int = 5) -> dict[str, Any]:
    """LIFT+'s published settings as options of FitConfig (arXiv 2504.13282, and its released code).

    Args:
        labeled: labelled images trained on; epochs of mini-batches of 128 are counted in them.
        classes: K.
        layers: how many blocks share the adapters' parameters; read where `adapter="adaptformer"`.
        epochs: 5, and 15 for iNaturalist.

    Returns:
        Those of :func:`ulfine_fast.methods.lift.lift_settings` at learning rate 0.02, with fewer steps, the schedule of
        crops, no adapter, and factor 1 for an adapter that the caller adds.

    Raises:
        InputError: no labelled image, no class, no layer or no epoch.
    """
    if epochs < 1:
        raise InputError(f"epochs must be at least 1, got {epochs}")
    settings = lift_settings(labeled, classes, layers)
    # LIFT's are for ten epochs
    steps = settings["steps"] // 10 * epochs
    return {**settings, "steps": steps, "lr": 0.02, "crop_epochs": epochs, "adapter": "none", "adapter_scale": 1.0}
