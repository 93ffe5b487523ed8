"""Mini-batches of T trials: which rows and which views, drawn from (seed, step, purpose) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ulfine_fast.config import FitConfig
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.selection import SHARED, select_trials
from ulfine_fast.core.types import Batch, Trials
from ulfine_fast.data.splits import Rows
from ulfine_fast.ops.crops import choose_crops, smallest_crop
from ulfine_fast.ops.philox import Purpose, integers, normals, words
from ulfine_fast.ops.prototypes import normalize


@dataclass(frozen=True)
class PaddedRows:
    """Rows of one role for T trials.

    Attributes:
        index: rows of the cache, padded (T, N).
        count: how many of them are real (T,).
    """

    index: Tensor
    count: Tensor

    @classmethod
    def pad(cls, rows_of_trials: Sequence[Rows], device: torch.device) -> PaddedRows:
        """Pad with row 0; padding is never drawn, and its results are dropped."""
        longest = max(1, *(len(rows) for rows in rows_of_trials))
        index = np.zeros((len(rows_of_trials), longest), dtype=np.int64)
        for t, rows in enumerate(rows_of_trials):
            index[t, : len(rows)] = rows
        counts = torch.tensor([len(rows) for rows in rows_of_trials], device=device)
        return cls(torch.from_numpy(index).to(device), counts)

    @property
    def present(self) -> Tensor:
        """False for padding (T, N)."""
        return torch.arange(self.index.shape[1], device=self.index.device) < self.count.unsqueeze(1)

    def draw(self, seeds: Tensor, steps: Tensor, purpose: Purpose, size: int) -> tuple[Tensor, Tensor]:
        """Rows drawn with replacement and their positions in `index`, each of shape (S, T, size)."""
        positions = integers(seeds, steps, purpose, size, self.count.clamp(min=1))
        index = self.index.unsqueeze(0).expand(len(steps), -1, -1)
        return index.gather(2, positions), positions


class Draws(NamedTuple):
    """Which images and views one step takes.

    Attributes:
        labeled: slots of :meth:`DeviceFeatures.at` of the labelled rows (T, B).
        labels: their classes (T, B).
        weak: slots of the weak views (T, U).
        strong: slots of the strong views (T, U).
        positions: where the unlabelled rows are in the :class:`Pool` (T, U).
    """

    labeled: Tensor
    labels: Tensor
    weak: Tensor
    strong: Tensor
    positions: Tensor


@dataclass(frozen=True)
class BatchSource:
    """Draws the mini-batches of T trials.

    Attributes:
        labels: class that training sees for each labelled image (T, L).
        labeled: labelled rows of each trial.
        unlabeled: unlabelled rows of each trial.
        trials: seeds and noise lengths.
        features: all features on the device.
        config: batch sizes.
        pairs: whether unlabelled images are drawn at all.
    """

    labels: Tensor
    labeled: PaddedRows
    unlabeled: PaddedRows
    trials: Trials
    features: DeviceFeatures = field(metadata=SHARED)
    config: FitConfig = field(metadata=SHARED)
    pairs: bool = field(metadata=SHARED)

    @property
    def unlabeled_size(self) -> int:
        """Unlabelled images in a mini-batch; 0 where none are drawn."""
        return self.config.batch_unlabeled if self.pairs else 0

    def part(self, start: int, stop: int) -> BatchSource:
        """The mini-batches of trials [start, stop) alone."""
        return select_trials(self, slice(start, stop))

    def draws(self, start: int, stop: int) -> Iterator[tuple[int, Draws]]:
        """Rows and views of steps [start, stop); those of all steps are drawn together."""
        steps = torch.arange(start, stop, device=self.labels.device)
        features, seeds, size = self.features, self.trials.seeds, self.unlabeled_size

        # labelled rows: any plain or weak view
        labeled, positions = self.labeled.draw(seeds, steps, Purpose.LABELED, self.config.batch_labeled)  # (S, T, B)
        labels = self.labels.unsqueeze(0).expand(len(steps), -1, -1).gather(2, positions)
        labeled_slots = features.slots(labeled, self.labeled_views(labeled, steps))

        # unlabelled rows: a weak and a strong view of each
        unlabeled, positions = self.unlabeled.draw(seeds, steps, Purpose.UNLABELED, size)  # (S, T, U)
        weak_slots = features.slots(unlabeled, self._views(steps, Purpose.WEAK_VIEW, size, features.easy))
        strong_view = self._views(steps, Purpose.STRONG_VIEW, size, max(1, features.strong))
        # without strong views the plain one, view 0, replaces them
        strong_slots = features.slots(unlabeled, strong_view + (features.easy if features.strong else 0))

        tensors = (labeled_slots, labels, weak_slots, strong_slots, positions)
        for step, draws in enumerate(zip(*(tensor.unbind(0) for tensor in tensors), strict=True), start):
            yield step, Draws(*draws)

    def draw(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """Mini-batches of steps [start, stop), gathered."""
        for step, draws in self.draws(start, stop):
            labeled = self.noisy(self.features.at(draws.labeled), step, Purpose.LABELED_NOISE)  # (T, B, D)
            if not self.pairs:
                yield step, Batch(labeled, draws.labels)
                continue
            weak = self.features.at(draws.weak)  # (T, U, D)
            strong = self.noisy(self.features.at(draws.strong), step, Purpose.STRONG_NOISE)
            yield step, Batch(labeled, draws.labels, weak, strong, draws.positions)

    def labeled_views(self, rows: Tensor, steps: Tensor) -> Tensor:
        """View numbers of labelled rows, both (S, T, B): any plain or weak one, or one that is large enough."""
        features, epochs, size = self.features, self.trials.values["crop_epochs"], rows.shape[-1]
        view = self._views(steps, Purpose.LABELED_VIEW, size, features.easy)
        if not self.any_schedule or features.areas is None:
            return view
        drawn = words(self.trials.seeds, steps, Purpose.LABELED_VIEW, size)
        smallest = smallest_crop(steps, self.config.steps, epochs).unsqueeze(-1).expand_as(drawn)
        chosen = choose_crops(features.areas[features.position[rows]], smallest, drawn)
        # a trial without a schedule keeps its views, whatever its neighbours do
        return torch.where((epochs > 0).view(1, -1, 1), chosen, view)

    @cached_property
    def any_schedule(self) -> bool:
        """Whether some trial follows the schedule of crops."""
        return bool((self.trials.values["crop_epochs"] > 0).any())

    @cached_property
    def any_noise(self) -> bool:
        """Whether some trial adds noise to its training features."""
        # cached: reading a value from a GPU waits for all work before it
        return bool((self.trials.values["feature_noise"] > 0).any())

    def noisy(self, features: Tensor, step: int | Tensor, purpose: Purpose) -> Tensor:
        """Add Gaussian noise of expected length `feature_noise` to unit rows (T, B, D)."""
        if not self.any_noise:
            return features
        length = self.trials.values["feature_noise"]
        noise = normals(self.trials.seeds, step, purpose, features[0].numel()).view_as(features)
        shifted = normalize(features + noise * (length / features.shape[-1] ** 0.5).view(-1, 1, 1))
        # a trial without noise keeps its rows to the bit, whatever its neighbours do
        return torch.where((length > 0).view(-1, 1, 1), shifted, features)

    def _views(self, steps: Tensor, purpose: Purpose, size: int, views: int) -> Tensor:
        """View numbers (S, T, size) below `views`."""
        below = torch.full_like(self.trials.seeds, views)
        return integers(self.trials.seeds, steps, purpose, size, below)
