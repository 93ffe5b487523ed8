"""What a method is: the tensors it trains, its losses, and what it keeps between steps. One small file per method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from ulfine_fast.config import FitConfig
from ulfine_fast.heads import Tensors
from ulfine_fast.ops.losses import PseudoLabels


@dataclass(frozen=True)
class Trials:
    """T trials of one pass.

    Attributes:
        config: any one of their configs; only its structural fields may be read.
        values: per-trial hyper-parameters by name, float32 (T,).
        seeds: int64 (T,).
        prototypes: unit textual prototypes each trial starts from (T, K, D).
        log_prior: log class frequencies of the labelled training pictures (T, K).
    """

    config: FitConfig
    values: dict[str, Tensor]
    seeds: Tensor
    prototypes: Tensor
    log_prior: Tensor


class Batch(NamedTuple):
    """A mini-batch of unit features: labelled (T, B, D) with labels (T, B), and two views of unlabelled ones (T, U, D).

    `weak` and `strong` are None where the method uses no unlabelled pictures or a trial has none.
    """

    labeled: Tensor
    labels: Tensor
    weak: Tensor | None
    strong: Tensor | None


@dataclass
class State:
    """What T trials have learned: parameters get gradients, memory is moved by the method itself."""

    parameters: Tensors
    memory: Tensors = field(default_factory=dict)

    @property
    def tensors(self) -> Tensors:
        """Parameters and memory together, by name; each of shape (T, ...)."""
        return {**self.parameters, **self.memory}


class Losses(NamedTuple):
    """Losses of each trial (T,), weighted by the method; the loop minimises their sum."""

    labeled: Tensor
    unlabeled: Tensor
    regularizer: Tensor
    pseudo: PseudoLabels | None = None


class Method(Protocol):
    """The parts of training that differ between methods; the loop, sampling and optimiser are not theirs."""

    trains: bool
    uses_unlabeled: bool

    def start(self, trials: Trials) -> State:
        """Tensors before the first step."""
        ...

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Losses of a mini-batch, with gradients to the parameters."""
        ...

    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Move the memory after the optimiser's step."""
        ...

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Logits (T, B, K) that pseudo-labels are drawn from, for unit features (T, B, D)."""
        ...

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Logits (T, B, K) of the prediction, for unit features (T, B, D)."""
        ...


def method_of(config: FitConfig) -> Method:
    """The method a config names."""
    from ulfine_fast.methods.lightweight import Lightweight
    from ulfine_fast.methods.linear_probe import LinearProbe
    from ulfine_fast.methods.ulfine import ULFine
    from ulfine_fast.methods.zero_shot import ZeroShot

    methods: dict[str, type[Method]] = {
        "zero_shot": ZeroShot,
        "linear_probe": LinearProbe,
        "lightweight": Lightweight,
        "ulfine": ULFine,
    }
    return methods[config.method]()
