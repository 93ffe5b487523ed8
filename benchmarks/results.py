"""Rows of results: grouped, averaged over seeds, compared in pairs, printed as tables and written as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from ulfine_fast.cache.io.files import write_atomically
from ulfine_fast.metrics.intervals import Interval, mean_interval

Row = dict[str, Any]
"""What is known of one measurement, by name; JSON values."""


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by their values of these names, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def where(rows: Iterable[Row], **values: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def interval_text(
    interval: Interval | None, *, factor: float = 100.0, digits: int = 1, sign: bool = False, half: bool = True
) -> str:
    """A mean with its 95% interval, such as "71.0 ±2.5"; "-" without one.

    Args:
        interval: over seeds.
        factor: 100 for percent.
        digits: after the point.
        sign: write a plus before positive means.
        half: write the interval; that of a single seed is left out.
    """
    if interval is None:
        return "-"
    mean = f"{factor * interval.mean:{'+' if sign else ''}.{digits}f}"
    return mean if not half or math.isnan(interval.half) else f"{mean} ±{factor * interval.half:.{digits}f}"


def mean_text(rows: Iterable[Row], name: str, *, factor: float = 100.0, digits: int = 1, half: bool = False) -> str:
    """The mean of a metric over the rows that have it, in percent by default; see :func:`interval_text`."""
    values = [float(row[name]) for row in rows if row.get(name) is not None]
    return interval_text(mean_interval(values), factor=factor, digits=digits, half=half)


def gap_text(rows: Sequence[Row], reference: Sequence[Row], name: str, *, digits: int = 1) -> str:
    """How far a metric is above that of the reference rows, with its 95% interval, in percent.

    Args:
        rows: one for each seed.
        reference: rows of the same seeds in the same order; empty text where there are none, or the same ones.
        name: of the metric; a seed that lacks it on either side is left out.
        digits: after the point.
    """
    if not reference or rows == reference:
        return ""
    pairs = [(row[name], other[name]) for row, other in zip(rows, reference, strict=True)]
    gaps = [value - other for value, other in pairs if value is not None and other is not None]
    return interval_text(mean_interval(gaps), digits=digits, sign=True)


def mean_and_gap(rows: Sequence[Row], reference: Sequence[Row], name: str) -> str:
    """A mean with its gap to the reference in one cell, such as "71.0 (+2.0 ±1.5)"."""
    if not any(name in row for row in rows):
        return "-"
    gap = gap_text(rows, reference, name)
    return f"{mean_text(rows, name)} ({gap})" if gap else mean_text(rows, name)


def print_table(titles: Sequence[str], lines: Iterable[Sequence[str]], *, texts: int = 1) -> None:
    """Print a Markdown table of which the first `texts` columns are texts and the others numbers."""
    table = Table(box=MARKDOWN, pad_edge=False)
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i < texts else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    # as wide as it needs, so that a log file holds whole numbers
    Console(width=400).print(table)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; a number that JSON lacks is an error, not a file that others cannot read."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_rows(path: Path | None, rows: Sequence[Row]) -> None:
    """Write rows as JSON, where a file was asked for."""
    if path is not None:
        write_json(path, rows)
