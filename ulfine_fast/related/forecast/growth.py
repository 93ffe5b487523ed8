"""Runs of one trial with growing budgets, evaluated on validation alone: the curve that a forecast starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import Split, draw_split, labeled_counts
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.metrics.classification import class_groups, classification
from ulfine_fast.related.forecast import Budget
from ulfine_fast.related.forecast.forecast import Curve

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.runs.run import Run

BUDGETS: tuple[Budget, ...] = get_args(Budget)
SIZES = (0.25, 0.35, 0.5, 0.71, 1.0)
"""Fractions of the trial's own budget that are run, about a factor of the square root of two apart."""


def grow(
    cache: FeatureCache,
    configs: Sequence[FitConfig],
    over: Budget,
    metrics: Sequence[str] = ("balanced_accuracy",),
    *,
    sizes: Sequence[float] = SIZES,
    split: Split | None = None,
    device: str = "auto",
    engine: str = "auto",
    progress: bool | None = False,
) -> dict[str, Curve]:
    """Fit a trial's seeds at each size; smaller sizes are subsets of larger ones, validation is the same for all.

    Args:
        cache: features.
        configs: the trial, one for each of R seeds.
        over: labels (the same fraction of each class, at least one image), views (the first of each kind) or steps
            (each number with a schedule of its own).
        metrics: on validation; a group of classes is the group that it is with all labels.
        sizes: fractions of the trial's own budget, ascending.
        split: use this split for all seeds.
        device: see :func:`ulfine_fast.fit_many`.
        engine: see :func:`ulfine_fast.fit_many`.
        progress: draw a progress bar; None draws it where stderr is a terminal.

    Returns:
        For each metric a curve of as many budgets as differ. The loss is the mean negative log-likelihood over the
        images that the metric is about, at the temperature fitted on validation; for other metrics than accuracy it is
        averaged over the images of each class first.

    Raises:
        InputError: no validation images, a metric that is missing on them, a run that diverged, or what
            :func:`ulfine_fast.fit_many` refuses.
    """
    splits = [split or draw_split(cache.labels, cache.splits, cache.class_names, config) for config in configs]
    if any(not len(drawn.val) for drawn in splits):
        raise InputError("the split has no validation images to forecast from; set val_fraction above 0")
    if over == "views":
        _refuse_token_readers(configs)

    budgets: list[float] = []
    points: list[list[list[tuple[float, float]]]] = []
    with progress_bar(progress) as bar:
        task = bar.add_task(f"forecast over {over}", total=len(sizes), unit="sizes", note=f"{len(configs)} seeds")
        for size in sizes:
            # the trial with this fraction of its budget
            sized_cache = cache
            sized_configs = list(configs)
            sized_splits = splits
            if over == "labels":
                sized_splits = [
                    fewer_labels(cache, whole, size, config.data_seed)
                    for whole, config in zip(splits, configs, strict=True)
                ]
                budget = float(np.mean([len(drawn.labeled) for drawn in sized_splits]))
            elif over == "steps":
                sized_configs = [replace(config, steps=max(1, round(size * config.steps))) for config in configs]
                budget = float(np.mean([config.steps for config in sized_configs]))
            else:
                sized_cache = fewer_views(cache, max(1, round(size * view_count(cache))))
                budget = float(view_count(sized_cache))

            # each seed's loss and value of each metric; groups of classes are those of all labels
            runs = fit_many(
                sized_cache,
                sized_configs,
                split=sized_splits,
                device=device,
                engine=engine,
                read_test=False,
                progress=False,
            )
            budgets.append(budget)
            points.append(
                [
                    [_evaluate(sized_cache, run, whole, metric) for metric in metrics]
                    for run, whole in zip(runs, splits, strict=True)
                ]
            )
            bar.advance(task, 1)

    # sizes that round to the same budget are one point
    distinct, first = np.unique(budgets, return_index=True)
    table = np.array([points[i] for i in first], dtype=np.float64)  # (S, R, M, 2)
    return {name: Curve(distinct, table[:, :, m, 0], table[:, :, m, 1]) for m, name in enumerate(metrics)}


def _refuse_token_readers(configs: Sequence[FitConfig]) -> None:
    """Refuse trials that read more of a view than its projected feature."""
    for config in configs:
        if config.reads_tokens or config.crop_epochs:
            name = config.reads_tokens_for if config.reads_tokens else f"crop_epochs = {config.crop_epochs}"
            raise InputError(f"a forecast over views takes projected features alone, not {name}; take labels or steps")


def fewer_labels(cache: FeatureCache, split: Split, fraction: float, seed: int) -> Split:
    """A split with that fraction of each class's labelled images, at least one; smaller fractions are subsets."""
    random = np.random.default_rng([seed, 0xF09E])
    labels = cache.labels[split.labeled]
    pools = [random.permutation(split.labeled[labels == k]) for k in range(len(cache.class_names))]
    # the images left out do not become unlabelled ones: only the labels are to differ
    kept = np.sort(np.concatenate([pool[: max(1, round(fraction * len(pool)))] for pool in pools]))
    return replace(split, labeled=kept)


def fewer_views(cache: FeatureCache, count: int) -> FeatureCache:
    """The cache with the first `count` views of each kind, or all where there are fewer; without tokens."""
    return type(cache).from_arrays(
        cache.plain,
        cache.labels,
        class_names=cache.class_names,
        text_features=cache.text_features,
        weak=cache.views("weak")[:, :count],
        strong=cache.views("strong")[:, :count],
        splits=cache.splits.tolist(),
        ids=cache.ids,
        logit_scale=cache.logit_scale,
    )


def view_count(cache: FeatureCache) -> int:
    """Views of the kind that a cache holds more of."""
    return max(cache.views(kind).shape[1] for kind in ("weak", "strong"))


def _evaluate(cache: FeatureCache, run: Run, split: Split, metric: str) -> tuple[float, float]:
    """Loss and value of a metric on validation; the value is NaN where the run lacks the metric.

    Raises:
        InputError: the run diverged.
    """
    inputs = cache.tokens("plain") if run.config.reads_tokens else cache.plain
    logits = run.logits(inputs[split.val]).astype(np.float64)
    labels = cache.labels[split.val]
    counts = labeled_counts(cache.labels, split, len(cache.class_names))
    value = classification(logits, labels, counts)[metric]
    # the images of the metric's group of classes, all images where it has none
    rows = np.isin(labels, class_groups(counts).get(metric, np.arange(len(counts))))
    loss = mean_loss(logits[rows] / run.metrics["temperature"], labels[rows], balanced=metric != "accuracy")
    return loss, float("nan") if value is None else float(value)


def mean_loss(logits: NDArray[np.float64], labels: NDArray[np.int64], *, balanced: bool) -> float:
    """Mean negative log-likelihood of logits (n, K), NaN without rows; balanced, the mean of the classes' means."""
    if not len(labels):
        return float("nan")
    top = logits.max(1)
    losses = np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[np.arange(len(labels)), labels]  # (n,)
    if not balanced:
        return float(losses.mean())
    return float(np.mean([losses[labels == k].mean() for k in np.unique(labels)]))
