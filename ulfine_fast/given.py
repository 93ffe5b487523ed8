"""What the trials of one pass are given: hyper-parameters, prototypes and rows, with a leading trials axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ulfine_fast.batches import BatchSource, PaddedRows
from ulfine_fast.config import FitConfig, per_trial_fields
from ulfine_fast.features import DeviceFeatures
from ulfine_fast.methods import Pool, Trials
from ulfine_fast.ops.prototypes import class_means, normalize
from ulfine_fast.splits import Split, labeled_counts

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache


@dataclass(frozen=True)
class Given:
    """T trials' settings and rows.

    Attributes:
        features: all features on the device. labels: class of each row (n,).
        trials: settings. labeled, unlabeled, val, test: rows of each trial.
        selects: whether a trial keeps its best heads, bool (T,).
        patience: evaluations without a better one after which a trial stops, 0 for never (T,).
    """

    features: DeviceFeatures
    labels: Tensor
    trials: Trials
    labeled: PaddedRows
    unlabeled: PaddedRows
    val: PaddedRows
    test: PaddedRows
    selects: Tensor
    patience: Tensor

    @classmethod
    def of(
        cls, cache: FeatureCache, features: DeviceFeatures, configs: Sequence[FitConfig], splits: Sequence[Split]
    ) -> Given:
        """Put what T configs and splits say on the device."""
        device = features.plain.device
        labels = torch.from_numpy(cache.labels).to(device)
        rows = {
            role: PaddedRows.of([getattr(split, role) for split in splits], device)
            for role in ("labeled", "unlabeled", "val", "test")
        }
        # without validation pictures there is nothing to select or stop by
        judged = torch.tensor([len(split.val) > 0 for split in splits], device=device)
        selects = torch.tensor([config.select == "best" for config in configs], device=device) & judged
        patience = torch.tensor([config.patience for config in configs], device=device) * judged
        trials = _trials(cache, features, labels, configs, splits)
        return cls(features, labels, trials, **rows, selects=selects, patience=patience)

    def at(self, index: Tensor) -> Given:
        """The trials at these places alone; padding stays as wide as it was."""
        labeled, unlabeled, val, test = (
            PaddedRows(rows.index[index], rows.count[index])
            for rows in (self.labeled, self.unlabeled, self.val, self.test)
        )
        return replace(
            self,
            trials=self.trials.at(index),
            labeled=labeled,
            unlabeled=unlabeled,
            val=val,
            test=test,
            selects=self.selects[index],
            patience=self.patience[index],
        )

    def batches(self, *, pairs: bool) -> BatchSource:
        """Their mini-batches, with unlabelled pictures where `pairs`."""
        trials = self.trials
        return BatchSource(self.features, self.labels, self.labeled, self.unlabeled, trials, trials.config, pairs)

    def pool(self) -> Pool:
        """All their training pictures."""
        labeled, unlabeled = self.labeled, self.unlabeled
        labels = torch.where(labeled.present, self.labels[labeled.index], -torch.ones_like(labeled.index))
        return Pool(self.features, labeled.index, labels, unlabeled.index, unlabeled.present)


def _trials(
    cache: FeatureCache,
    features: DeviceFeatures,
    labels: Tensor,
    configs: Sequence[FitConfig],
    splits: Sequence[Split],
) -> Trials:
    device = labels.device
    values = {
        name: torch.tensor([float(getattr(config, name)) for config in configs], device=device)
        for name in per_trial_fields()
    }
    seeds = torch.tensor([config.seed for config in configs], device=device)
    # trials often share a split, and counting is slower than looking up
    counted = {id(split): labeled_counts(cache.labels, split, len(cache.class_names)) for split in splits}
    counts = np.stack([counted[id(split)] for split in splits])  # (T, K)
    frequency = torch.from_numpy(counts / counts.sum(1, keepdims=True)).float().to(device)
    prototypes = _prototypes(cache, features, labels, splits)
    head = {name: torch.from_numpy(value).to(device) for name, value in cache.head.items() if features.tokens}
    return Trials(configs[0], values, seeds, prototypes, torch.log(frequency.clamp(min=1e-8)), head)


def _prototypes(cache: FeatureCache, features: DeviceFeatures, labels: Tensor, splits: Sequence[Split]) -> Tensor:
    """The text's prototypes (T, K, D), or each trial's class means where the cache has no text."""
    if cache.prototypes is not None:
        text = torch.from_numpy(np.asarray(cache.prototypes)).float().to(labels.device)
        return normalize(text).repeat(len(splits), 1, 1)
    means = {}
    for split in {id(split): split for split in splits}.values():
        rows = torch.from_numpy(split.labeled).to(labels.device)
        shown, classes = features.rows(rows)[None], labels[rows][None]  # (1, L, D), (1, L)
        means[id(split)] = class_means(shown, classes, len(cache.class_names))[0][0]
    return normalize(torch.stack([means[id(split)] for split in splits]))
