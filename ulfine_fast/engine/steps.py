"""One optimiser step of a trial batch: through autograd, which is the specification of every faster path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.core.batches import BatchSource
from ulfine_fast.core.fused.blocks import FusedSteps
from ulfine_fast.core.types import Batch, State, Trials
from ulfine_fast.methods.base import Method
from ulfine_fast.ops.sgd import cosine_rate, sgd_step

ENGINES = ("auto", "fused", "specification")


class Steps(Protocol):
    """The steps of a trial batch.

    Attributes:
        parts: how many yields of :meth:`run` make one step of all trials.
    """

    parts: int

    def run(self, start: int, stop: int) -> Iterator[Tensor]:
        """Make steps [start, stop), yielding losses (3, T) as they come: labelled, unlabelled, regularizer.

        Yields are to be summed; a trial that had no part in one has zeros there.
        """
        ...


class AutogradSteps:
    """Steps by a method's losses, their gradients through autograd, and SGD.

    Args:
        method: of the trial batch.
        trials: of the trial batch.
        state: of the trial batch, updated in place.
        velocity: momentum buffers by the names of `state.parameters`, updated in place.
        batches: the mini-batches.
        steps: length of the schedule.
    """

    parts = 1

    def __init__(
        self,
        method: Method,
        trials: Trials,
        state: State,
        velocity: dict[str, Tensor],
        batches: BatchSource,
        steps: int,
    ) -> None:
        self.method = method
        self.trials = trials
        self.state = state
        self.velocity = velocity
        self.batches = batches
        self.steps = steps
        for tensor in state.parameters.values():
            tensor.requires_grad_(True)

    def run(self, start: int, stop: int) -> Iterator[Tensor]:
        """Make steps [start, stop), yielding the losses (3, T) of each."""
        for step, batch in self.batches.draw(start, stop):
            yield self._step(step, batch)

    def _step(self, step: int, batch: Batch) -> Tensor:
        values = self.trials.values
        with self._autocast():
            losses = self.method.losses(self.trials, self.state, batch)
        ramp = (((step + 1) / self.steps) / values["warmup"].clamp(min=1e-9)).clamp(max=1.0)
        (losses.labeled + ramp * losses.unlabeled + losses.regularizer).sum().backward()
        rate = values["lr"] * cosine_rate(step, self.steps)
        sgd_step(self.state.parameters, self.velocity, rate, values["momentum"], values["weight_decay"])
        self.method.after_step(self.trials, self.state, batch, losses)
        return torch.stack([losses.labeled, losses.unlabeled, losses.regularizer]).detach().float()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.trials.config.precision == "amp":
            return torch.autocast(self.trials.seeds.device.type, torch.bfloat16)
        return nullcontext()


def make_stepper(
    method: Method,
    trials: Trials,
    state: State,
    velocity: dict[str, Tensor],
    batches: BatchSource,
    steps: int,
    engine: str,
    *,
    threads: bool = True,
) -> Steps:
    """The steps of a trial batch by the engine that was asked for, see :func:`ulfine_fast.fit_many`.

    `threads` lets cores work on different trials; without it all is computed in the calling thread.

    Parameters and velocities may be replaced by other tensors of the same names and shapes. When trials leave a trial
    batch, its steps are made anew.

    Raises:
        InputError: the engine is "fused" and the method has no such step, or half precision is asked of it.
    """
    # tokens of the encoder's last block go through autograd
    by_hand = engine != "specification" and trials.config.precision == "float32" and not trials.config.reads_tokens
    fused = method.fused(trials, state) if by_hand else None
    if fused is not None:
        return FusedSteps(fused, trials, state, velocity, batches, steps, threads)
    if engine == "fused":
        config = trials.config
        inside = f" with {config.reads_tokens_for}" if config.reads_tokens else ""
        raise InputError(
            f"method {config.method}{inside} at precision {config.precision} has no fused step; use engine auto"
        )
    return AutogradSteps(method, trials, state, velocity, batches, steps)
