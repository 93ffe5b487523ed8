"""How metrics are printed: one table for people, one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer

from ulfine_fast.cache.io.terminal import printable

ESTIMATED = {
    "cross_validated_accuracy": "overall (cv)",
    "cross_validated_balanced_accuracy": "balanced (cv)",
    "cross_validated_ece": "ECE (cv)",
}
COLUMNS = {
    "accuracy": "overall",
    "balanced_accuracy": "balanced",
    "many": "many",
    "medium": "medium",
    "few": "few",
    "ece_temperature_scaled": "ECE",
    "pseudo_label_precision": "PL precision",
    "seconds": "seconds",
}


def print_metrics(rows: Mapping[str, Mapping[str, Any]], *, as_json: bool = False) -> None:
    """Print mean and 95% interval over seeds, fractions as percent; cv: estimated by cross-validation.

    Args:
        rows: mean metrics (see `ulfine_fast.runs.seeds.mean_metrics`) by the title of their row, such as the method.
        as_json: print them as they are instead.
    """
    if as_json:
        typer.echo(json.dumps(rows))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # without a test split there are estimates instead; groups of classes are no column where their counts are equal
    present = {name for metrics in rows.values() for name in metrics}
    estimated = {name: title for name, title in ESTIMATED.items() if name in present}
    tested = {
        name: title
        for name, title in COLUMNS.items()
        if name in present or not (estimated or name in ("many", "medium", "few"))
    }
    columns = {**estimated, **tested}

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("method", "seeds", *columns.values()):
        table.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    for method, metrics in rows.items():
        seeds = max((metric["n"] for metric in metrics.values()), default=0)
        table.add_row(escape(printable(method)), str(seeds), *(_cell(metrics.get(name), name) for name in columns))
    # wide enough for every column, so that a log file holds whole numbers
    Console(width=max(130, Console().width)).print(table)


def _cell(metric: dict[str, Any] | None, name: str) -> str:
    if metric is None:
        return "-"
    if name == "seconds":
        return f"{metric['mean']:.1f}"
    if "low" in metric:
        return f"{100 * metric['mean']:.1f} [{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]"
    interval = f" ±{100 * metric['half_width']:.1f}" if metric["n"] > 1 and "half_width" in metric else ""
    return f"{100 * metric['mean']:.1f}{interval}"
