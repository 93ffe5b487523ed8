"""How figures are printed: one table for people, one JSON object for programs."""

from __future__ import annotations

import json
from typing import Any

import typer

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


def print_summary(rows: dict[str, dict[str, Any]], *, as_json: bool) -> None:
    """Print mean and 95% interval over seeds, shares as percent.

    Args:
        rows: a summary (see `ulfine_fast.runs.seeds.summarize`) for each method.
        as_json: print the summaries as they are instead.
    """
    if as_json:
        typer.echo(json.dumps(rows))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("method", "seeds", *COLUMNS.values()):
        table.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    for method, summary in rows.items():
        seeds = max((figure["n"] for figure in summary.values()), default=0)
        table.add_row(method, str(seeds), *(_cell(summary.get(name), name) for name in COLUMNS))
    # wide enough for every column, so that a log file holds whole figures
    Console(width=max(130, Console().width)).print(table)


def _cell(figure: dict[str, Any] | None, name: str) -> str:
    if figure is None:
        return "-"
    if name == "seconds":
        return f"{figure['mean']:.1f}"
    interval = f" ±{100 * figure['half_width']:.1f}" if figure["n"] > 1 else ""
    return f"{100 * figure['mean']:.1f}{interval}"
