"""The headline table: one row per method and setting, means over seeds, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ulfine_fast.metrics.intervals import Interval
from ulfine_fast.report import charts
from ulfine_fast.report.groups import Group, not_told_apart, paired_difference


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the headline table.

    Attributes:
        key: metric.
        title: heading.
        hint: what it is, for the heading's tooltip and the list below the table.
        sign: 1 where larger is better, -1 where smaller is, 0 where no mark is set.
        percent: a share, shown in percent.
        beside: another metric shown small beside it, with its name.
    """

    key: str
    title: str
    hint: str
    sign: int = 1
    percent: bool = True
    beside: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of a table: text, half width of its interval, mark for the best of its column."""

    text: str
    half: str = ""
    best: bool = False
    beside: str = ""


COLUMNS = (
    Column("val.balanced_accuracy", "validation", "balanced accuracy on the validation rows; used for every choice", 0),
    Column("accuracy", "overall", "accuracy over all test rows"),
    Column("balanced_accuracy", "balanced", "mean of the classes' accuracies"),
    Column("many", "many", "mean accuracy of the third of the classes with most labelled images"),
    Column("medium", "medium", "mean accuracy of the middle third"),
    Column("few", "few", "mean accuracy of the third of the classes with fewest labelled images"),
    Column("worst_class", "worst class", "accuracy of the worst class"),
    Column(
        "ece_temperature_scaled",
        "ECE",
        "expected calibration error in 15 bins after temperature scaling on the validation rows, beside it without",
        -1,
        beside=("raw", "ece"),
    ),
    Column("pseudo_label_precision", "pseudo-label precision", "share of right ones among the kept pseudo-labels"),
    Column(
        "confidence_on_false", "confidence on false", "mean confidence of the false pseudo-labels that were kept", -1
    ),
    Column(
        "seconds",
        "seconds",
        "seconds of fitting per seed; seeds that are fitted in one pass share its time",
        0,
        percent=False,
    ),
)


def percent(value: float | None) -> str:
    """A share as percent with one decimal; a dash where it is not defined."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def number_range(values: Sequence[float]) -> str:
    """The defined values as "4" or "2–100", thousands separated; a dash without any."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "–"
    low, high = min(finite), max(finite)
    return f"{low:,.0f}" if low == high else f"{low:,.0f}–{high:,.0f}"


def lead(groups: Sequence[Group], shown: Group) -> dict[str, Any]:
    """What the first paragraph says."""
    val_rows = [run.split_rows["val"] for run in shown.runs]
    return {
        "chosen": len(groups) > 1,
        "validated": shown.interval("val.balanced_accuracy") is not None,
        "val_rows": number_range(val_rows),
        "rivals": [group.label for group in not_told_apart(shown, groups)],
        "balanced": _cell(shown.interval("balanced_accuracy")),
        "few": _cell(shown.interval("few")),
        "seeds": len(shown.runs),
    }


def headline(groups: Sequence[Group], shown: Group, lines: Sequence[Group]) -> dict[str, Any]:
    """Columns that any group has, and a row of cells per group; `lines` are the groups that have a chart mark."""
    columns = [column for column in COLUMNS if any(group.interval(column.key) for group in groups)]
    cells = [_column_cells(groups, column) for column in columns]
    rows = [
        {
            "group": group,
            "mark": charts.legend_mark(lines.index(group)) if group in lines else "",
            "shown": group is shown,
            "cells": [column[i] for column in cells],
        }
        for i, group in enumerate(groups)
    ]
    return {"columns": columns, "rows": rows}


def _column_cells(groups: Sequence[Group], column: Column) -> list[Cell]:
    """One cell per group; all that show the best number of the column are marked, unless all are the same."""
    intervals = [group.interval(column.key) for group in groups]
    shown = [_cell(interval, scale=100.0 if column.percent else 1.0) for interval in intervals]
    # compared as printed: a mark on one of two equal numbers would look like a mistake
    values = [column.sign * float(cell.text) for cell, interval in zip(shown, intervals, strict=True) if interval]
    best = max(values) if column.sign and len(set(values)) > 1 else None
    return [
        Cell(cell.text, cell.half, bool(interval) and column.sign * float(cell.text) == best, _beside(group, column))
        for cell, interval, group in zip(shown, intervals, groups, strict=True)
    ]


def _beside(group: Group, column: Column) -> str:
    if column.beside is None or (interval := group.interval(column.beside[1])) is None:
        return ""
    return f"{column.beside[0]} {percent(interval.mean)}"


def _cell(interval: Interval | None, scale: float = 100.0) -> Cell:
    if interval is None:
        return Cell("–")
    half = f"{scale * interval.half:.1f}" if math.isfinite(interval.half) else ""
    return Cell(f"{scale * interval.mean:.1f}", half)


def paired(groups: Sequence[Group], shown: Group) -> dict[str, Any] | None:
    """Differences of the shown group to each other one on the same splits; None without two shared seeds."""
    keys = ("accuracy", "balanced_accuracy", "few")
    rows = []
    for group in groups:
        differences = [paired_difference(shown, group, key) for key in keys]
        seeds = max((d.n for d in differences if d), default=0)
        if group is not shown and seeds > 1:
            rows.append({"group": group, "seeds": seeds, "cells": [_signed(d) for d in differences]})
    return {"titles": ("overall", "balanced", "few"), "rows": rows} if rows else None


def _signed(interval: Interval | None) -> Cell:
    cell = _cell(interval)
    if interval is None or cell.text in ("0.0", "-0.0"):
        return Cell(cell.text.replace("-", ""), cell.half)
    return Cell(f"+{cell.text}" if interval.mean > 0 else cell.text.replace("-", "−"), cell.half)
