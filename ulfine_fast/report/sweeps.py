"""The section about sweeps: the best trials of each, and which settings matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.report.charts import bar_chart
from ulfine_fast.report.groups import Group
from ulfine_fast.report.plugins import sweep_notes
from ulfine_fast.report.sweep_links import links_to_refits
from ulfine_fast.search.saved import Refit, is_of_another_program, read_sweep

_TRIALS = 30  # rows of the leaderboard on the page
_BARS = 12  # settings in a chart of importance


@dataclass(frozen=True, slots=True)
class SweepFiles:
    """The content of a sweep's folder.

    Attributes:
        path: the folder.
        metrics: validation metrics that the sweep optimised.
        counts: number of trials by state.
        leaderboard: rows of leaderboard.csv, best first.
        importance: metric -> setting -> fraction of the importance, 0..1.
        refits: the trials that were refit, best first.
        notes: text that other packages add below the table.
    """

    path: Path
    metrics: list[str]
    counts: dict[str, int]
    leaderboard: list[dict[str, str]]
    importance: dict[str, dict[str, float]]
    refits: list[Refit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def settings(self) -> list[str]:
        """Names of the searched settings: the leaderboard's columns besides rank, trial, seeds and metrics."""
        others = {"rank", "trial", "seeds", *self.metrics, *(f"{metric}_half_width" for metric in self.metrics)}
        return [name for name in (self.leaderboard[0] if self.leaderboard else {}) if name not in others]


def find_sweeps(paths: Sequence[Path]) -> list[SweepFiles]:
    """Read every sweep at or below the given folders.

    Raises:
        InputError: a sweep's file is missing or damaged.
    """
    folders = dict.fromkeys(file.parent for path in paths for file in sorted(Path(path).rglob("sweep.json")))
    return [sweep for folder in folders if (sweep := _read_sweep(folder)) is not None]


def sweeps_section(
    sweeps: Sequence[SweepFiles], groups: Sequence[Group] = (), page: Path | None = None
) -> list[dict[str, Any]]:
    """Template values: leaderboard, importance and refits of each sweep.

    Args:
        sweeps: to show.
        groups: the runs on the page.
        page: where the page will be; None for one without links to files.
    """
    sections = []
    for sweep in sweeps:
        # the leaderboard: "mean ± half width" of each metric, then the settings
        rows = []
        for entry in sweep.leaderboard[:_TRIALS]:
            cells = []
            for metric in sweep.metrics:
                mean, half = _to_float(entry.get(metric)), _to_float(entry.get(f"{metric}_half_width"))
                cells.append((_four_decimals(mean), _four_decimals(half) if math.isfinite(half) else ""))
            rows.append(
                {
                    "rank": entry.get("rank", ""),
                    "trial": entry.get("trial", ""),
                    "metrics": cells,
                    "settings": [_shorten(entry.get(name) or "") for name in sweep.settings],
                }
            )

        # the importance: the settings with the largest fractions
        charts = []
        for metric, fractions in sweep.importance.items():
            if fractions:
                largest = sorted(fractions.items(), key=lambda item: -item[1])[:_BARS]
                charts.append(bar_chart(f"importance for {metric}, %", largest))

        numeric = {name: all(math.isfinite(_to_float(e[name])) for e in sweep.leaderboard) for name in sweep.settings}
        sections.append(
            {
                "path": str(sweep.path),
                "counts": ", ".join(f"{count:,} {state}" for state, count in sorted(sweep.counts.items())),
                "metrics": sweep.metrics,
                "settings": list(numeric.items()),
                "rows": rows,
                "left_out": max(0, len(sweep.leaderboard) - _TRIALS),
                "charts": charts,
                "refits": links_to_refits(sweep.path, sweep.refits, groups, page),
                "notes": sweep.notes,
            }
        )
    return sections


def _read_sweep(folder: Path) -> SweepFiles | None:
    """The sweep in a folder; None where `sweep.json` is another program's."""
    try:
        if is_of_another_program(folder):
            return None
        saved = read_sweep(folder)
        return SweepFiles(
            path=folder,
            metrics=saved.summary.metrics,
            counts=saved.summary.counts,
            leaderboard=saved.leaderboard,
            importance=saved.importance,
            refits=saved.summary.best,
            notes=sweep_notes(folder),
        )
    except (OSError, InputError) as error:
        raise InputError(f"the sweep in {folder} cannot be read ({error}); run it again, which goes on") from error


def _to_float(text: str | None) -> float:
    """The number in a cell; NaN where it holds none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _four_decimals(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


def _shorten(text: str) -> str:
    """A number with four significant digits; whole numbers and other text as they are."""
    value = _to_float(text)
    return text if not math.isfinite(value) or value == int(value) else f"{value:.4g}"
