"""Mini-batches of T trials: which rows, which views, drawn from (seed, step, purpose) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ulfine_fast.config import FitConfig
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.types import BagBatch, Batch, Trials
from ulfine_fast.data.splits import Rows
from ulfine_fast.ops.crops import choose_crops, smallest_crop
from ulfine_fast.ops.philox import Purpose, integers, normals, words
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.related.label_proportions.bags import PaddedBags


@dataclass(frozen=True)
class PaddedRows:
    """Rows of one role for T trials: padded indices (T, N) and how many of them are real (T,)."""

    index: Tensor
    count: Tensor

    @classmethod
    def of(cls, roles: Sequence[Rows], device: torch.device) -> PaddedRows:
        """Pad with row 0; padding is never drawn, and its results are cut off."""
        longest = max(1, *(len(rows) for rows in roles))
        index = np.zeros((len(roles), longest), dtype=np.int64)
        for t, rows in enumerate(roles):
            index[t, : len(rows)] = rows
        counts = torch.tensor([len(rows) for rows in roles], device=device)
        return cls(torch.from_numpy(index).to(device), counts)

    @property
    def present(self) -> Tensor:
        """False for padding (T, N)."""
        return torch.arange(self.index.shape[1], device=self.index.device) < self.count.unsqueeze(1)

    def draw(self, seeds: Tensor, steps: Tensor, purpose: Purpose, size: int) -> tuple[Tensor, Tensor]:
        """Rows drawn with replacement and their places in `index`, each of shape (S, T, size)."""
        places = integers(seeds, steps, purpose, size, self.count.clamp(min=1))
        index = self.index.unsqueeze(0).expand(len(steps), -1, -1)
        return index.gather(2, places), places


class Draws(NamedTuple):
    """Which images and views one step takes.

    `labeled` (T, B), `weak` and `strong` (T, U) are slots of :meth:`DeviceFeatures.at`, `labels` (T, B) the classes of
    the labelled ones, `places` (T, U) where the unlabelled ones stand in the :class:`Pool`.
    """

    labeled: Tensor
    labels: Tensor
    weak: Tensor
    strong: Tensor
    places: Tensor


@dataclass(frozen=True)
class BatchSource:
    """Draws the mini-batches of T trials.

    Attributes:
        features: all features on the device. labels: class that each labelled image is told to have (T, L).
        labeled, unlabeled: rows of each trial. trials: seeds and noise lengths.
        config: batch sizes. pairs: whether to draw unlabelled images at all.
        bags: what is drawn in the place of labelled images, if any.
    """

    features: DeviceFeatures
    labels: Tensor
    labeled: PaddedRows
    unlabeled: PaddedRows
    trials: Trials
    config: FitConfig
    pairs: bool
    bags: PaddedBags | None = None

    @property
    def unlabeled_size(self) -> int:
        """Unlabelled images in a mini-batch; 0 where none are drawn."""
        return self.config.batch_unlabeled if self.pairs else 0

    def part(self, start: int, stop: int) -> BatchSource:
        """The mini-batches of trials [start, stop) alone."""
        labeled, unlabeled = (
            PaddedRows(rows.index[start:stop], rows.count[start:stop]) for rows in (self.labeled, self.unlabeled)
        )
        labels, trials = self.labels[start:stop], self.trials.part(start, stop)
        bags = None if self.bags is None else self.bags.at(slice(start, stop))
        return replace(self, labels=labels, labeled=labeled, unlabeled=unlabeled, trials=trials, bags=bags)

    def draws(self, start: int, stop: int) -> Iterator[tuple[int, Draws]]:
        """Rows and views of steps [start, stop); those of all steps are drawn at once."""
        steps = torch.arange(start, stop, device=self.labels.device)
        features, seeds, size = self.features, self.trials.seeds, self.unlabeled_size
        labeled, told = self.labeled.draw(seeds, steps, Purpose.LABELED, self.config.batch_labeled)  # (S, T, B)
        view = self._labeled_views(labeled, steps)
        hidden, places = self.unlabeled.draw(seeds, steps, Purpose.UNLABELED, size)  # (S, T, U)
        weak = features.slots(hidden, self._views(steps, Purpose.WEAK_VIEW, size, features.easy))
        strong_view = self._views(steps, Purpose.STRONG_VIEW, size, max(1, features.strong))
        # without strong views the plain one, view 0, stands in
        strong = features.slots(hidden, strong_view + (features.easy if features.strong else 0))
        labels = self.labels.unsqueeze(0).expand(len(steps), -1, -1).gather(2, told)
        drawn = features.slots(labeled, view), labels, weak, strong, places
        one_by_one = zip(*(tensor.unbind(0) for tensor in drawn), strict=True)
        for step, one in enumerate(one_by_one, start):
            yield step, Draws(*one)

    def draw(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """Mini-batches of steps [start, stop), gathered."""
        if self.bags is not None:
            yield from self._draw_bags(self.bags, start, stop)
            return
        for step, draws in self.draws(start, stop):
            features = self.noisy(self.features.at(draws.labeled), step, Purpose.LABELED_NOISE)  # (T, B, D)
            weak = strong = places = None
            if self.pairs:
                weak, places = self.features.at(draws.weak), draws.places  # (T, U, D)
                strong = self.noisy(self.features.at(draws.strong), step, Purpose.STRONG_NOISE)
            yield step, Batch(features, draws.labels, weak, strong, places)

    def _draw_bags(self, bags: PaddedBags, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """Mini-batches of whole bags: as many as make `batch_labeled` images, and at least one."""
        steps = torch.arange(start, stop, device=self.labels.device)
        count = max(1, self.config.batch_labeled // bags.index.shape[-1])
        places = integers(self.trials.seeds, steps, Purpose.LABELED, count, bags.count)  # (S, T, G)
        trial = torch.arange(len(bags.count), device=places.device).view(1, -1, 1)
        rows = bags.index[trial, places].flatten(2)  # (S, T, G m)
        slots = self.features.slots(rows, self._labeled_views(rows, steps))
        told = bags.present[trial, places], bags.shares[trial, places]
        for i, step in enumerate(range(start, stop)):
            features = self.noisy(self.features.at(slots[i]), step, Purpose.LABELED_NOISE)  # (T, G m, D)
            unknown = torch.full_like(slots[i], -1)
            yield step, Batch(features, unknown, bags=BagBatch(places[i], told[0][i], told[1][i]))

    @cached_property
    def any_schedule(self) -> bool:
        """Whether some trial follows the schedule of crops."""
        return bool((self.trials.values["crop_epochs"] > 0).any())

    @cached_property
    def any_noise(self) -> bool:
        """Whether some trial adds noise to its training features."""
        # asked once: on a GPU each look at a value waits for all the work before it
        return bool((self.trials.values["feature_noise"] > 0).any())

    def noisy(self, features: Tensor, step: int, purpose: Purpose) -> Tensor:
        """Add Gaussian noise of expected length `feature_noise` to unit rows (T, B, D)."""
        if not self.any_noise:
            return features
        length = self.trials.values["feature_noise"]
        noise = normals(self.trials.seeds, step, purpose, features[0].numel()).view_as(features)
        shifted = normalize(features + noise * (length / features.shape[-1] ** 0.5).view(-1, 1, 1))
        # a trial without noise keeps its rows to the bit, whoever its neighbours are
        return torch.where((length > 0).view(-1, 1, 1), shifted, features)

    def _labeled_views(self, rows: Tensor, steps: Tensor) -> Tensor:
        """View numbers of labelled rows, both (S, T, B): any plain or weak one, or one that is large enough."""
        features, epochs, size = self.features, self.trials.values["crop_epochs"], rows.shape[-1]
        view = self._views(steps, Purpose.LABELED_VIEW, size, features.easy)
        if not self.any_schedule or features.areas is None:
            return view
        drawn = words(self.trials.seeds, steps, Purpose.LABELED_VIEW, size)
        smallest = smallest_crop(steps, self.config.steps, epochs).unsqueeze(-1).expand_as(drawn)
        chosen = choose_crops(features.areas[features.position[rows]], smallest, drawn)
        # a trial without a schedule keeps its views, whoever its neighbours are
        return torch.where((epochs > 0).view(1, -1, 1), chosen, view)

    def _views(self, steps: Tensor, purpose: Purpose, size: int, views: int) -> Tensor:
        """View numbers (S, T, size) below `views`."""
        below = torch.full_like(self.trials.seeds, views)
        return integers(self.trials.seeds, steps, purpose, size, below)
