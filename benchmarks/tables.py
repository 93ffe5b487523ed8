"""The tables a benchmark prints: a mean with its interval for each method and cell, and one method against the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks.comparison.cells import Cell
from benchmarks.comparison.contenders import ORACLE
from ulfine_fast.metrics.intervals import Interval, mean_interval

Row = dict[str, Any]
PROBE = "linear_probe"


@dataclass(frozen=True)
class Rows:
    """All rows of a benchmark, in order: one for each cell, method and seed."""

    rows: Sequence[Row]

    def values(self, cell: Cell, method: str, figure: str) -> list[float]:
        """A figure of each seed, NaN where a seed has none."""
        found = [row for row in self.rows if row["method"] == method and row["cell"] == cell.name]
        return [math.nan if row[figure] is None else float(row[figure]) for row in found]

    def mean(self, cell: Cell, method: str, figure: str = "balanced_accuracy") -> float:
        """The mean over seeds, NaN without any."""
        found = mean_interval(self.values(cell, method, figure))
        return math.nan if found is None else found.mean

    def best(self, cell: Cell, methods: Iterable[str]) -> str | None:
        """The method with the highest mean."""
        there = [method for method in methods if self.values(cell, method, "balanced_accuracy")]
        return max(there, key=lambda method: self.mean(cell, method), default=None)

    def difference(self, cell: Cell, method: str, other: str) -> Interval | None:
        """How far a method is above another one, paired over seeds."""
        ours, theirs = (self.values(cell, name, "balanced_accuracy") for name in (method, other))
        return mean_interval(a - b for a, b in zip(ours, theirs, strict=True))

    def recovered(self, cell: Cell, method: str) -> float:
        """The share of the way from the probe to the oracle, as a ratio of mean gains; NaN where either is missing."""
        probe, oracle = self.mean(cell, PROBE), self.mean(cell, ORACLE)
        return (self.mean(cell, method) - probe) / (oracle - probe) if oracle != probe else math.nan


def print_tables(rows: Rows, cells: Sequence[Cell], methods: Sequence[str], against: str) -> None:
    """Print the tables of each data set, as Markdown; shares are in percent."""
    for data in dict.fromkeys(cell.data for cell in cells):
        own = [cell for cell in cells if cell.data == data]
        typer.echo(f"\n{data}: balanced accuracy, mean and 95% interval over seeds")
        _print(_means(rows, own, methods))
        if against in methods and len(methods) > 1:
            typer.echo(f"\n{data}: {against} against the best other method, paired over seeds")
            _print(_against(rows, own, methods, against))


def _means(rows: Rows, cells: Sequence[Cell], methods: Sequence[str]) -> Table:
    """A line for each method, a column for each cell."""
    table = _table(["method", *(f"{cell.counts} {cell.shape}" for cell in cells)])
    for method in methods:
        found = [mean_interval(rows.values(cell, method, "balanced_accuracy")) for cell in cells]
        table.add_row(method, *(_interval(one) for one in found))
    return table


def _against(rows: Rows, cells: Sequence[Cell], methods: Sequence[str], method: str) -> Table:
    """A line for each cell."""
    titles = ["cell", method, "best other", "mean", "difference", "sure", "of the way", "tail - probe"]
    table = _table([*titles, "false conf.", "ECE", "lowest other ECE", "seconds"])
    others = [name for name in methods if name not in (method, ORACLE)]
    for cell in cells:
        table.add_row(f"{cell.counts} {cell.shape}", *_line(rows, cell, method, others))
    return table


def _line(rows: Rows, cell: Cell, method: str, others: Sequence[str]) -> list[str]:
    """One method's figures in one cell, and how they stand to the others'."""
    best = rows.best(cell, others)
    gap = None if best is None else rows.difference(cell, method, best)
    tail = rows.mean(cell, method, "tail_accuracy") - rows.mean(cell, PROBE, "tail_accuracy")
    # the probe trains on no pseudo-label; whether ours is better calibrated is asked of those that do
    rivals = [rows.mean(cell, name, "ece") for name in others if name not in (PROBE, "zero_shot")]
    return [
        _interval(mean_interval(rows.values(cell, method, "balanced_accuracy"))),
        best or "-",
        "-" if best is None else _percent(rows.mean(cell, best)),
        _interval(gap, sign=True),
        "-" if gap is None or math.isnan(gap.half) else ("yes" if gap.mean > gap.half else "no"),
        _percent(rows.recovered(cell, method), digits=0, unit="%"),
        _percent(tail, sign=True),
        _percent(rows.mean(cell, method, "confidence_on_false")),
        _percent(rows.mean(cell, method, "ece")),
        _percent(min((one for one in rivals if not math.isnan(one)), default=math.nan)),
        f"{rows.mean(cell, method, 'seconds'):.1f}",
    ]


def print_table(titles: Sequence[str], lines: Iterable[Sequence[str]], *, texts: int = 1) -> None:
    """Print a Markdown table whose first columns, so many as `texts`, are texts and the others numbers."""
    table = Table(box=MARKDOWN, pad_edge=False)
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i < texts else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    _print(table)


def _table(titles: Sequence[str]) -> Table:
    table = Table(box=MARKDOWN, pad_edge=False)
    for i, title in enumerate(titles):
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    return table


def _print(table: Table) -> None:
    # as wide as it needs, so that a log file holds whole figures
    Console(width=400).print(table)


def _percent(value: float, *, digits: int = 1, sign: bool = False, unit: str = "") -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:{'+' if sign else ''}.{digits}f}{unit}"


def _interval(found: Interval | None, *, sign: bool = False) -> str:
    if found is None:
        return "-"
    half = "" if math.isnan(found.half) else f" ±{100 * found.half:.1f}"
    return _percent(found.mean, sign=sign) + half
