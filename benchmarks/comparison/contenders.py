"""Who takes part: the engine's methods, an oracle, and scikit-learn's classifiers; all on the same splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.comparison.cells import Cell
from benchmarks.comparison.scikit_learn import SCIKIT_LEARN, ScikitLearnClassifier, fit_scikit_learn
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import options_of
from ulfine_fast.data.splits import Split, draw_split, labeled_counts
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.methods import registry
from ulfine_fast.metrics.classification import rank_thirds

Options = dict[str, Any]
"""Options of a trial that differ from the defaults, by name."""

Metrics = dict[str, Any]

ORACLE = "oracle"
"""`linear_probe` with the true labels of the unlabelled images."""


def contender_names() -> tuple[str, ...]:
    """Every contender."""
    return (*registry.names(), ORACLE, *SCIKIT_LEARN)


def check_contenders(names: Sequence[str]) -> None:
    """Refuse unknown contenders.

    Raises:
        InputError: naming the first.
    """
    for name in names:
        if name not in contender_names():
            raise InputError(f"unknown method {name!r}; the methods are {', '.join(contender_names())}")


def engine_method(contender: str) -> str:
    """The engine's method that a contender is."""
    return "linear_probe" if contender == ORACLE else contender


def read_options(contender: str, options: Mapping[str, Any]) -> Options:
    """Those of the options that a contender of the engine reads; old names are among them."""
    method = engine_method(contender)
    known = options_of(method)
    return {name: value for name, value in options.items() if name in known or method in registry.readers(name)}


def splits_of(cell: Cell, cache: FeatureCache, seeds: Sequence[int]) -> list[Split]:
    """The split of each seed; images without a label in the cache are among the unlabelled ones of all cells."""
    unknown = np.flatnonzero((cache.labels < 0) & np.isin(cache.splits, ("train", "unlabeled")))
    splits = []
    for seed in seeds:
        split = draw_split(cache.labels, cache.splits, cache.class_names, cell.config(seed=seed))
        splits.append(replace(split, unlabeled=np.union1d(split.unlabeled, unknown)))
    return splits


def with_true_labels(split: Split, cache: FeatureCache) -> Split:
    """The oracle's split: unlabelled images of a known class join the labelled ones."""
    known = split.unlabeled[cache.labels[split.unlabeled] >= 0]
    return replace(split, labeled=np.union1d(split.labeled, known), unlabeled=known[:0])


def without_test(split: Split) -> Split:
    """The split that a search may see."""
    return replace(split, test=split.test[:0])


def fit_cell(
    contender: str,
    cell: Cell,
    cache: FeatureCache,
    seeds: Sequence[int],
    splits: Sequence[Split],
    settings: Sequence[Options],
    device: str,
) -> list[list[Metrics]]:
    """Fit every setting on every seed, those of one structure together.

    Args:
        contender: one of `contender_names()`.
        cell: counts and shape.
        cache: features of its data set.
        seeds: of initial weights and mini-batches.
        splits: one for each seed.
        settings: options of `FitConfig`, or of `ScikitLearnClassifier`, that differ from the defaults.
        device: where the engine runs.

    Returns:
        Metrics of each setting and seed, with tail_accuracy over the third of classes with fewest labelled images
        in `splits`.
    """
    if contender in SCIKIT_LEARN:
        classifiers = [ScikitLearnClassifier(contender, **options) for options in settings]
        metrics = [fit_scikit_learn(classifier, cache, split) for classifier in classifiers for split in splits]
    else:
        method = engine_method(contender)
        configs = [cell.config(method=method, seed=seed, **options) for options in settings for seed in seeds]
        used = [with_true_labels(split, cache) for split in splits] if contender == ORACLE else list(splits)
        runs = fit_many(cache, configs, split=used * len(settings), device=device)
        metrics = [run.metrics for run in runs]

    # the tail is that of the split, not of the oracle's many labels
    together = [
        {**own, "tail_accuracy": _tail_accuracy(own, cache, split)}
        for own, split in zip(metrics, [*splits] * len(settings), strict=True)
    ]
    return [together[start : start + len(seeds)] for start in range(0, len(together), len(seeds))]


def _tail_accuracy(metrics: Metrics, cache: FeatureCache, split: Split) -> float | None:
    """Mean recall over the third of classes that is rarest among the labelled images; None without test images."""
    recall = metrics.get("per_class_accuracy")
    if recall is None:
        return None
    rarest = rank_thirds(labeled_counts(cache.labels, split, len(cache.class_names)))[2]
    known = [recall[k] for k in rarest if recall[k] is not None]
    return float(np.mean(known)) if known else None
