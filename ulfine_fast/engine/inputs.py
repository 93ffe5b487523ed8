"""The inputs of one trial batch: options, prototypes and rows, with a leading trials axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ulfine_fast.config import FitConfig, per_trial_options
from ulfine_fast.core.batches import BatchSource, PaddedRows
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.selection import SHARED
from ulfine_fast.core.types import Pool, Report, Trials
from ulfine_fast.data.splits import Rows, Split, training_labels
from ulfine_fast.methods.registry import method_of
from ulfine_fast.ops.prototypes import class_means, normalize

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache


@dataclass(frozen=True)
class TrialInputs:
    """Options and rows of T trials.

    Attributes:
        training_labels: class that training sees for each labelled image (T, L), 0 for padding.
        trials: options.
        labeled: labelled rows of each trial.
        unlabeled: unlabelled rows of each trial.
        val: validation rows of each trial.
        test: test rows of each trial.
        selects: whether a trial keeps its best heads, bool (T,).
        patience: validations without a better one after which a trial stops, 0 for never (T,).
        features: all features on the device.
        labels: class of each row of the cache (n,), -1 unknown.
    """

    training_labels: Tensor
    trials: Trials
    labeled: PaddedRows
    unlabeled: PaddedRows
    val: PaddedRows
    test: PaddedRows
    selects: Tensor
    patience: Tensor
    features: DeviceFeatures = field(metadata=SHARED)
    labels: Tensor = field(metadata=SHARED)

    def batches(self, *, pairs: bool) -> BatchSource:
        """Their mini-batches, with unlabelled images where `pairs`."""
        return BatchSource(
            labels=self.training_labels,
            labeled=self.labeled,
            unlabeled=self.unlabeled,
            trials=self.trials,
            features=self.features,
            config=self.trials.config,
            pairs=pairs,
        )

    def pool(self, report: Report) -> Pool:
        """All their training images; `report` is called with the fraction of a method's work on them."""
        labels = torch.where(self.labeled.present, self.training_labels, -1)
        return Pool(self.features, self.labeled.index, labels, self.unlabeled.index, self.unlabeled.present, report)


def trial_inputs(
    cache: FeatureCache, features: DeviceFeatures, configs: Sequence[FitConfig], splits: Sequence[Split]
) -> TrialInputs:
    """The inputs of T configs of one structure and their splits, on the device of the features."""
    device = features.plain.device
    classes = len(cache.class_names)

    # labels that training sees; trials with the same split and noise share one array
    by_key: dict[tuple[object, ...], Rows] = {}
    labels_of: list[Rows] = []
    for config, split in zip(configs, splits, strict=True):
        # without noise the seed does not matter
        key = (id(split), (config.label_noise, config.data_seed) if config.label_noise else None)
        if key not in by_key:
            by_key[key] = training_labels(cache.labels, split, classes, config)
        labels_of.append(by_key[key])

    # class frequencies
    counted = {id(labels): np.bincount(labels, minlength=classes) for labels in by_key.values()}
    counts = np.stack([counted[id(labels)] for labels in labels_of])  # (T, K)
    # a trial that learns from no labels may have none
    frequency = torch.from_numpy(counts / counts.sum(1, keepdims=True).clip(min=1)).float().to(device)

    # the end of the encoder, for adapters inside it; tokens from behind its norm need the projection alone
    after_norm = features.tokens and cache.token_kinds != ["pre", "post"]
    parts = ("projection",) if after_norm else cache.head if features.tokens else ()

    names = per_trial_options(configs[0])
    trials = Trials(
        config=configs[0],
        values={
            name: torch.tensor([float(getattr(config, name)) for config in configs], device=device) for name in names
        },
        seeds=torch.tensor([config.seed for config in configs], device=device),
        prototypes=_starting_prototypes(cache, features, splits, labels_of),
        log_prior=torch.log(frequency.clamp(min=1e-8)),
        head={name: torch.from_numpy(cache.head[name]).to(device) for name in parts},
        inputs=method_of(configs[0]).inputs(cache, splits, device),
    )

    # without validation images no trial selects or stops
    validated = torch.tensor([len(split.val) > 0 for split in splits], device=device)
    return TrialInputs(
        training_labels=PaddedRows.pad(labels_of, device).index,
        trials=trials,
        labeled=PaddedRows.pad([split.labeled for split in splits], device),
        unlabeled=PaddedRows.pad([split.unlabeled for split in splits], device),
        val=PaddedRows.pad([split.val for split in splits], device),
        test=PaddedRows.pad([split.test for split in splits], device),
        selects=torch.tensor([config.select == "best" for config in configs], device=device) & validated,
        patience=torch.tensor([config.patience for config in configs], device=device) * validated,
        features=features,
        labels=torch.from_numpy(cache.labels).to(device),
    )


def _starting_prototypes(
    cache: FeatureCache, features: DeviceFeatures, splits: Sequence[Split], labels_of: Sequence[Rows]
) -> Tensor:
    """The text's prototypes (T, K, D), or each trial's class means where the cache has no text."""
    device = features.plain.device
    if cache.prototypes is not None:
        text = torch.from_numpy(np.asarray(cache.prototypes)).float().to(device)
        return normalize(text).repeat(len(splits), 1, 1)
    means = {}
    # trials with one array of labels have one split
    pairs = {id(labels): (split, labels) for split, labels in zip(splits, labels_of, strict=True)}
    for split, labels in pairs.values():
        rows = features.rows(torch.from_numpy(split.labeled).to(device))[None]  # (1, L, D)
        classes = torch.from_numpy(labels).to(device)[None]  # (1, L)
        means[id(labels)] = class_means(rows, classes, len(cache.class_names))[0][0]
    return normalize(torch.stack([means[id(labels)] for labels in labels_of]))
