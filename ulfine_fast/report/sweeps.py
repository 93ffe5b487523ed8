"""The section about sweeps: their first trials, and which settings mattered."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.related.forecast.forecast import FORECASTERS
from ulfine_fast.report.charts import share_bars

_FORMAT = "ulfine-fast-sweep"
_TRIALS = 30  # rows of the board that are shown


@dataclass(frozen=True, slots=True)
class SweepFiles:
    """What the files of one sweep's folder say.

    Attributes:
        path: the folder.
        metrics: what was searched for, on validation.
        counts: trials by state.
        board: rows of leaderboard.csv, best first.
        importance: metric -> setting -> share in 0..1.
        forecast: what forecast.json says, None where none was asked for.
    """

    path: Path
    metrics: list[str]
    counts: dict[str, int]
    board: list[dict[str, str]]
    importance: dict[str, dict[str, float]]
    forecast: dict[str, Any] | None = None


def find_sweeps(paths: Sequence[Path]) -> list[SweepFiles]:
    """Reads every sweep at or below the given folders.

    Raises:
        InputError: a sweep's file is missing or damaged.
    """
    folders = {found.parent: None for path in paths for found in sorted(Path(path).rglob("sweep.json"))}
    return [sweep for folder in folders if (sweep := _read(folder)) is not None]


def sweeps_section(sweeps: Sequence[SweepFiles]) -> list[dict[str, Any]]:
    """Board and importance of each sweep, as template values."""
    return [
        {
            "path": str(sweep.path),
            "counts": ", ".join(f"{count:,} {state}" for state, count in sorted(sweep.counts.items())),
            "metrics": sweep.metrics,
            "settings": [(name, _is_numeric(sweep, name)) for name in _settings(sweep)],
            "rows": [_row(sweep, row) for row in sweep.board[:_TRIALS]],
            "left_out": max(0, len(sweep.board) - _TRIALS),
            "charts": _charts(sweep),
            "forecast": sweep.forecast and _forecast(sweep.forecast),
        }
        for sweep in sweeps
    ]


def _read(folder: Path) -> SweepFiles | None:
    try:
        about = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        # other programs may have a sweep.json too
        if not isinstance(about, dict) or about.get("format") != _FORMAT:
            return None
        with (folder / "leaderboard.csv").open(newline="", encoding="utf-8") as file:
            board = list(csv.DictReader(file))
        importance = json.loads((folder / "importance.json").read_text(encoding="utf-8"))
        shares = {str(m): {str(n): float(s) for n, s in found.items()} for m, found in importance.items()}
        counts = {str(state): int(count) for state, count in about["counts"].items()}
        metrics = [str(metric) for metric in about["metrics"]]
        return SweepFiles(folder, metrics, counts, board, shares, _read_forecast(folder / "forecast.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise InputError(f"the sweep in {folder} cannot be read ({error}); run it again, which goes on") from error


def _read_forecast(path: Path) -> dict[str, Any] | None:
    """The file, None where there is none; what a line of the page needs of it is there."""
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    _forecast(found)
    return found


def _forecast(told: dict[str, Any]) -> str:
    """A line on what the sweep's best trial would reach, or why that is not said."""
    about = f"Forecast of trial {told['trial']} over {told['over']}"
    if told["forecast"] is None:
        return f"{about}: refused, {told['refused']}."
    figures = told["forecast"]["figures"]
    each = [
        f"{one['value']:.4f} ({one['low']:.4f} to {one['high']:.4f}) {FORECASTERS[n]}" for n, one in figures.items()
    ]
    sizes = f"from {told['curve']['budgets'][-1]:g} to {told['forecast']['target']:g}"
    return f"{about}, {sizes}, {told['metric']}: {'; '.join(each)}."


def _settings(sweep: SweepFiles) -> list[str]:
    """Names of the searched settings, the columns of the board that are nothing else."""
    others = {"rank", "trial", "seeds", *sweep.metrics, *(f"{metric}_half_width" for metric in sweep.metrics)}
    return [name for name in (sweep.board[0] if sweep.board else {}) if name not in others]


def _is_numeric(sweep: SweepFiles, setting: str) -> bool:
    return all(math.isfinite(_number(row[setting])) for row in sweep.board)


def _row(sweep: SweepFiles, row: dict[str, str]) -> dict[str, Any]:
    figures = [(_number(row.get(metric)), _number(row.get(f"{metric}_half_width"))) for metric in sweep.metrics]
    return {
        "rank": row.get("rank", ""),
        "trial": row.get("trial", ""),
        "figures": [(_four(mean), _four(half) if math.isfinite(half) else "") for mean, half in figures],
        "settings": [_short(row.get(name) or "") for name in _settings(sweep)],
    }


def _charts(sweep: SweepFiles) -> list[Markup]:
    return [
        share_bars(f"share in what moves {metric}, %", sorted(shares.items(), key=lambda item: -item[1])[:12])
        for metric, shares in sweep.importance.items()
        if shares
    ]


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _four(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


def _short(text: str) -> str:
    """A drawn number with as many digits as tell something; other settings as they are."""
    value = _number(text)
    return text if not math.isfinite(value) or value == int(value) else f"{value:.4g}"
