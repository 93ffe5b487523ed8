"""The types that methods and engine share: trials, mini-batches, training images, state and losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ulfine_fast.config import FitConfig
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.heads import Tensors, frozen_end, new_adapter
from ulfine_fast.core.selection import SHARED, select_trials
from ulfine_fast.ops.clustering import RowChunks
from ulfine_fast.ops.losses import PseudoLabels

Report = Callable[[float], None]
"""Gets the fraction of a work that is done."""


def unheard(fraction: float) -> None:
    """The report of a work whose progress is not shown."""


@dataclass(frozen=True)
class Inputs:
    """What a method reads beside features and labels, see `Method.inputs`.

    Attributes:
        per_trial: values with a leading trials axis, by name.
        shared: tensors that all trials share, by name.
    """

    per_trial: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict, metadata=SHARED)


@dataclass(frozen=True)
class Trials:
    """T trials of one trial batch.

    Attributes:
        config: of one of them; only structural options may be read from it.
        values: numeric options of each trial by name, float32 (T,).
        seeds: int64 (T,).
        prototypes: unit textual prototypes that each trial starts from (T, K, D).
        log_prior: log class frequencies of the labelled training images (T, K).
        head: the end of the encoder, see :func:`ulfine_fast.core.heads.frozen_end`; all trials share it, and it is
            empty where features are read.
        inputs: what the method reads beside these.
    """

    config: FitConfig = field(metadata=SHARED)
    values: dict[str, Tensor]
    seeds: Tensor
    prototypes: Tensor
    log_prior: Tensor
    head: Mapping[str, Tensor] = field(default_factory=dict, metadata=SHARED)
    inputs: Inputs = field(default_factory=Inputs)

    def part(self, start: int, stop: int) -> Trials:
        """Trials [start, stop) alone, sharing memory with these."""
        return select_trials(self, slice(start, stop))

    def zeros(self) -> Tensor:
        """A zero for each trial (T,)."""
        return self.log_prior.new_zeros(len(self.log_prior))

    def adapter(self) -> tuple[Tensors, Tensors]:
        """A new adapter: its parameters, and the frozen tensors of the encoder that it needs; both may be empty."""
        if self.config.adapter == "none":
            return {}, {}
        seeds, ranks = self.seeds, self.values["rank"]
        if not self.config.reads_tokens:
            return new_adapter(seeds, self.prototypes.shape[-1], ranks), {}
        return new_adapter(seeds, len(self.head["projection"]), ranks), frozen_end(self.head, len(seeds))


@dataclass(frozen=True)
class Batch:
    """A mini-batch of unit features.

    Methods with mini-batches of another kind extend it.

    Attributes:
        labeled: labelled rows (T, B, D).
        labels: their classes (T, B).
        weak: weak views of unlabelled rows (T, U, D); None where the method uses none or a trial has none.
        strong: strong views of the same rows (T, U, D), likewise.
        positions: where the unlabelled rows are in the :class:`Pool` (T, U), likewise.
    """

    labeled: Tensor
    labels: Tensor
    weak: Tensor | None = None
    strong: Tensor | None = None
    positions: Tensor | None = None


@dataclass(frozen=True)
class Pool:
    """All training images of T trials, for methods that read more than a mini-batch.

    Trials of different size are padded: padding has label -1, presence False, and the features of some other image.

    Attributes:
        features: the cache's features on the device.
        labeled_rows: rows of the cache (T, L).
        labels: int64 (T, L), -1 for padding.
        unlabeled_rows: rows of the cache (T, N).
        present: bool (T, N), False for padding.
        report: to be called with the fraction of the work done, where reading the pool takes long.
    """

    features: DeviceFeatures
    labeled_rows: Tensor
    labels: Tensor
    unlabeled_rows: Tensor
    present: Tensor
    report: Report = unheard

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

    @property
    def labeled_chunks(self) -> RowChunks:
        """Plain unit features of the labelled images, gathered chunk by chunk."""
        return RowChunks(self.labels >= 0, lambda first, last: self.features.rows(self.labeled_rows[:, first:last]))

    @property
    def unlabeled_chunks(self) -> RowChunks:
        """Plain unit features of the unlabelled images, gathered chunk by chunk."""
        return RowChunks(self.present, lambda first, last: self.features.rows(self.unlabeled_rows[:, first:last]))


@dataclass
class State:
    """What T trials have learned: tensors (T, ...) by name.

    Attributes:
        parameters: get gradients.
        memory: moved by the method itself.
        scratch: what training needs and prediction does not, such as a value for each unlabelled image; not saved with
            the run.
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
        return select_trials(self, slice(start, stop))


class Losses(NamedTuple):
    """Losses of each trial (T,), weighted by the method; the loop minimises their sum.

    Attributes:
        labeled: of the labelled rows.
        unlabeled: of the unlabelled rows.
        regularizer: of neither.
        pseudo: the mini-batch's pseudo-labels, for the method's use after the step.
        adapted: labelled rows (T, B, D) as the heads saw them, likewise.
    """

    labeled: Tensor
    unlabeled: Tensor
    regularizer: Tensor
    pseudo: PseudoLabels | None = None
    adapted: Tensor | None = None

    @classmethod
    def labeled_only(cls, labeled: Tensor) -> Losses:
        """The losses of a step on labelled rows alone."""
        zero = torch.zeros_like(labeled)
        return cls(labeled, zero, zero)
