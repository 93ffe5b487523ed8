"""What a method is: the tensors it trains, its losses, and what it keeps between steps. One small file per method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ulfine_fast.bags import PaddedBags
from ulfine_fast.cache.errors import InputError
from ulfine_fast.config import FitConfig
from ulfine_fast.features import DeviceFeatures
from ulfine_fast.heads import Tensors, adapt, frozen_end, new_adapter
from ulfine_fast.ops.losses import PseudoLabels

if TYPE_CHECKING:
    from ulfine_fast.fused import FusedStep


@dataclass(frozen=True)
class Trials:
    """T trials of one pass.

    Attributes:
        config: any one of their configs; only its structural fields may be read.
        values: per-trial hyper-parameters by name, float32 (T,).
        seeds: int64 (T,).
        prototypes: unit textual prototypes each trial starts from (T, K, D).
        log_prior: log class frequencies of the labelled training pictures (T, K).
        head: what the encoder does to its class token last, see :func:`ulfine_fast.heads.frozen_end`; of no trial
            alone, and empty where features are read.
        texts: features of the class names in each prompt (P, K, D), each as long as the encoder scales cosines, of no
            trial alone; None without texts.
    """

    config: FitConfig
    values: dict[str, Tensor]
    seeds: Tensor
    prototypes: Tensor
    log_prior: Tensor
    head: Mapping[str, Tensor] = field(default_factory=dict)
    texts: Tensor | None = None

    def at(self, index: Tensor | slice) -> Trials:
        """The trials at these places alone."""
        return replace(
            self,
            values={name: value[index] for name, value in self.values.items()},
            seeds=self.seeds[index],
            prototypes=self.prototypes[index],
            log_prior=self.log_prior[index],
        )

    def part(self, start: int, stop: int) -> Trials:
        """Trials [start, stop) alone, sharing memory with these."""
        return self.at(slice(start, stop))

    def adapter(self) -> tuple[Tensors, Tensors]:
        """A new adapter of the configured kind: what it learns, and what of the encoder it needs; both may be empty."""
        if self.config.adapter == "none":
            return {}, {}
        seeds, ranks = self.seeds, self.values["rank"]
        if not self.config.reads_tokens:
            return new_adapter(seeds, self.prototypes.shape[-1], ranks), {}
        return new_adapter(seeds, len(self.head["projection"]), ranks), frozen_end(self.head, len(seeds))


class BagBatch(NamedTuple):
    """Bags of a mini-batch: where they stand in the :class:`Pool` (T, G), class shares (T, G, K).

    `present` (T, G, m) is False for padding.
    """

    places: Tensor
    present: Tensor
    shares: Tensor


class Batch(NamedTuple):
    """A mini-batch of unit features: labelled (T, B, D) with labels (T, B), and two views of unlabelled ones (T, U, D).

    `places` (T, U) says where the unlabelled ones stand in the :class:`Pool`. All three are None where the method uses
    no unlabelled pictures or a trial has none. With `bags` the labelled rows are the pictures of G bags, B = G m, and
    every label is -1.
    """

    labeled: Tensor
    labels: Tensor
    weak: Tensor | None = None
    strong: Tensor | None = None
    places: Tensor | None = None
    bags: BagBatch | None = None


@dataclass(frozen=True)
class Pool:
    """All training pictures of T trials at once, for methods that look at more than a mini-batch.

    Trials of different size are padded: padding has label -1, presence False, and the features of some other picture.

    Attributes:
        features: the cache's features on the device.
        labeled_rows: rows of the cache (T, L). labels: int64 (T, L), -1 for padding.
        unlabeled_rows: (T, N). present: bool (T, N), False for padding.
        bags: for methods that use them, else None.
    """

    features: DeviceFeatures
    labeled_rows: Tensor
    labels: Tensor
    unlabeled_rows: Tensor
    present: Tensor
    bags: PaddedBags | None = None

    @property
    def labeled(self) -> Tensor:
        """Plain unit features of the labelled pictures (T, L, D)."""
        return self.features.rows(self.labeled_rows)

    @property
    def labeled_views(self) -> Tensor:
        """All cached views of the labelled pictures (T, L, V, D): plain, weak, strong."""
        return self.features.all_views(self.labeled_rows)

    @property
    def unlabeled_views(self) -> Tensor:
        """All cached views of the unlabelled pictures (T, N, V, D): plain, weak, strong."""
        return self.features.all_views(self.unlabeled_rows)

    @property
    def unlabeled(self) -> Tensor:
        """Plain unit features of the unlabelled pictures (T, N, D)."""
        return self.features.rows(self.unlabeled_rows)


@dataclass
class State:
    """What T trials have learned: parameters get gradients, memory is moved by the method itself.

    Scratch is memory that training needs and prediction does not, such as one value per unlabelled picture; it is not
    saved with the run.
    """

    parameters: Tensors
    memory: Tensors = field(default_factory=dict)
    scratch: Tensors = field(default_factory=dict)

    @property
    def tensors(self) -> Tensors:
        """Parameters and memory together, by name; each of shape (T, ...)."""
        return {**self.parameters, **self.memory}

    def part(self, start: int, stop: int) -> State:
        """The tensors of trials [start, stop) alone, sharing memory with these."""
        groups = (self.parameters, self.memory, self.scratch)
        return State(*({name: tensor[start:stop] for name, tensor in group.items()} for group in groups))


class Losses(NamedTuple):
    """Losses of each trial (T,), weighted by the method; the loop minimises their sum.

    `pseudo` and `adapted`, the labelled rows (T, B, D) as the heads saw them, are for the method's use after the step.
    """

    labeled: Tensor
    unlabeled: Tensor
    regularizer: Tensor
    pseudo: PseudoLabels | None = None
    adapted: Tensor | None = None


class Method(Protocol):
    """The parts of training that differ between methods; the loop, sampling and optimiser are not theirs.

    Attributes:
        trains: whether the loop's steps are run; a closed form needs none.
        uses_unlabeled: whether unlabelled pictures are drawn into mini-batches.
        uses_pool: whether :meth:`refresh` is called.
        uses_bags: whether bags of pictures are drawn into mini-batches, in the place of labelled pictures.
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
        """Look at all training pictures: before the first step and after every `eval_every` steps."""
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
        """Probabilities (T, N, K) given to the pool's unlabelled pictures; None to take :meth:`pseudo_logits`."""
        return None

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Logits (T, B, K) that pseudo-labels are drawn from, for unit features (T, B, D); those of the prediction."""
        return self.logits(trials, tensors, features)

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Logits (T, B, K) of the prediction, for unit features (T, B, D)."""
        ...


def run_logits(trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
    """Logits (T, B, K) of fitted runs: their method's, or those of a realigned run (:mod:`ulfine_fast.realign`).

    A realigned run may hold "realigned.weight" (T, K, D), an affine head in the place of the cosine head, and
    "realigned.bias" (T, K).
    """
    if "realigned.weight" in tensors:
        adapted = adapt(tensors, features, trials.values["adapter_scale"])
        logits = adapted @ tensors["realigned.weight"].transpose(1, 2)
    else:
        logits = method_of(trials.config).logits(trials, tensors, features)
    return logits + tensors["realigned.bias"].unsqueeze(1) if "realigned.bias" in tensors else logits


def method_of(config: FitConfig) -> Method:
    """The method a config names.

    Raises:
        InputError: a method that takes no ensemble of heads is given one.
    """
    # every method imports this module
    from ulfine_fast.methods import channel_ensemble
    from ulfine_fast.methods.catalog import CLASSES

    if not config.ensemble_heads:
        return CLASSES[config.method]()
    if config.method not in channel_ensemble.CLASSES:
        takers = ", ".join(channel_ensemble.CLASSES)
        raise InputError(
            f"method {config.method} takes no ensemble and ensemble_heads is {config.ensemble_heads}; set it to 0, or "
            f"take one of {takers}"
        )
    return channel_ensemble.CLASSES[config.method]()
