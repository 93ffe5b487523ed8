"""The types that methods and engine share: trials, mini-batches, training images, state and losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from ulfine_fast.config import FitConfig
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.heads import Tensors, frozen_end, new_adapter
from ulfine_fast.ops.losses import PseudoLabels
from ulfine_fast.related.label_proportions.bags import PaddedBags


@dataclass(frozen=True)
class Trials:
    """T trials of one pass.

    Attributes:
        config: any one of their configs; only its structural fields may be read.
        values: per-trial hyper-parameters by name, float32 (T,).
        seeds: int64 (T,).
        prototypes: unit textual prototypes each trial starts from (T, K, D).
        log_prior: log class frequencies of the labelled training images (T, K).
        head: what the encoder does to its class token last, see :func:`ulfine_fast.core.heads.frozen_end`; of no trial
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
    no unlabelled images or a trial has none. With `bags` the labelled rows are the images of G bags, B = G m, and
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
    """All training images of T trials at once, for methods that look at more than a mini-batch.

    Trials of different size are padded: padding has label -1, presence False, and the features of some other image.

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
        """Plain unit features of the labelled images (T, L, D)."""
        return self.features.rows(self.labeled_rows)

    @property
    def labeled_views(self) -> Tensor:
        """All cached views of the labelled images (T, L, V, D): plain, weak, strong."""
        return self.features.all_views(self.labeled_rows)

    @property
    def unlabeled_views(self) -> Tensor:
        """All cached views of the unlabelled images (T, N, V, D): plain, weak, strong."""
        return self.features.all_views(self.unlabeled_rows)

    @property
    def unlabeled(self) -> Tensor:
        """Plain unit features of the unlabelled images (T, N, D)."""
        return self.features.rows(self.unlabeled_rows)


@dataclass
class State:
    """What T trials have learned: parameters get gradients, memory is moved by the method itself.

    Scratch is memory that training needs and prediction does not, such as one value per unlabelled image; it is not
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
