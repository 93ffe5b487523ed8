"""Runs of several seeds: one folder each, and their mean with a confidence interval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.runs.run import Run

CHECKPOINT = ".checkpoint"
"""Folder inside a run's that training which was interrupted goes on from."""

HEADLINE = (
    "accuracy",
    "balanced_accuracy",
    "many",
    "medium",
    "few",
    "worst_class",
    "macro_f1",
    "ece",
    "ece_temperature_scaled",
    "pseudo_label_rate",
    "pseudo_label_precision",
    "confidence_on_false",
    "seconds",
)


def summarize(figures: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | int]]:
    """Headline figures over the metrics of several runs.

    Returns:
        For each figure that some run has: mean, half_width of the 95% t-interval (0 for a single run) and n.
    """
    summary: dict[str, dict[str, float | int]] = {}
    for name in HEADLINE:
        found = mean_interval(row[name] for row in figures if row.get(name) is not None)
        if found is not None:
            half_width = 0.0 if found.n == 1 else found.half
            summary[name] = {"mean": found.mean, "half_width": half_width, "n": found.n}
    return summary


def save_runs(runs: Sequence[Run], out: Path) -> dict[str, dict[str, float | int]]:
    """Save one run as `out`, several as `out/seed-N`, with `out/summary.json` beside them; returns the summary.

    Runs that failed take part in neither.

    Raises:
        InputError: `out` cannot be written, or see :func:`refuse_other_content`.
    """
    seeds = [run.config.seed for run in runs]
    refuse_other_content(out, seeds)
    folders = run_folders(out, seeds)
    good = [(run, folder) for run, folder in zip(runs, folders, strict=True) if run.status != "failed"]
    if not good:
        return {}
    summary = summarize([run.metrics for run, _ in good])
    for run, folder in good:
        run.save(folder)
    seeds = [run.config.seed for run, _ in good]
    content = {"format": "ulfine-fast-summary", "version": 1, "method": runs[0].config.method, "seeds": seeds}
    (out / "summary.json").write_text(json.dumps({**content, "metrics": summary}, indent=2) + "\n", encoding="utf-8")
    return summary


def run_folders(out: Path, seeds: Sequence[int]) -> list[Path]:
    """Where the runs of these seeds go: one run is `out` itself, several are `out/seed-N`."""
    return [out] if len(seeds) == 1 else [out / f"seed-{seed}" for seed in seeds]


def refuse_other_content(out: Path, seeds: Sequence[int]) -> None:
    """Refuse a folder that holds anything but runs which a fit of these seeds replaces.

    Runs of an earlier fit left beside new ones would stand in every report as if they belonged together.

    Raises:
        InputError: `out` is a file, or a folder of other things or of runs that would stay.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file; name a folder for the run")
    found = [path.parent for path in (out / "config.json", *sorted(out.glob("*/config.json"))) if path.exists()]
    others = [path for path in out.iterdir() if path.name != CHECKPOINT]
    if others and not (found or (out / "summary.json").exists()):
        raise InputError(f"{out} exists and is no run; name a new folder")
    staying = sorted(set(found) - set(run_folders(out, seeds)))
    if staying:
        raise InputError(f"{staying[0]} holds a run that this fit does not replace; name a new folder or remove it")
