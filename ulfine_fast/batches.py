"""Mini-batches of T trials: which rows, which views, drawn from (seed, step, purpose) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ulfine_fast.config import FitConfig
from ulfine_fast.features import DeviceFeatures
from ulfine_fast.methods import Batch, Trials
from ulfine_fast.ops.philox import Purpose, integers, normals
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.splits import Rows


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


@dataclass(frozen=True)
class BatchSource:
    """Draws the mini-batches of T trials.

    Attributes:
        features: all features on the device. labels: class of each row (n,).
        labeled, unlabeled: rows of each trial. trials: seeds and noise lengths.
        config: batch sizes. pairs: whether to draw unlabelled pictures at all.
    """

    features: DeviceFeatures
    labels: Tensor
    labeled: PaddedRows
    unlabeled: PaddedRows
    trials: Trials
    config: FitConfig
    pairs: bool

    def draw(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """Mini-batches of steps [start, stop); the row numbers of all of them are drawn at once."""
        steps = torch.arange(start, stop, device=self.labels.device)
        easy, strong = self.features.easy.shape[1], max(1, self.features.strong.shape[1])
        sizes = self.config.batch_labeled, self.config.batch_unlabeled
        labeled, _ = self.labeled.draw(self.trials.seeds, steps, Purpose.LABELED, sizes[0])  # (S, T, B)
        labeled_view = self._views(steps, Purpose.LABELED_VIEW, sizes[0], easy)
        hidden, places = self.unlabeled.draw(self.trials.seeds, steps, Purpose.UNLABELED, sizes[1])  # (S, T, U)
        weak_view = self._views(steps, Purpose.WEAK_VIEW, sizes[1], easy)
        strong_view = self._views(steps, Purpose.STRONG_VIEW, sizes[1], strong)
        for i, step in enumerate(range(start, stop)):
            features = self.features.easy_views(labeled[i], labeled_view[i])  # (T, B, D)
            features = self._noisy(features, step, Purpose.LABELED_NOISE)
            weak = shifted = place = None
            if self.pairs:
                weak = self.features.easy_views(hidden[i], weak_view[i])  # (T, U, D)
                shifted = self.features.strong_views(hidden[i], strong_view[i])
                shifted, place = self._noisy(shifted, step, Purpose.STRONG_NOISE), places[i]
            yield step, Batch(features, self.labels[labeled[i]], weak, shifted, place)

    @cached_property
    def _any_noise(self) -> bool:
        # asked once: on a GPU each look at a value waits for all the work before it
        return bool((self.trials.values["feature_noise"] > 0).any())

    def _views(self, steps: Tensor, purpose: Purpose, size: int, views: int) -> Tensor:
        """View numbers (S, T, size) below `views`."""
        below = torch.full_like(self.trials.seeds, views)
        return integers(self.trials.seeds, steps, purpose, size, below)

    def _noisy(self, features: Tensor, step: int, purpose: Purpose) -> Tensor:
        """Add Gaussian noise of expected length `feature_noise` to unit rows (T, B, D)."""
        if not self._any_noise:
            return features
        length = self.trials.values["feature_noise"]
        noise = normals(self.trials.seeds, step, purpose, features[0].numel()).view_as(features)
        shifted = normalize(features + noise * (length / features.shape[-1] ** 0.5).view(-1, 1, 1))
        # a trial without noise keeps its rows to the bit, whoever its neighbours are
        return torch.where((length > 0).view(-1, 1, 1), shifted, features)
