"""The optimiser steps of a trial batch; those through autograd are the specification of the fused ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.core.batches import BatchSource
from ulfine_fast.core.fused.arithmetic import Arithmetic
from ulfine_fast.core.fused.blocks import FusedSteps
from ulfine_fast.core.types import Batch, State, Trials
from ulfine_fast.methods.base import Method
from ulfine_fast.ops import native
from ulfine_fast.ops.sgd import cosine_rate, sgd_step

ENGINES = ("auto", "fused", "native", "specification")


class Steps(Protocol):
    """The steps of a trial batch.

    Attributes:
        parts: how many items of :meth:`run` make one step of all trials.
    """

    parts: int

    def run(self, start: int, stop: int) -> Iterator[Tensor]:
        """Make steps [start, stop), yielding losses (3, T): labelled, unlabelled, regularizer.

        The sum of all items is the sum over the steps; a trial without a part in an item has zeros in it.
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
    """The steps of a trial batch, by the chosen engine.

    Parameters and velocities may be replaced by other tensors of the same names and shapes. When trials leave a trial
    batch, it needs a new stepper.

    Args:
        method: of the trial batch.
        trials: of the trial batch.
        state: of the trial batch.
        velocity: momentum buffers by the names of `state.parameters`.
        batches: the mini-batches.
        steps: length of the schedule.
        engine: see :func:`ulfine_fast.fit_many`.
        threads: whether cores work on different trials; otherwise all is computed in the calling thread.

    Raises:
        InputError: the engine is "fused" or "native" and the method, its features or the precision allow no fused step;
            or it is "native" and passes cannot be compiled, or run on another device.
    """
    config = trials.config
    # the fused steps read features, and have no autocast
    possible = engine != "specification" and config.precision != "amp" and not config.reads_tokens
    fused = method.fused(trials, state) if possible else None
    if fused is not None:
        if engine == "native":
            _check_native(trials.seeds.device)
        arithmetic = Arithmetic(compiled=engine == "native", bfloat16=config.precision == "bf16")
        return FusedSteps(fused, trials, state, velocity, batches, steps, threads, arithmetic=arithmetic)
    if config.precision == "bf16" and engine == "auto":
        raise InputError(f"precision bf16 needs a fused step, which method {config.method} has not; use float32 or amp")
    if engine in ("fused", "native") or config.precision == "bf16":
        tokens = f" with {config.reads_tokens_for}" if config.reads_tokens else ""
        raise InputError(
            f"method {config.method}{tokens} at precision {config.precision} has no fused step; use engine auto"
        )
    return AutogradSteps(method, trials, state, velocity, batches, steps)


def _check_native(device: torch.device) -> None:
    if device.type != "cpu":
        raise InputError(f"engine native is one of processors, this device is {device.type}; use engine fused")
    reason = native.why_not()
    if reason is not None:
        raise InputError(reason)
