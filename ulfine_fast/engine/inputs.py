"""What the trials of one pass are given: hyper-parameters, prototypes and rows, with a leading trials axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ulfine_fast.config import FitConfig, per_trial_fields
from ulfine_fast.core.batches import BatchSource, PaddedRows
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.types import Pool, Trials
from ulfine_fast.data.splits import Rows, Split, told_labels
from ulfine_fast.methods.registry import method_of
from ulfine_fast.ops.prototypes import class_means, normalize
from ulfine_fast.related.label_proportions.bags import PaddedBags

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache


@dataclass(frozen=True)
class Given:
    """T trials' settings and rows.

    Attributes:
        features: all features on the device. labels: class of each row (n,).
        told: class that training is told of each labelled image (T, L), 0 for padding.
        trials: settings. labeled, unlabeled, val, test: rows of each trial.
        selects: whether a trial keeps its best heads, bool (T,).
        patience: evaluations without a better one after which a trial stops, 0 for never (T,).
        bags: of the training images, for methods that use them.
    """

    features: DeviceFeatures
    labels: Tensor
    told: Tensor
    trials: Trials
    labeled: PaddedRows
    unlabeled: PaddedRows
    val: PaddedRows
    test: PaddedRows
    selects: Tensor
    patience: Tensor
    bags: PaddedBags | None = None

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
        # without validation images there is nothing to select or stop by
        judged = torch.tensor([len(split.val) > 0 for split in splits], device=device)
        selects = torch.tensor([config.select == "best" for config in configs], device=device) & judged
        patience = torch.tensor([config.patience for config in configs], device=device) * judged
        told = _told(cache, configs, splits)
        trials = _trials(cache, features, configs, splits, told)
        padded = PaddedRows.of(told, device).index
        bags = _bags(configs[0], splits, device)
        return cls(features, labels, padded, trials, **rows, selects=selects, patience=patience, bags=bags)

    def at(self, index: Tensor) -> Given:
        """The trials at these places alone; padding stays as wide as it was."""
        labeled, unlabeled, val, test = (
            PaddedRows(rows.index[index], rows.count[index])
            for rows in (self.labeled, self.unlabeled, self.val, self.test)
        )
        return replace(
            self,
            told=self.told[index],
            trials=self.trials.at(index),
            labeled=labeled,
            unlabeled=unlabeled,
            val=val,
            test=test,
            selects=self.selects[index],
            patience=self.patience[index],
            bags=None if self.bags is None else self.bags.at(index),
        )

    def batches(self, *, pairs: bool) -> BatchSource:
        """Their mini-batches, with unlabelled images where `pairs`."""
        trials = self.trials
        rows = self.told, self.labeled, self.unlabeled
        return BatchSource(self.features, *rows, trials, trials.config, pairs, self.bags)

    def pool(self) -> Pool:
        """All their training images."""
        labeled, unlabeled = self.labeled, self.unlabeled
        labels = torch.where(labeled.present, self.told, -torch.ones_like(self.told))
        return Pool(self.features, labeled.index, labels, unlabeled.index, unlabeled.present, self.bags)


def _bags(config: FitConfig, splits: Sequence[Split], device: torch.device) -> PaddedBags | None:
    """The bags of all splits, None for methods that use none."""
    found = [split.bags for split in splits if split.bags is not None]
    return PaddedBags.of(found, device) if method_of(config).uses_bags and len(found) == len(splits) else None


def _told(cache: FeatureCache, configs: Sequence[FitConfig], splits: Sequence[Split]) -> list[Rows]:
    """What each trial is told of its labelled images (L,); one array for all trials that are told the same."""
    told: dict[tuple[object, ...], Rows] = {}
    keys: list[tuple[object, ...]] = []
    for config, split in zip(configs, splits, strict=True):
        # without noise nothing is drawn, whatever the seed
        keys.append((id(split), (config.label_noise, config.data_seed) if config.label_noise else None))
        if keys[-1] not in told:
            told[keys[-1]] = told_labels(cache.labels, split, len(cache.class_names), config)
    return [told[key] for key in keys]


def _trials(
    cache: FeatureCache,
    features: DeviceFeatures,
    configs: Sequence[FitConfig],
    splits: Sequence[Split],
    told: Sequence[Rows],
) -> Trials:
    device = features.plain.device
    values = {
        name: torch.tensor([float(getattr(config, name)) for config in configs], device=device)
        for name in per_trial_fields()
    }
    seeds = torch.tensor([config.seed for config in configs], device=device)
    # trials often are told the same, and counting is slower than looking up
    counted = {id(own): np.bincount(own, minlength=len(cache.class_names)) for own in told}
    counts = np.stack([counted[id(own)] for own in told])  # (T, K)
    # a trial that learns from bags may have no labelled image
    frequency = torch.from_numpy(counts / counts.sum(1, keepdims=True).clip(min=1)).float().to(device)
    prototypes = _prototypes(cache, features, splits, told)
    # tokens as wide as the projection is high have been through the norm before it already
    normed = features.tokens and cache.token_kinds != ["pre", "post"]
    wanted = ("projection",) if normed else cache.head if features.tokens else ()
    head = {name: torch.from_numpy(cache.head[name]).to(device) for name in wanted}
    log_prior = torch.log(frequency.clamp(min=1e-8))
    return Trials(configs[0], values, seeds, prototypes, log_prior, head, _texts(cache, device))


def _texts(cache: FeatureCache, device: torch.device) -> Tensor | None:
    """Features of the class names in each prompt (P, K, D), as long as the encoder's logit scale."""
    if cache.text_features is None:
        return None
    texts = torch.from_numpy(np.asarray(cache.text_features)).float().to(device).transpose(0, 1)
    return cache.logit_scale * normalize(texts)


def _prototypes(cache: FeatureCache, features: DeviceFeatures, splits: Sequence[Split], told: Sequence[Rows]) -> Tensor:
    """The text's prototypes (T, K, D), or each trial's class means where the cache has no text."""
    device = features.plain.device
    if cache.prototypes is not None:
        text = torch.from_numpy(np.asarray(cache.prototypes)).float().to(device)
        return normalize(text).repeat(len(splits), 1, 1)
    means = {}
    for split, own in {id(own): (split, own) for split, own in zip(splits, told, strict=True)}.values():
        shown = features.rows(torch.from_numpy(split.labeled).to(device))[None]  # (1, L, D)
        classes = torch.from_numpy(own).to(device)[None]  # (1, L)
        means[id(own)] = class_means(shown, classes, len(cache.class_names))[0][0]
    return normalize(torch.stack([means[id(own)] for own in told]))
