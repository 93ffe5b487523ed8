"""Who takes part: the engine's methods, an oracle, and outside parts; all on the same splits and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.comparison.cells import Cell
from benchmarks.comparison.scikit_learn import OUTSIDE, OutsideClassifier, fit_outside
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import METHODS
from ulfine_fast.data.splits import Split, draw_split, labeled_counts
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.metrics.classification import rank_thirds

Settings = dict[str, Any]
Figures = dict[str, Any]

ORACLE = "oracle"


def names() -> tuple[str, ...]:
    """Everyone who can take part."""
    return (*METHODS, ORACLE, *OUTSIDE)


def check_names(wanted: Sequence[str]) -> None:
    """Refuse who is not known.

    Raises:
        InputError: naming the first.
    """
    for name in wanted:
        if name not in names():
            raise InputError(f"unknown method {name!r}; the methods are {', '.join(names())}")


def splits_of(cell: Cell, cache: FeatureCache, seeds: Sequence[int]) -> list[Split]:
    """The split of each seed; images that have no label in the cache are among the unlabelled ones of all cells."""
    unknown = np.flatnonzero((cache.labels < 0) & np.isin(cache.splits, ("train", "unlabeled")))
    found = []
    for seed in seeds:
        split = draw_split(cache.labels, cache.splits, cache.class_names, cell.config(seed=seed))
        found.append(replace(split, unlabeled=np.union1d(split.unlabeled, unknown)))
    return found


def with_true_labels(split: Split, cache: FeatureCache) -> Split:
    """The oracle's split: unlabelled images of a known class joined the labelled ones."""
    known = split.unlabeled[cache.labels[split.unlabeled] >= 0]
    return replace(split, labeled=np.union1d(split.labeled, known), unlabeled=known[:0])


def without_test(split: Split) -> Split:
    """The split a search may see."""
    return replace(split, test=split.test[:0])


def fit_cell(
    method: str,
    cell: Cell,
    cache: FeatureCache,
    seeds: Sequence[int],
    splits: Sequence[Split],
    settings: Sequence[Settings],
    device: str,
) -> list[list[Figures]]:
    """Fit every setting on every seed, those of one structure in one pass.

    Args:
        method: one of `names()`.
        cell: counts and shape.
        cache: its features.
        seeds: of initial weights and mini-batches.
        splits: one for each seed.
        settings: fields of FitConfig, or of `OutsideClassifier`, that differ from the defaults.
        device: where the engine runs.

    Returns:
        Figures of each setting and seed, with tail_accuracy over the third of classes with fewest labelled images
        in `splits`.
    """
    pairs = [(split, one) for one in settings for split in splits]
    if method in OUTSIDE:
        figures = [fit_outside(OutsideClassifier(method, **one), cache, split) for split, one in pairs]
    else:
        figures = _fit_engine(method, cell, cache, seeds, splits, settings, device)
    figures = [{**one, **_tail(one, cache, split)} for one, (split, _) in zip(figures, pairs, strict=True)]
    return [figures[i : i + len(seeds)] for i in range(0, len(figures), len(seeds))]


def _fit_engine(
    method: str,
    cell: Cell,
    cache: FeatureCache,
    seeds: Sequence[int],
    splits: Sequence[Split],
    settings: Sequence[Settings],
    device: str,
) -> list[Figures]:
    """Figures of settings times seeds, the seeds of one setting side by side."""
    oracle = method == ORACLE
    used = [with_true_labels(split, cache) for split in splits] if oracle else list(splits)
    engine = "linear_probe" if oracle else method
    configs = [cell.config(method=engine, seed=seed, **one) for one in settings for seed in seeds]
    runs = fit_many(cache, configs, split=used * len(settings), device=device)
    return [run.metrics for run in runs]


def _tail(figures: Figures, cache: FeatureCache, split: Split) -> Figures:
    """Mean recall over the classes that are rare among the images labelled for everyone, not for the oracle alone."""
    recall = figures.get("per_class_accuracy")
    if recall is None:
        return {"tail_accuracy": None}
    rare = rank_thirds(labeled_counts(cache.labels, split, len(cache.class_names)))[2]
    there = [recall[k] for k in rare if recall[k] is not None]
    return {"tail_accuracy": float(np.mean(there)) if there else None}
