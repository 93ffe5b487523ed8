"""The results: the table of methods with means over seeds, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ulfine_fast.metrics.intervals import Interval
from ulfine_fast.report.charts import legend_mark
from ulfine_fast.report.formats import number_range, percent
from ulfine_fast.report.groups import Group, held_out_difference, indistinguishable, paired_difference


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the results table.

    Attributes:
        key: metric.
        title: heading.
        hint: its meaning, for the heading's tooltip and the list below the table.
        sign: 1 where larger is better, -1 where smaller is better, 0 where the best is not marked.
        percent: whether the metric is a fraction, shown in percent.
        beside: name and key of another metric shown in small print beside it.
        ends: key of the interval of each run, where that over seeds would be too narrow.
    """

    key: str
    title: str
    hint: str
    sign: int = 1
    percent: bool = True
    beside: tuple[str, str] | None = None
    ends: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """A number in a table.

    Attributes:
        text: the mean.
        half: half width of its interval, "" without one.
        best: whether it is marked as the best of its column.
        beside: small print beside it.
    """

    text: str
    half: str = ""
    best: bool = False
    beside: str = ""


COLUMNS = (
    Column("val.balanced_accuracy", "validation", "balanced accuracy on the validation rows; used for every choice", 0),
    Column(
        "cross_validation.balanced_accuracy",
        "balanced, cross-validated",
        "mean of the classes' accuracies on labelled images that each fold holds out, with the 95% interval of these "
        "images; used for every choice",
        ends="balanced_accuracy_interval",
    ),
    Column("cross_validation.accuracy", "overall, cross-validated", "accuracy over the labelled images held out"),
    Column(
        "cross_validation.ece_temperature_scaled",
        "ECE, cross-validated",
        "expected calibration error on the labelled images held out, after temperature scaling on them; raw: before it",
        -1,
        beside=("raw", "cross_validation.ece"),
    ),
    Column("accuracy", "overall", "accuracy over all test rows"),
    Column("balanced_accuracy", "balanced", "mean of the classes' accuracies"),
    Column("many", "many", "mean accuracy of the third of the classes with most labelled images"),
    Column("medium", "medium", "mean accuracy of the middle third"),
    Column("few", "few", "mean accuracy of the third of the classes with fewest labelled images"),
    Column("worst_class", "worst class", "accuracy of the worst class"),
    Column(
        "ece_temperature_scaled",
        "ECE",
        "expected calibration error in 15 bins, after temperature scaling on the validation rows; raw: before it",
        -1,
        beside=("raw", "ece"),
    ),
    Column("pseudo_label_precision", "pseudo-label precision", "fraction of the kept pseudo-labels that are correct"),
    Column(
        "confidence_on_false", "confidence on false", "mean confidence of the kept pseudo-labels that are wrong", -1
    ),
    Column(
        "seconds",
        "seconds",
        "seconds of fitting per seed; seeds that are fitted together share the time",
        0,
        percent=False,
    ),
)


def summary(groups: Sequence[Group], shown: Group) -> dict[str, Any]:
    """Template values of the first paragraph."""
    part = "cross_validation." if shown.is_cross_validated else ""
    return {
        "chosen": len(groups) > 1,
        "validated": shown.interval(shown.choice) is not None,
        # how the shown group was chosen, and what its metrics are of
        "choice": "validation" if shown.choice.startswith("val.") else "cross-validation",
        "estimated": shown.is_cross_validated,
        "estimated_groups": sum(group.is_cross_validated for group in groups),
        "rows": number_range([len(run.predictions().ids) for run in shown.runs]) if shown.is_cross_validated else "",
        "interval": _ends(shown, "balanced_accuracy_interval"),
        "val_rows": number_range([run.split_rows["val"] for run in shown.runs]),
        "rivals": [group.label for group in indistinguishable(shown, groups)],
        "balanced": _mean_cell(shown.interval(f"{part}balanced_accuracy")),
        "few": _mean_cell(shown.interval(f"{part}few")),
        "seeds": len(shown.runs),
    }


def results_table(groups: Sequence[Group], shown: Group, charted: Sequence[Group]) -> dict[str, Any]:
    """The columns that any group has, and a row of cells per group; the `charted` groups have a mark."""
    columns = [column for column in COLUMNS if any(group.interval(column.key) for group in groups)]
    cells = [_column_cells(groups, column) for column in columns]
    rows = [
        {
            "group": group,
            "mark": legend_mark(charted.index(group)) if group in charted else "",
            "shown": group is shown,
            "cells": [column_cells[i] for column_cells in cells],
        }
        for i, group in enumerate(groups)
    ]
    return {"columns": columns, "rows": rows}


def paired_table(groups: Sequence[Group], shown: Group) -> dict[str, Any] | None:
    """Differences between the shown group and each other one on the same images; None where no group shares them.

    With a test split these are pairs of seeds with one split, at least two; by cross-validation the labelled images
    that both hold out.
    """
    if shown.is_cross_validated:
        return _held_out_table(groups, shown)
    keys = ("accuracy", "balanced_accuracy", "few")
    rows = []
    for group in groups:
        differences = [paired_difference(shown, group, key) for key in keys]
        seeds = max((difference.n for difference in differences if difference), default=0)
        if group is not shown and seeds > 1:
            cells = [_signed(_mean_cell(difference)) for difference in differences]
            rows.append({"group": group, "shared": seeds, "cells": cells})
    titles = ("overall", "balanced", "few")
    return {"titles": titles, "rows": rows, "by": "seed", "apart": []} if rows else None


def _held_out_table(groups: Sequence[Group], shown: Group) -> dict[str, Any] | None:
    """The same on labelled images that cross-validation held out, and which groups hold out other ones."""
    rows, apart = [], []
    for group in groups:
        if group is shown:
            continue
        differences = [held_out_difference(shown, group, balanced=balanced) for balanced in (False, True)]
        if differences[1] is None:
            reason = "was fitted on other labels" if group.is_cross_validated else "has a test split"
            apart.append(f"{group.label} {reason}")
            continue
        cells = [_signed(_mean_cell(difference)) for difference in differences]
        rows.append({"group": group, "shared": differences[1].n, "cells": cells})
    return {"titles": ("overall", "balanced"), "rows": rows, "by": "image", "apart": apart} if rows or apart else None


def _column_cells(groups: Sequence[Group], column: Column) -> list[Cell]:
    """One cell per group; all that show the best number of the column are marked, unless all show the same."""
    cells = [_mean_cell(group.interval(column.key), scale=100.0 if column.percent else 1.0) for group in groups]
    # numbers are compared as printed: a mark on one of two equal numbers would look like a mistake
    printed = {column.sign * float(cell.text) for cell in cells if cell.text != "–"}
    if column.key.startswith("cross_validation."):
        # the same labels for every seed: an interval over seeds would be too narrow
        cells = [replace(c, half="", beside=_ends(group, column.ends)) for c, group in zip(cells, groups, strict=True)]
    if column.sign and len(printed) > 1:
        best = max(printed)
        cells = [replace(c, best=c.text != "–" and column.sign * float(c.text) == best) for c in cells]
    if column.beside is not None:
        name, key = column.beside
        for i, group in enumerate(groups):
            if (interval := group.interval(key)) is not None:
                cells[i] = replace(cells[i], beside=f"{name} {percent(interval.mean)}")
    return cells


def _ends(group: Group, key: str) -> str:
    """Mean ends, over the seeds, of an interval by cross-validation; empty without one."""
    ends = [(run.metrics.get("cross_validation") or {}).get(key) for run in group.runs]
    known = np.array([pair for pair in ends if pair])
    return "–".join(f"{100 * end:.1f}" for end in known.mean(0)) if len(known) else ""


def _mean_cell(interval: Interval | None, scale: float = 100.0) -> Cell:
    if interval is None:
        return Cell("–")
    half = f"{scale * interval.half:.1f}" if math.isfinite(interval.half) else ""
    return Cell(f"{scale * interval.mean:.1f}", half)


def _signed(cell: Cell) -> Cell:
    """The cell of a difference: + or a true minus sign before the number, none before zero."""
    if cell.text in ("–", "0.0", "-0.0"):
        return replace(cell, text=cell.text.replace("-", ""))
    return replace(cell, text=cell.text.replace("-", "−") if cell.text.startswith("-") else f"+{cell.text}")
