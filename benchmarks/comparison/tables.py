"""The tables of a comparison: a mean with its interval for each method and cell, and one method against the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import typer

from benchmarks.comparison.cells import Cell
from benchmarks.comparison.contenders import ORACLE
from benchmarks.results import Row, interval_text, print_table
from ulfine_fast.metrics.intervals import Interval, mean_interval

PROBE = "linear_probe"


@dataclass(frozen=True)
class Rows:
    """All rows of a comparison, in order: one for each cell, method and seed."""

    rows: Sequence[Row]

    def values(self, cell: Cell, method: str, metric: str = "balanced_accuracy") -> list[float]:
        """A metric of each seed, NaN where a seed has none."""
        own = [row for row in self.rows if row["method"] == method and row["cell"] == cell.name]
        return [math.nan if row[metric] is None else float(row[metric]) for row in own]

    def mean(self, cell: Cell, method: str, metric: str = "balanced_accuracy") -> float:
        """The mean over seeds, NaN without any."""
        interval = mean_interval(self.values(cell, method, metric))
        return math.nan if interval is None else interval.mean

    def best(self, cell: Cell, methods: Iterable[str]) -> str | None:
        """The method with the highest mean."""
        measured = [method for method in methods if self.values(cell, method)]
        return max(measured, key=lambda method: self.mean(cell, method), default=None)

    def difference(self, cell: Cell, method: str, other: str) -> Interval | None:
        """How far a method is above another one, paired over seeds."""
        pairs = zip(self.values(cell, method), self.values(cell, other), strict=True)
        return mean_interval(value - reference for value, reference in pairs)

    def recovered(self, cell: Cell, method: str) -> float:
        """A method's gain over the probe as a fraction of the oracle's; NaN where probe or oracle are missing."""
        probe = self.mean(cell, PROBE)
        oracle = self.mean(cell, ORACLE)
        return (self.mean(cell, method) - probe) / (oracle - probe) if oracle != probe else math.nan


def print_tables(rows: Rows, cells: Sequence[Cell], methods: Sequence[str], against: str) -> None:
    """Print the tables of each data set, as Markdown; accuracies are in percent."""
    for data in dict.fromkeys(cell.data for cell in cells):
        own_cells = [cell for cell in cells if cell.data == data]
        typer.echo(f"\n{data}: balanced accuracy, mean and 95% interval over seeds")
        lines = [
            [method, *(interval_text(mean_interval(rows.values(cell, method))) for cell in own_cells)]
            for method in methods
        ]
        print_table(["method", *(f"{cell.counts} {cell.shape}" for cell in own_cells)], lines)

        if against in methods and len(methods) > 1:
            typer.echo(f"\n{data}: {against} against the best other method, paired over seeds")
            titles = ["cell", against, "best other", "mean", "difference", "sure", "of the way", "tail - probe"]
            titles += ["false conf.", "ECE", "lowest other ECE", "seconds"]
            print_table(titles, [_line(rows, cell, against, methods) for cell in own_cells])


def _line(rows: Rows, cell: Cell, method: str, methods: Sequence[str]) -> list[str]:
    """One method's metrics in one cell, compared with those of the others."""
    others = [name for name in methods if name not in (method, ORACLE)]
    best = rows.best(cell, others)
    gap = None if best is None else rows.difference(cell, method, best)
    tail = rows.mean(cell, method, "tail_accuracy") - rows.mean(cell, PROBE, "tail_accuracy")
    # the probe trains on no pseudo-label; calibration is compared with methods that do
    rivals = [rows.mean(cell, name, "ece") for name in others if name not in (PROBE, "zero_shot")]
    return [
        f"{cell.counts} {cell.shape}",
        interval_text(mean_interval(rows.values(cell, method))),
        best or "-",
        "-" if best is None else _percent(rows.mean(cell, best)),
        interval_text(gap, sign=True),
        "-" if gap is None or math.isnan(gap.half) else ("yes" if gap.mean > gap.half else "no"),
        _percent(rows.recovered(cell, method), digits=0, unit="%"),
        _percent(tail, sign=True),
        _percent(rows.mean(cell, method, "confidence_on_false")),
        _percent(rows.mean(cell, method, "ece")),
        _percent(min((ece for ece in rivals if not math.isnan(ece)), default=math.nan)),
        f"{rows.mean(cell, method, 'seconds'):.1f}",
    ]


def _percent(value: float, *, digits: int = 1, sign: bool = False, unit: str = "") -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:{'+' if sign else ''}.{digits}f}{unit}"
