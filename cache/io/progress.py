"""One look for long work: a bar with rate and time left, drawn only on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    """Items done per second."""

    def render(self, task: Task) -> Text:
        """The rate, or a dash before the first item is done."""
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        return Text(f"{speed:,.0f} {unit}/s" if speed else f"- {unit}/s", style="progress.data.speed")


def progress_bar(shown: bool | None = None) -> Progress:
    """A rich progress bar on stderr: description, bar, count, rate, time left and a free text field `note`.

    Args:
        shown: whether to draw it; by default only where stderr is a terminal.

    Add tasks with `add_task(text, total=..., unit="images", note="")`.
    """
    visible = sys.stderr.isatty() if shown is None else shown
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not visible, transient=False)


@contextmanager
def working(text: str, shown: bool | None = None) -> Iterator[None]:
    """A bar that moves while work of unknown length is done, and the seconds it takes; it leaves no trace.

    Args:
        text: what is done, such as "read images".
        shown: see `progress_bar`; there can be one bar at a time.
    """
    visible = sys.stderr.isatty() if shown is None else shown
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not visible, transient=True) as bar:
        bar.add_task(text, total=None)
        yield
