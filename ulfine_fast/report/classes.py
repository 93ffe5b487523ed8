"""Two sections about classes by labelled count: accuracy per class, and the quality of pseudo-labels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ulfine_fast.report.charts import Series, binned, class_chart, line_chart
from ulfine_fast.report.formats import number_range, percent
from ulfine_fast.report.groups import Group, nan_mean, rank_order, same_counts, tail_third
from ulfine_fast.runs.files import RunFiles

_POSITIONS = 40  # classes up to which each has its own position in a chart
_BINS = 30  # positions in a chart of more classes
_NAMED = 14  # classes up to which their names fit below a chart


def classes_section(charted: Sequence[Group], shown: Group) -> dict[str, Any]:
    """Template values of the accuracy per class, as a chart by rank and a table by name.

    Rank 1 is the class with most labelled images. Where runs differ in these counts, a rank is another class in each
    run, and the chart has means over the seeds.
    """
    names = shown.runs[0].class_names
    classes = len(names)
    fixed = same_counts(charted)

    # below the chart: class names or ranks
    axis = "class, most labelled images first" if fixed else "rank of the class by labelled images, 1 = most"
    if classes > _POSITIONS:
        axis += f"; each point is the mean of {math.ceil(classes / _BINS)} neighbouring ranks"
        starts = [int(ranks[0]) + 1 for ranks in np.array_split(np.arange(classes), _BINS)]
        ticks = [str(start) if i % 3 == 0 else "" for i, start in enumerate(starts)]
    elif fixed and classes <= _NAMED:
        ticks = [names[k] for k in rank_order(shown.runs[0])]
    else:
        ticks = [str(rank + 1) for rank in range(classes)]

    # the chart
    accuracies = [_mean_by_rank(group, "per_class_accuracy") for group in charted]
    counts = _mean_by_rank(shown, "class_counts")
    series = []
    for slot, (group, accuracy) in enumerate(zip(charted, accuracies, strict=True)):
        points = _thinned(accuracy)
        series.append(Series(group.name, slot, np.arange(len(points), dtype=np.float64), points))
    ends = [f"{g.name} from {percent(a[0])} to {percent(a[-1])}" for g, a in zip(charted, accuracies, strict=True)]
    spoken = f"Accuracy in percent, from the class with most labelled images to that with fewest: {'; '.join(ends)}"

    # the table: labelled images over the shown group's seeds, mean accuracy of every charted group
    labelled = np.stack([run.per_class("class_counts") for run in shown.runs])  # (seeds, K)
    means = [nan_mean(np.stack([run.per_class("per_class_accuracy") for run in g.runs]), axis=0) for g in charted]
    table = [
        {
            "name": names[k],
            "labelled": number_range(labelled[:, k].tolist()),
            "values": [percent(float(mean[k])) for mean in means],
        }
        for k in (rank_order(shown.runs[0]) if fixed else range(classes))
    ]
    return {
        "chart": class_chart(series, _thinned(counts), ticks, spoken, axis),
        "fixed": fixed,
        "one_tail": all(np.allclose(_mean_by_rank(g, "class_counts"), counts, equal_nan=True) for g in charted),
        "table": table,
        "charted": charted,
    }


def pseudo_labels_section(charted: Sequence[Group]) -> dict[str, Any]:
    """Template values of the pseudo-labels: charts over steps and, at the end of training, over the classes' ranks."""

    def all_classes(run: RunFiles) -> np.ndarray:
        return np.arange(len(run.class_names))

    charts = [
        _chart_over_steps("rate, %", charted, "pseudo_label_rate"),
        _chart_over_steps("precision, %", charted, "pseudo_label_precision"),
        _chart_over_steps("confidence on false, %", charted, "confidence_on_false"),
        _chart_over_steps("recall, mean of classes, %", charted, "recall", all_classes),
        _chart_over_steps("precision, few third, %", charted, "precision", tail_third),
        _chart_over_steps("recall, few third, %", charted, "recall", tail_third),
        _chart_over_ranks("precision after training, by rank, %", charted, "per_class_pseudo_label_precision"),
        _chart_over_ranks("recall after training, by rank, %", charted, "per_class_pseudo_label_recall"),
    ]
    without_steps = [g for g in charted if not np.isfinite(_history(g, "pseudo_label_rate")[1]).any()]
    return {
        "charts": [chart for chart in charts if chart is not None],
        "without": [group.label for group in without_steps if group.interval("pseudo_label_rate") is None],
        "without_steps": [group.label for group in without_steps if group.interval("pseudo_label_rate") is not None],
    }


def _chart_over_steps(
    title: str,
    charted: Sequence[Group],
    column: str,
    classes_of: Callable[[RunFiles], np.ndarray] | None = None,
) -> Markup | None:
    """Means over the seeds and their range; None where no group has the column. Arguments as in :func:`_history`."""
    series = []
    for slot, group in enumerate(charted):
        steps, values = _history(group, column, classes_of)  # (E,), (seeds, E)
        if not np.isfinite(values).any():
            continue
        low, high = (np.fmin.reduce(values), np.fmax.reduce(values)) if len(values) > 1 else (None, None)
        series.append(Series(group.name, slot, steps, nan_mean(values, axis=0), low, high))
    return line_chart(title, series, "step") if series else None


def _chart_over_ranks(title: str, charted: Sequence[Group], key: str) -> Markup | None:
    """Means over the seeds of a per-class metric; None where no group has it."""
    series = []
    for slot, group in enumerate(charted):
        values = _mean_by_rank(group, key)
        if np.isfinite(values).any():
            ranks = np.arange(1, len(values) + 1, dtype=np.float64)
            series.append(Series(group.name, slot, _thinned(ranks), _thinned(values)))
    return line_chart(title, series, "rank by labelled images, 1 = most") if series else None


def _history(
    group: Group, column: str, classes_of: Callable[[RunFiles], np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A column of history.csv at the steps at which all seeds were evaluated: steps (E,) and values (seeds, E).

    Args:
        group: the runs.
        column: its name; with `classes_of` without the class, as in "recall" for "recall_0", "recall_1", ...
        classes_of: the classes of a run to average over.
    """
    runs = [run for run in group.runs if len(run.history.get("step", ()))]
    if not runs:
        return np.empty(0), np.empty((0, 0))
    # only common steps: a mean over changing seeds would jump where one of them has no evaluation
    steps = functools.reduce(np.intersect1d, [run.history["step"] for run in runs])
    rows = []
    for run in runs:
        undefined = np.full(len(run.history["step"]), math.nan)
        if classes_of is None:
            values = run.history.get(column, undefined)
        else:
            columns = [run.history.get(f"{column}_{k}", undefined) for k in classes_of(run)]
            values = nan_mean(np.stack([undefined, *columns]), axis=0)
        rows.append(values[np.isin(run.history["step"], steps)])
    return steps, np.stack(rows)


def _mean_by_rank(group: Group, key: str) -> np.ndarray:
    """A per-class metric (K,) by rank: mean over the seeds, classes in each seed's own order of labelled count."""
    return nan_mean(np.stack([run.per_class(key)[rank_order(run)] for run in group.runs]), axis=0)  # (seeds, K) -> (K,)


def _thinned(values: np.ndarray) -> np.ndarray:
    """The values (K,), of many classes the means of neighbours."""
    return values if len(values) <= _POSITIONS else binned(values, _BINS)
