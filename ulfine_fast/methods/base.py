"""What a method is: the tensors that it trains, its losses, and what it keeps between steps."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ulfine_fast.core.fused.step import FusedStep
from ulfine_fast.core.heads import Tensors
from ulfine_fast.core.types import Batch, Losses, Pool, State, Trials


class Method(Protocol):
    """The parts of training that differ between methods; the loop, sampling and optimiser are not theirs.

    Attributes:
        trains: whether the loop's steps are run; a closed form needs none.
        uses_unlabeled: whether unlabelled images are drawn into mini-batches.
        uses_pool: whether :meth:`refresh` is called.
        uses_bags: whether bags of images are drawn into mini-batches, in the place of labelled images.
        thresholds: whether pseudo-labels count only over `threshold`; False where all of them train, by weight.
        takes_tokens: whether features are touched through the adapter alone, so that it may sit in the encoder.
        before_projection: whether the head may classify what the encoder has before its projection.
    """

    trains: bool = True
    uses_unlabeled: bool = True
    uses_pool: bool = False
    uses_bags: bool = False
    thresholds: bool = True
    takes_tokens: bool = False
    before_projection: bool = False

    def start(self, trials: Trials) -> State:
        """Tensors before the first step; "linear" or "prototypes" (T, K, D) is always among them."""
        ...

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Look at all training images: before the first step and after every `eval_every` steps."""
        return
        return

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Losses of a mini-batch, with gradients to the parameters."""
        zero = torch.zeros_like(trials.values["tau"])
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
