"""Runs of several seeds: one folder each, and the mean of their metrics with a confidence interval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.runs.run import Run

CHECKPOINT = ".checkpoint"
"""Folder inside a run's that an interrupted fit continues from."""

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

MeanMetrics = dict[str, dict[str, float | int]]
"""By metric: mean, half_width of the 95% t-interval (0 for a single run), and n, the runs that have it."""


def mean_metrics(metrics: Sequence[dict[str, Any]]) -> MeanMetrics:
    """Headline metrics over several runs; a metric that no run has is left out.

    Args:
        metrics: those of each run.
    """
    means: MeanMetrics = {}
    for name in HEADLINE:
        interval = mean_interval(values[name] for values in metrics if values.get(name) is not None)
        if interval is not None:
            half_width = 0.0 if interval.n == 1 else interval.half
            means[name] = {"mean": interval.mean, "half_width": half_width, "n": interval.n}
    return means


def save_runs(runs: Sequence[Run], out: Path) -> MeanMetrics:
    """Save one run as `out`, several as `out/seed-N`, with `out/summary.json`; failed runs are left out.

    Returns:
        The mean metrics in summary.json; empty, and nothing written, where all runs failed.

    Raises:
        InputError: `out` cannot be written, or see :func:`refuse_other_content`.
    """
    seeds = [run.config.seed for run in runs]
    refuse_other_content(out, seeds)
    saved = [(run, folder) for run, folder in zip(runs, run_folders(out, seeds), strict=True) if run.status != "failed"]
    if not saved:
        return {}
    for run, folder in saved:
        run.save(folder)
    means = mean_metrics([run.metrics for run, _ in saved])
    content = {
        "format": "ulfine-fast-summary",
        "version": 1,
        "method": runs[0].config.method,
        "seeds": [run.config.seed for run, _ in saved],
        "metrics": means,
    }
    (out / "summary.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return means


def run_folders(out: Path, seeds: Sequence[int]) -> list[Path]:
    """Folders of the runs of these seeds: `out` itself for one, `out/seed-N` for several."""
    return [out] if len(seeds) == 1 else [out / f"seed-{seed}" for seed in seeds]


def refuse_other_content(out: Path, seeds: Sequence[int]) -> None:
    """Refuse a folder with anything but runs which a fit of these seeds replaces.

    Runs of an earlier fit that stay beside new ones would be in every report as if they belonged together.

    Raises:
        InputError: `out` is a file, or a folder of other things or of runs that would stay.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file; name a folder for the run")
    runs = {file.parent for file in (out / "config.json", *out.glob("*/config.json")) if file.exists()}
    content = [path for path in out.iterdir() if path.name != CHECKPOINT]
    if content and not (runs or (out / "summary.json").exists()):
        raise InputError(f"{out} exists and is no run; name a new folder")
    staying = sorted(runs - set(run_folders(out, seeds)))
    if staying:
        raise InputError(f"{staying[0]} holds a run that this fit does not replace; name a new folder or remove it")
