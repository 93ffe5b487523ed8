"""What a method is: the tensors that it trains, its losses, and what it keeps between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ulfine_fast.config import FitConfig, option
from ulfine_fast.core.batches import BatchSource
from ulfine_fast.core.fused.step import FusedStep
from ulfine_fast.core.heads import Tensors
from ulfine_fast.core.types import Batch, Inputs, Losses, Pool, State, Trials
from ulfine_fast.data.splits import Split

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache


@dataclass(frozen=True)
class LabeledOptions:
    """What methods with a logit-adjusted labelled loss read."""

    tau: float = option(
        1.0,
        "strength of the logit adjustment on labelled images; 0 is plain cross-entropy",
        low=0.0,
        search={"low": 0.0, "high": 2.0},
    )


@dataclass(frozen=True)
class SharpeningOptions:
    """What methods read that weigh a loss on unlabelled images."""

    sharpen: float = option(1.0, "temperature dividing the logits that pseudo-labels are drawn from", low=0.01)
    lambda_u: float = option(
        0.5, "weight of the unlabelled loss", low=0.0, search={"low": 0.1, "high": 2.0, "log": True}
    )


@dataclass(frozen=True)
class PseudoLabelOptions(SharpeningOptions):
    """What methods read whose pseudo-labels count over a threshold."""

    threshold: float = option(
        0.9, "smallest probability of a pseudo-label that trains", low=0.0, high=1.0, search={"low": 0.5, "high": 0.98}
    )


@dataclass(frozen=True)
class RunningOptions:
    """What methods read that follow the distribution of their pseudo-labels."""

    rho: float = option(0.9, "momentum of the running pseudo-label distribution P", low=0.0, high=0.9999)


class Method(Protocol):
    """The parts of training that differ between methods; the loop, sampling and optimiser are not theirs.

    Attributes:
        trains: whether the loop's steps are run; a closed form needs none.
        uses_labels: whether it learns from labelled images.
        uses_texts: whether texts of the classes are of use to it; most heads start from them.
        uses_unlabeled: whether unlabelled images are drawn into mini-batches.
        uses_pool: whether :meth:`refresh` is called.
        uses_unlabeled_pool: whether :meth:`refresh` reads unlabelled images.
        thresholds: whether pseudo-labels count only over `threshold`; False where all of them train, by weight.
        takes_tokens: whether features are touched through the adapter alone, so that it may sit in the encoder.
    """

    trains: bool = True
    uses_labels: bool = True
    uses_texts: bool = True
    uses_unlabeled: bool = True
    uses_pool: bool = False
    uses_unlabeled_pool: bool = False
    thresholds: bool = True
    takes_tokens: bool = False

    # -- before training

    def split(self, cache: FeatureCache, config: FitConfig) -> Split | None:
        """A split that the config names by an option of the method; None to draw the protocol's."""
        return None

    def check(self, cache: FeatureCache, config: FitConfig, split: Split) -> None:
        """Refuse a trial that lacks what the method needs.

        Raises:
            InputError: says what is missing and what to do.
        """
        return

    def prepare(self, cache: FeatureCache, config: FitConfig, split: Split) -> Split:
        """The split that the method trains on, with what it adds to `extra`."""
        return split

    def inputs(self, cache: FeatureCache, splits: Sequence[Split], device: torch.device) -> Inputs:
        """What the method reads beside features and labels; see :class:`Inputs`."""
        return Inputs()

    def batches(self, source: BatchSource) -> BatchSource:
        """What draws the mini-batches."""
        return source

    def rows_together(self, split: Split) -> int:
        """How many labelled rows are always drawn together; trials of one trial batch agree in it."""
        return 1

    def heads(self, config: FitConfig) -> int:
        """How many linear heads it trains, to count memory."""
        return 1

    def pool_values(self, config: FitConfig, images: int, views: int, dim: int, classes: int) -> int:
        """Numbers of float32 that :meth:`refresh` holds at most for so many training images, to count memory."""
        return 2 * images * ((2 * views + 6) * dim + 8 * classes) + 8 * dim * dim

    # -- training

    def start(self, trials: Trials) -> State:
        """Tensors before the first step; "linear" or "prototypes" (T, K, D) is always among them."""
        ...

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Look at all training images: before the first step and after every `eval_every` steps."""
        return

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Losses of a mini-batch, with gradients to the parameters."""
        zero = trials.zeros()
        return Losses(zero, zero, zero)

    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Move the memory after the optimiser's step."""
        return

    def fused(self, trials: Trials, state: State) -> type[FusedStep] | None:
        """The same step without an autograd graph, where there is one.

        It stands for the losses of the very class that names it: a method that inherits and changes them has none.
        """
        return None

    def drawn(self, trials: Trials, state: State) -> Tensor | None:
        """Probabilities (T, N, K) given to the pool's unlabelled images; None to take :meth:`pseudo_logits`."""
        return None

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Logits (T, B, K) that pseudo-labels are drawn from, for unit features (T, B, D); those of the prediction."""
        return self.logits(trials, tensors, features)

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Logits (T, B, K) of the prediction, for unit features (T, B, D)."""
        ...
