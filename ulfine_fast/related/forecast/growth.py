"""Runs of one trial at growing budgets, read on validation alone: the curve that a forecast starts from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import Split, draw_split, labeled_counts
from ulfine_fast.metrics.classification import class_groups, classification
from ulfine_fast.related.forecast.forecast import FURTHEST, LEAST_SEEDS, LEAST_SIZES, Curve, forecast
from ulfine_fast.search.leaderboard import Place, write_json
from ulfine_fast.search.objective import LARGER

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.runs.run import Run
    from ulfine_fast.search.plan import Plan

OVER = ("labels", "views", "steps")
SIZES = (0.25, 0.35, 0.5, 0.71, 1.0)
"""Shares of the trial's own budget that are run: steps of a factor of the square root of two."""


def check_forecast(cache: FeatureCache, over: str, times: float, seeds: int, metrics: Sequence[str]) -> None:
    """Refuse what can be told before a run.

    Raises:
        InputError: an unknown budget, a factor out of range, too few seeds or views, or a figure that is no accuracy.
    """
    if over not in OVER:
        raise InputError(f"forecast must be one of {', '.join(OVER)}, got {over!r}")
    if not 1 < times <= FURTHEST:
        raise InputError(f"forecast-times must be above 1 and at most {FURTHEST:g}, got {times:g}")
    if seeds < LEAST_SEEDS:
        raise InputError(f"a forecast needs runs of at least {LEAST_SEEDS} seeds, got {seeds}; raise --refit-seeds")
    if metrics and metrics[0] not in LARGER:
        raise InputError(f"a forecast is of a figure of which more is better, got {metrics[0]}; choose accuracy")
    if over == "views" and _views(cache) < LEAST_SIZES:
        raise InputError(
            f"a forecast over views needs {LEAST_SIZES} of each kind, this cache has {_views(cache)}; "
            "extract with more --weak or --strong"
        )


def forecast_best(
    place: Place,
    plan: Plan,
    cache: FeatureCache,
    seeds: Sequence[int],
    over: str,
    times: float,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Run a sweep's best trial at smaller budgets, and write `forecast.json`: the curve, and the forecast or why none.

    Args:
        place: the trial.
        plan: the sweep's.
        cache: its features.
        seeds: of the runs, best not those that the trial was chosen by.
        over: labels, views or steps.
        times: how many times the trial's own budget.
        progress: see :func:`ulfine_fast.sweep`.
    """
    metric, path = plan.metrics[0], plan.out / "forecast.json"
    about = {"over": over, "metric": metric, "trial": place.trial, "seeds": list(seeds), "sizes": list(SIZES)}
    told: dict[str, Any] = {**about, "times": times, "curve": None, "refused": None, "forecast": None}
    try:
        curve = _earlier(path, about)
        if curve is None:
            configs = [plan.space.config(place.params, seed) for seed in seeds]
            how: dict[str, Any] = {"device": plan.device, "engine": plan.engine}
            curve = grow(cache, configs, over, [metric], split=plan.split, progress=progress, **how)[metric]
        told["curve"] = curve.to_dict()
        target = times * float(curve.budgets[-1])
        told["forecast"] = asdict(forecast(curve, target, chance=1 / len(cache.class_names), over=over))
    except InputError as error:  # the sweep itself is done and well: only the forecast is refused
        told["refused"] = str(error)
    write_json(path, told)
    return told


def _earlier(path: Path, about: dict[str, Any]) -> Curve | None:
    """The curve of an earlier call about the same runs."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Curve.from_dict(found["curve"]) if {name: found[name] for name in about} == about else None
    except (OSError, ValueError, KeyError, TypeError):  # not there yet, or written by something else
        return None


def grow(
    cache: FeatureCache,
    configs: Sequence[FitConfig],
    over: str,
    metrics: Sequence[str] = ("balanced_accuracy",),
    *,
    sizes: Sequence[float] = SIZES,
    split: Split | None = None,
    progress: bool | None = False,
    **how: Any,
) -> dict[str, Curve]:
    """Fit a trial's seeds at each size; smaller sizes are subsets of larger ones, validation is the same for all.

    Args:
        cache: features.
        configs: the trial, one for each of R seeds.
        over: labels (of each class the same share, at least one image), views (the first of each kind) or steps (each
            number with a schedule of its own).
        metrics: figures; of a group of classes, the group that it is with all labels.
        sizes: shares of the trial's own budget, ascending.
        split: use this split for all seeds.
        progress: draw a progress bar; None draws it where stderr is a terminal.
        **how: device and engine of :func:`ulfine_fast.fit_many`.

    Returns:
        For each metric a curve of as many budgets as differ. The loss is the mean negative log-likelihood over the
        images that the figure is about, at the temperature fitted on validation; for other figures than accuracy of
        each class first.

    Raises:
        InputError: no validation images or no such figure on them, a run that diverged, or what
            :func:`ulfine_fast.fit_many` refuses.
    """
    splits = [split or draw_split(cache.labels, cache.splits, cache.class_names, config) for config in configs]
    if any(not len(one.val) for one in splits):
        raise InputError("the split has no validation images to forecast from; set val_fraction above 0")
    if over == "views":
        _refuse_views(configs)
    points = []
    with progress_bar(progress) as bar:
        task = bar.add_task(f"forecast over {over}", total=len(sizes), unit="sizes", note=f"{len(configs)} seeds")
        for size in sizes:
            points.append(_at(size, cache, configs, splits, over, metrics, how))
            bar.advance(task, 1)
    budgets, first = np.unique([budget for budget, _ in points], return_index=True)
    found = np.array([points[i][1] for i in first], dtype=np.float64)  # (S, R, M, 2)
    return {name: Curve(budgets, found[:, :, m, 0], found[:, :, m, 1]) for m, name in enumerate(metrics)}


def _refuse_views(configs: Sequence[FitConfig]) -> None:
    """Refuse what reads more of a view than its projected feature."""
    for config in configs:
        if config.reads_tokens or config.crop_epochs:
            name = config.reads_tokens_for if config.reads_tokens else f"crop_epochs = {config.crop_epochs}"
            raise InputError(f"a forecast over views takes projected features alone, not {name}; take labels or steps")


def _at(
    size: float,
    cache: FeatureCache,
    configs: Sequence[FitConfig],
    splits: Sequence[Split],
    over: str,
    metrics: Sequence[str],
    how: dict[str, Any],
) -> tuple[float, list[list[tuple[float, float]]]]:
    """Mean budget at a share of a trial's own, and each seed's loss and figure for each metric (R, M, 2)."""
    from ulfine_fast.engine.fit import fit_many

    own = splits  # groups of classes are those of all labels
    if over == "labels":
        splits = [fewer_labels(cache, one, size, config.data_seed) for one, config in zip(own, configs, strict=True)]
    if over == "steps":
        configs = [replace(config, steps=max(1, round(size * config.steps))) for config in configs]
    if over == "views":
        cache = fewer_views(cache, max(1, round(size * _views(cache))))
    budgets = {"labels": [len(one.labeled) for one in splits], "steps": [c.steps for c in configs]}
    runs = fit_many(cache, configs, split=splits, read_test=False, progress=False, **how)
    read = [[_read(cache, run, one, metric) for metric in metrics] for run, one in zip(runs, own, strict=True)]
    return float(np.mean(budgets.get(over, _views(cache)))), read


def fewer_labels(cache: FeatureCache, split: Split, share: float, seed: int) -> Split:
    """A split with that share of each class's labelled images, at least one; a smaller share's are among them."""
    random = np.random.default_rng([seed, 0xF09E])
    labels = cache.labels[split.labeled]
    pools = [random.permutation(split.labeled[labels == k]) for k in range(len(cache.class_names))]
    # the images left out are not put among the unlabelled ones: only the labels are to differ
    kept = np.sort(np.concatenate([pool[: max(1, round(share * len(pool)))] for pool in pools]))
    return replace(split, labeled=kept)


def fewer_views(cache: FeatureCache, count: int) -> FeatureCache:
    """The cache with the first views of each kind, at most so many; without tokens."""
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


def _views(cache: FeatureCache) -> int:
    return max(cache.views(kind).shape[1] for kind in ("weak", "strong"))


def _read(cache: FeatureCache, run: Run, split: Split, metric: str) -> tuple[float, float]:
    """Loss and figure on validation, the figure NaN where there is none.

    Raises:
        InputError: the run diverged.
    """
    inputs = cache.tokens("plain") if run.config.reads_tokens else cache.plain
    logits, labels = run.logits(inputs[split.val]).astype(np.float64), cache.labels[split.val]
    counts = labeled_counts(cache.labels, split, len(cache.class_names))
    figure = classification(logits, labels, counts)[metric]
    told = np.isin(labels, class_groups(counts).get(metric, np.arange(len(counts))))
    loss = mean_loss(logits[told] / run.metrics["temperature"], labels[told], balanced=metric != "accuracy")
    return loss, float("nan") if figure is None else float(figure)


def mean_loss(logits: NDArray[np.float64], labels: NDArray[np.int64], *, balanced: bool) -> float:
    """Mean negative log-likelihood of logits (n, K), NaN without any; balanced, the mean over classes of theirs."""
    if not len(labels):
        return float("nan")
    top = logits.max(1)
    each = np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[np.arange(len(labels)), labels]  # (n,)
    if not balanced:
        return float(each.mean())
    return float(np.mean([each[labels == k].mean() for k in np.unique(labels)]))
