"""The abstract method: the tensors that it trains, its losses, and what it keeps between steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ulfine_fast.config import FitConfig, option
from ulfine_fast.core.batches import BatchSource
from ulfine_fast.core.fused.step import FusedStep
from ulfine_fast.core.heads import Tensors
from ulfine_fast.core.types import Batch, Inputs, Losses, Pool, State, Trials
from ulfine_fast.data.splits import Split
from ulfine_fast.ops.transport import HELD_VALUES

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache


@dataclass(frozen=True)
class LabeledOptions:
    """Options of methods with a logit-adjusted labelled loss."""

    tau: float = option(
        1.0,
        "strength of the logit adjustment on labelled images; 0 is plain cross-entropy",
        low=0.0,
        search={"low": 0.0, "high": 2.0},
    )


@dataclass(frozen=True)
class SharpeningOptions:
    """Options of methods with a loss on unlabelled images."""

    sharpen: float = option(1.0, "temperature dividing the logits of pseudo-labels", low=0.01)
    lambda_u: float = option(
        0.5, "weight of the unlabelled loss", low=0.0, search={"low": 0.1, "high": 2.0, "log": True}
    )


@dataclass(frozen=True)
class PseudoLabelOptions(SharpeningOptions):
    """Options of methods whose pseudo-labels train over a threshold."""

    threshold: float = option(
        0.9, "smallest probability of a pseudo-label that trains", low=0.0, high=1.0, search={"low": 0.5, "high": 0.98}
    )


@dataclass(frozen=True)
class RunningOptions:
    """Options of methods that follow the distribution of their pseudo-labels."""

    rho: float = option(0.9, "momentum of the running pseudo-label distribution P", low=0.0, high=0.9999)


@dataclass(frozen=True)
class RunningAdjustmentOptions:
    """Options of methods whose pseudo-labels are adjusted by their own distribution."""

    tau_u: float = option(
        2.0,
        "strength of the adjustment by the running pseudo-label distribution P",
        low=0.0,
        search={"low": 0.0, "high": 2.5},
    )


@dataclass(frozen=True)
class BalancedVotesOptions:
    """Options of methods whose labelled images vote, without training."""

    tau: float = option(
        1.0,
        "power of the weights that count rare classes' labelled images more; 0 is one-hot",
        low=0.0,
        search={"low": 0.5, "high": 2.0},
    )


@dataclass(frozen=True)
class LikelihoodOptions:
    """Options of methods with Gaussians of labelled and unlabelled images."""

    labeled_weight: float = option(
        10.0,
        "unlabelled images that a labelled one counts for in the Gaussians",
        low=0.0,
        search={"low": 1.0, "high": 30.0, "log": True},
    )
    likelihood_temperature: float = option(
        10.0,
        "what divides log-likelihoods; 1 takes the dimensions for independent",
        low=0.01,
        search={"low": 1.0, "high": 100.0, "log": True},
    )


class Method(ABC):
    """The parts of training that differ between methods; the loop, sampling and optimiser are the engine's.

    A method has no state of its own: what it learns is in a :class:`State`.

    Attributes:
        trains: whether steps are made; a closed form needs none.
        uses_labels: whether it learns from labelled images.
        uses_texts: whether it reads texts of the classes; most heads start from them.
        uses_unlabeled: whether unlabelled images are drawn into mini-batches.
        uses_pool: whether :meth:`refresh` is called.
        uses_unlabeled_pool: whether :meth:`refresh` reads unlabelled images.
        uses_threshold: whether pseudo-labels train only over `threshold`; False where all train, by weight.
        calibrates: whether its probabilities are calibrated by itself, so that no temperature is fitted on validation.
        takes_tokens: whether it reads features through the adapter alone, so that the adapter may be in the encoder.
        takes_second: whether it reads features of two encoders side by side, see `cache.two_encoders.beside`.
        not_read: options that only another way of fitting it reads, see :meth:`of`; sweeps do not try them by default.
    """

    trains: bool = True
    uses_labels: bool = True
    uses_texts: bool = True
    uses_unlabeled: bool = True
    uses_pool: bool = False
    uses_unlabeled_pool: bool = False
    uses_threshold: bool = True
    calibrates: bool = False
    takes_tokens: bool = False
    takes_second: bool = False
    not_read: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: FitConfig) -> Method:
        """The method of a trial; one that can be fitted in several ways has a class for each."""
        return cls()

    # -- before training

    def split(self, cache: FeatureCache, config: FitConfig) -> Split | None:
        """The split that options of the method name; None to draw one by the protocol."""
        return None

    def check(self, cache: FeatureCache, config: FitConfig, split: Split) -> None:
        """Refuse a trial that lacks what the method needs.

        Raises:
            InputError: says what is missing and how to fix it.
        """
        return

    def prepare(self, cache: FeatureCache, config: FitConfig, split: Split) -> Split:
        """The split that the method trains on, with what it adds to `extra`."""
        return split

    def inputs(self, cache: FeatureCache, splits: Sequence[Split], device: torch.device) -> Inputs:
        """What the method reads beside features and labels."""
        return Inputs()

    def batches(self, source: BatchSource) -> BatchSource:
        """The source of mini-batches, for methods with mini-batches of another kind."""
        return source

    def rows_together(self, split: Split) -> int:
        """How many labelled rows are always drawn together; the same for all trials of a trial batch."""
        return 1

    def heads(self, config: FitConfig) -> int:
        """How many linear heads it trains, to estimate memory."""
        return 1

    def pool_values(self, config: FitConfig, images: int, views: int, dim: int, classes: int) -> int:
        """How many float32 values :meth:`refresh` holds at most for so many training images, to estimate memory."""
        return 2 * images * ((2 * views + 6) * dim + 8 * classes) + 8 * dim * dim

    # -- training

    @abstractmethod
    def start(self, trials: Trials) -> State:
        """Tensors before the first step; "linear" or "prototypes" (T, K, D) is always among them."""

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Read all training images: before the first step and after every `eval_every` steps."""
        return

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Losses of a mini-batch, with gradients to the parameters."""
        return Losses.labeled_only(trials.zeros())

    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Move the memory after the optimiser's step."""
        return

    def fused(self, trials: Trials, state: State) -> type[FusedStep] | None:
        """The same step without autograd, where there is one.

        It has the losses of the class that returns it: a method that inherits and changes them must return None.
        """
        return None

    def pool_probabilities(self, trials: Trials, state: State) -> Tensor | None:
        """Class probabilities (T, N, K) of the pool's unlabelled images; None to take :meth:`pseudo_logits`."""
        return None

    def evidence(self, trials: Trials, state: State) -> Tensors:
        """What the method says of its own fit, for the metrics: tensors (T, ...) by name."""
        return {}

    def held_out(self, trials: Trials, state: State) -> Tensors:
        """The labelled images as fits without them see them, where the method has folds.

        Returns:
            "probabilities", calibrated, of each image's own class, and "scores", the log-sum-exp of
            :meth:`known_logits`; both (T, L), NaN for images that no fit was without. Empty for methods without folds.
        """
        return {}

    def threshold(self, trials: Trials) -> Tensor:
        """Smallest probability (T,) with which pseudo-labels count in their metrics; 0 where all predictions do."""
        by_threshold = self.uses_unlabeled and self.uses_threshold
        return trials.values.get("threshold", trials.zeros()) if by_threshold else trials.zeros()

    def temperature(self, trials: Trials) -> Tensor | None:
        """What divides :meth:`pseudo_logits` (T,); None for 1."""
        return trials.values.get("sharpen")

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Logits (T, B, K) of pseudo-labels, for unit features (T, B, D); by default those of the prediction."""
        return self.logits(trials, tensors, features)

    @abstractmethod
    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Logits (T, B, K) of the prediction, for unit features (T, B, D)."""

    def known_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Logits (T, B, K) that are large only for images like those of the class, for unit features (T, B, D).

        Their log-sum-exp says how much an image looks like any known class. By default those of the prediction, which
        do unless they are log-probabilities.
        """
        return self.logits(trials, tensors, features)


class StreamedMethod(Method):
    """A method without training steps that reads all training images chunk by chunk and keeps sums for each class."""

    uses_unlabeled_pool = True
    trains = False
    uses_unlabeled = False
    uses_pool = True
    uses_threshold = False

    def pool_values(self, config: FitConfig, images: int, views: int, dim: int, classes: int) -> int:
        """A chunk of images, the scores that are held between passes, and sums for each class."""
        chunk = min(images * (dim + classes), 1 << 21)
        return 6 * chunk + 2 * min(images * classes, HELD_VALUES) + 16 * classes * dim
