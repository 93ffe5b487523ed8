"""One look for long work: a bar with rate and time left, drawn only on a terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
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
