"""The sections about classes, pseudo-labels, calibration, confusion, images and settings, as template values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from ulfine_fast.report import calibration, charts, confusion, gallery
from ulfine_fast.report.groups import Group, nan_mean, rank_order, same_counts, tail_third
from ulfine_fast.report.headline import number_range, percent
from ulfine_fast.runs.files import Predictions, RunFiles

_MATRIX = 30  # classes up to which a confusion matrix can be read
_SHOTS = 12  # images on a shelf: divides by the columns of phones and desks
_PLACES = 40  # classes up to which each has a place of its own in a chart


def classes_section(lines: Sequence[Group], shown: Group) -> dict[str, Any]:
    """Accuracy by labelled count: by class where every run has the same counts, else by rank over the seeds."""
    fixed, classes = same_counts(lines), len(shown.runs[0].class_names)
    series = [_rank_series(i, group, "per_class_accuracy") for i, group in enumerate(lines)]
    counts = _by_rank(shown, "class_counts")
    axis = "class, most labelled images first" if fixed else "rank of the class by labelled images, 1 = most"
    if classes > _PLACES:
        axis += f"; each point is the mean of {math.ceil(classes / 30)} neighbouring ranks"
    chart = charts.class_chart(
        [_thinned(one) for one in series], _thin(counts), _ticks(shown, fixed), _class_summary(series), axis
    )
    return {
        "chart": chart,
        "fixed": fixed,
        "one_tail": all(np.allclose(_by_rank(group, "class_counts"), counts, equal_nan=True) for group in lines),
        "table": _class_table(lines, shown, fixed),
        "lines": lines,
    }


def _by_rank(group: Group, key: str) -> np.ndarray:
    """Mean over the seeds (K,) of a per-class metric, classes in each seed's own order of labelled count."""
    return nan_mean(np.stack([run.per_class(key)[rank_order(run)] for run in group.runs]), axis=0)  # (seeds, K) -> (K,)


def _rank_series(slot: int, group: Group, key: str) -> charts.Series:
    values = _by_rank(group, key)
    return charts.Series(group.name, slot, np.arange(len(values), dtype=np.float64), values)


def _thin(values: np.ndarray) -> np.ndarray:
    return values if len(values) <= _PLACES else charts.binned(values, 30)


def _thinned(series: charts.Series) -> charts.Series:
    values = _thin(series.y)
    return charts.Series(series.label, series.slot, np.arange(len(values), dtype=np.float64), values)


def _ticks(shown: Group, fixed: bool) -> list[str]:
    names, classes = shown.runs[0].class_names, len(shown.runs[0].class_names)
    if fixed and classes <= 14:
        return [names[k] for k in rank_order(shown.runs[0])]
    if classes <= _PLACES:
        return [str(i + 1) for i in range(classes)]
    starts = [int(part[0]) + 1 for part in np.array_split(np.arange(classes), 30)]
    return [str(start) if i % 3 == 0 else "" for i, start in enumerate(starts)]


def _class_summary(series: Sequence[charts.Series]) -> str:
    ends = [f"{s.label} from {percent(s.y[0])} at the most labelled to {percent(s.y[-1])} at the least" for s in series]
    return f"Accuracy per class in percent, ordered by labelled images: {'; '.join(ends)}"


def _class_table(lines: Sequence[Group], shown: Group, fixed: bool) -> list[dict[str, Any]]:
    """A row per class name: labelled images over the shown group's seeds, mean accuracy of every charted group."""
    counts = np.stack([run.per_class("class_counts") for run in shown.runs])  # (seeds, K)
    means = [nan_mean(np.stack([r.per_class("per_class_accuracy") for r in g.runs]), axis=0) for g in lines]
    order = rank_order(shown.runs[0]) if fixed else np.arange(counts.shape[1])
    names = shown.runs[0].class_names
    return [
        {
            "name": names[k],
            "labelled": number_range(counts[:, k].tolist()),
            "values": [percent(float(m[k])) for m in means],
        }
        for k in order
    ]


def pseudo_section(lines: Sequence[Group]) -> dict[str, Any]:
    """Panels over steps and, at the end of training, over the rank of the class."""
    panels = [
        _steps_panel("rate, %", lines, "pseudo_label_rate"),
        _steps_panel("precision, %", lines, "pseudo_label_precision"),
        _steps_panel("confidence on the false, %", lines, "confidence_on_false"),
        _steps_panel("recall, mean of classes, %", lines, "recall_"),
        _steps_panel("precision, few third, %", lines, "precision_", tail=True),
        _steps_panel("recall, few third, %", lines, "recall_", tail=True),
        _ranks_panel("precision at the end, by rank, %", lines, "per_class_pseudo_label_precision"),
        _ranks_panel("recall at the end, by rank, %", lines, "per_class_pseudo_label_recall"),
    ]
    stepless = [g for g in lines if not np.isfinite(_over_steps(g, "pseudo_label_rate", False)[1]).any()]
    return {
        "panels": [panel for panel in panels if panel],
        "without": [group.label for group in stepless if group.interval("pseudo_label_rate") is None],
        "stepless": [group.label for group in stepless if group.interval("pseudo_label_rate") is not None],
    }


def _steps_panel(title: str, lines: Sequence[Group], column: str, tail: bool = False) -> Markup | None:
    series = []
    for slot, group in enumerate(lines):
        steps, values = _over_steps(group, column, tail)  # (E,), (seeds, E)
        if np.isfinite(values).any():
            low, high = _extent(values) if len(values) > 1 else (None, None)
            series.append(charts.Series(group.name, slot, steps, nan_mean(values, axis=0), low, high))
    return charts.line_chart(title, series, "step") if series else None


def _ranks_panel(title: str, lines: Sequence[Group], key: str) -> Markup | None:
    series = [_rank_series(slot, group, key) for slot, group in enumerate(lines)]
    series = [charts.Series(s.label, s.slot, _thin(s.x + 1), _thin(s.y)) for s in series if np.isfinite(s.y).any()]
    return charts.line_chart(title, series, "rank by labelled images, 1 = most") if series else None


def _over_steps(group: Group, column: str, tail: bool) -> tuple[np.ndarray, np.ndarray]:
    """Steps (E,) that all seeds were evaluated at, and the column's values there (seeds, E)."""
    histories = [run for run in group.runs if len(run.history.get("step", ()))]
    if not histories:
        return np.empty(0), np.empty((0, 0))
    # only common steps: a mean over changing seeds would jump where one of them has no evaluation
    steps = histories[0].history["step"]
    for run in histories[1:]:
        steps = np.intersect1d(steps, run.history["step"])
    rows = [_column(run, column, tail)[np.isin(run.history["step"], steps)] for run in histories]
    return steps, np.stack(rows)


def _column(run: RunFiles, column: str, tail: bool) -> np.ndarray:
    """One column (E,) of the history; a name that ends in `_` is the mean over its classes, or its tail classes."""
    undefined = np.full(len(run.history["step"]), math.nan)
    if not column.endswith("_"):
        return run.history.get(column, undefined)
    chosen = tail_third(run) if tail else range(len(run.class_names))
    return nan_mean(np.stack([undefined, *(run.history.get(f"{column}{k}", undefined) for k in chosen)]), axis=0)


def _extent(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    defined = np.isfinite(values)
    none = ~defined.any(axis=0)
    low, high = np.where(defined, values, math.inf).min(axis=0), np.where(defined, values, -math.inf).max(axis=0)
    return np.where(none, math.nan, low), np.where(none, math.nan, high)


def calibration_section(shown: Group, rows: Sequence[Predictions]) -> dict[str, Any]:
    """Reliability before and, where every run has a temperature, after temperature scaling."""
    saved = calibration.pooled(rows)
    panels = [("as predicted", saved)]
    temperatures = [run.number("temperature") for run in shown.runs]
    if all(math.isfinite(t) and t > 0 for t in temperatures) and any(t != 1 for t in temperatures):
        raw = calibration.pooled(rows, temperatures)
        panels = [("before temperature scaling", raw), ("after temperature scaling", saved)]
    return {
        "charts": [charts.reliability_chart(f"{title}: ECE {percent(b.ece)}%", b) for title, b in panels],
        "tables": [(title, _bin_table(b)) for title, b in panels],
        "rows": int(saved.count.sum()),
        "temperature": _temperature_text([t for t in temperatures if math.isfinite(t)]),
    }


def _temperature_text(values: Sequence[float]) -> str:
    texts = sorted({f"{value:.2f}" for value in values}, key=float)
    return "–".join(dict.fromkeys([texts[0], texts[-1]])) if texts else ""


def _bin_table(bins: calibration.Reliability) -> list[dict[str, str]]:
    n = len(bins.count)
    return [
        {
            "range": f"{100 * i / n:.1f}–{100 * (i + 1) / n:.1f}",
            "rows": f"{bins.count[i]:,}",
            "confidence": percent(float(bins.confidence[i])),
            "accuracy": percent(float(bins.accuracy[i])),
        }
        for i in range(n)
        if bins.count[i]
    ]


def confusion_section(shown: Group, rows: Sequence[Predictions]) -> dict[str, Any]:
    """A matrix for few classes, the most confused pairs for many."""
    classes = len(shown.runs[0].class_names)
    pairs = confusion.pair_counts(rows, classes)
    # permuted classes have no common order by labels, so they keep their own
    order = rank_order(shown.runs[0]) if same_counts([shown]) else np.arange(classes)
    matrix = confusion.share_matrix(pairs, classes)[np.ix_(order, order)].tolist() if classes <= _MATRIX else None
    return {
        "matrix": matrix,
        "order": order.tolist(),
        "by_count": same_counts([shown]),
        "pairs": confusion.most_confused(pairs, 5 if matrix else 30),
    }


def gallery_section(
    shown: Group, rows: Predictions, images: Callable[[str], Image.Image] | None
) -> dict[str, Any] | None:
    """Three shelves of the first seed's test rows; the tail classes differ from seed to seed, so one seed it is."""
    if images is None:
        return None
    run = shown.runs[0]
    counts = run.per_class("class_counts")
    chosen = [
        ("Most confident wrong", gallery.most_confident_wrong(rows, _SHOTS)),
        ("Least confident", gallery.least_confident(rows, _SHOTS)),
    ]
    for k in rank_order(run)[::-1][:3].tolist():
        words = f"Tail class: {run.class_names[k]} ({number_range([counts[k]])} labelled)"
        chosen.append((words, gallery.of_class(rows, k, _SHOTS)))
    shelves = [(heading, gallery.take(rows, picked, images)) for heading, picked in chosen]
    return {"seed": run.seed, "shelves": shelves, "unread": sum(gallery.unread(shots) for _, shots in shelves)}


def settings_section(groups: Sequence[Group], repeated: Sequence[RunFiles]) -> dict[str, Any]:
    """What was the same in all runs, what differed, and where everything came from."""
    runs = [run for group in groups for run in group.runs]
    fields = list(
        dict.fromkeys(field for run in runs for field in run.config if field not in ("method", "seed", "split_seed"))
    )
    values = {field: [_value(group.runs[0].config, field) for group in groups] for field in fields}
    return {
        "common": [(field, row[0]) for field, row in values.items() if len(set(row)) == 1],
        "differing": [(field, row) for field, row in values.items() if len(set(row)) > 1],
        "groups": [_group_facts(group) for group in groups],
        "encoders": _distinct(run.encoder for run in runs),
        "caches": [str(cache) for cache in dict.fromkeys(run.cache for run in runs) if cache is not None],
        "rules": list(dict.fromkeys(run.split_rule for run in runs)),
        "created_by": list(dict.fromkeys(run.created_by for run in runs)),
        "repeated": [str(run.path) for run in repeated],
    }


def _value(config: dict[str, Any], field: str) -> str:
    value = config.get(field)
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _group_facts(group: Group) -> dict[str, Any]:
    parts = {part: number_range([run.split_rows[part] for run in group.runs]) for part in group.runs[0].split_rows}
    return {
        "label": group.label,
        "seeds": _seeds_text([run.seed for run in group.runs]),
        "parts": parts,
        "folders": [str(run.path) for run in group.runs],
    }


def _seeds_text(seeds: Sequence[object]) -> str:
    """Write "0–4" for consecutive numbers, else all of them."""
    numbers = sorted(seed for seed in seeds if isinstance(seed, int))
    if len(numbers) == len(seeds) > 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(str(seed) for seed in seeds)


def _distinct(encoders: Iterable[dict[str, Any]]) -> list[list[tuple[str, str]]]:
    texts = dict.fromkeys(json.dumps(encoder, sort_keys=True) for encoder in encoders)
    return [[(key, _value(encoder, key)) for key in encoder] for encoder in map(json.loads, texts)]
