"""Runs of several seeds: one folder each, and the mean of their metrics with a confidence interval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.runs.files import may_replace, write_runs
from ulfine_fast.runs.folder import CONFIG, HIDDEN, STAGING, SUMMARY
from ulfine_fast.runs.run import Run

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

ESTIMATED = {
    "cross_validated_accuracy": "accuracy",
    "cross_validated_balanced_accuracy": "balanced_accuracy",
    "cross_validated_ece": "ece_temperature_scaled",
}
"""Names of the main metrics that cross-validation estimates, and what metrics.json calls them."""

MeanMetrics = dict[str, dict[str, float | int]]
"""By metric: mean, half_width of the 95% t-interval (0 for a single run), and n, the runs that have it.

Estimates by cross-validation are of the same labels for every seed, so that a t-interval over seeds would be too
narrow: where they have an interval, `low` and `high` are the means of its ends, and half_width is half of it.
"""


def mean_metrics(metrics: Sequence[dict[str, Any]], names: Sequence[str] = HEADLINE) -> MeanMetrics:
    """Headline metrics over several runs; a metric that no run has is left out.

    Args:
        metrics: those of each run.
        names: the headline metrics, in their order.
    """
    means: MeanMetrics = {}
    for name in names:
        interval = mean_interval(values[name] for values in metrics if values.get(name) is not None)
        if interval is not None:
            half_width = 0.0 if interval.n == 1 else interval.half
            means[name] = {"mean": interval.mean, "half_width": half_width, "n": interval.n}

    # estimates by cross-validation
    estimates = [values["cross_validation"] for values in metrics if (values.get("cross_validation") or {}).get("rows")]
    for name, key in ESTIMATED.items() if estimates else ():
        means[name] = {"mean": float(np.mean([estimate[key] for estimate in estimates])), "n": len(estimates)}
        if f"{key}_interval" in estimates[0]:
            low, high = np.mean([estimate[f"{key}_interval"] for estimate in estimates], axis=0)
            means[name] |= {"half_width": float(high - low) / 2, "low": float(low), "high": float(high)}
    return means


def save_runs(runs: Sequence[Run], out: Path) -> MeanMetrics:
    """Save one run as `out`, several as `out/seed-N`, with `out/summary.json`; failed runs are left out.

    Returns:
        The mean metrics in summary.json; empty, and nothing written, where all runs failed.

    Raises:
        InputError: `out` cannot be written, or see :func:`refuse_other_content`.
    """
    seeds = [run.config.seed for run in runs]
    folders = dict(zip(run_folders(out, seeds), runs, strict=True))
    saved = {folder: run for folder, run in folders.items() if run.status != "failed"}
    refuse_other_content(out, seeds)
    if not saved:
        return {}
    means = mean_metrics([run.metrics for run in saved.values()])
    content = {
        "format": "ulfine-fast-summary",
        "version": 1,
        "method": runs[0].config.method,
        "seeds": [run.config.seed for run in saved.values()],
        "metrics": means,
    }
    summary = (json.dumps(content, indent=2) + "\n").encode()
    failed = [folder for folder in folders if folder not in saved and folder.exists()]
    write_runs(saved, (out, summary), emptied=failed)
    return means


def load_seeds(folder: Path) -> list[Run]:
    """The run in a folder, or those of several seeds in the folders below it.

    Raises:
        InputError: no run there, runs that are not seeds of one fit, or one of another version or damaged.
    """
    inner = [] if (folder / CONFIG).exists() else sorted(folder.glob(f"*/{CONFIG}"))
    if not inner:
        return [Run.load(folder)]
    runs = [Run.load(file.parent) for file in inner]
    for file, run in zip(inner, runs, strict=True):
        same = (run.config.method, run.class_names, run.input_shape, (run.encoder or {}).get("sha256"))
        first = (runs[0].config.method, runs[0].class_names, runs[0].input_shape, (runs[0].encoder or {}).get("sha256"))
        if same != first:
            raise InputError(f"{file.parent} is no seed of the same fit as {inner[0].parent}; name one of them")
    return runs


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
    folders = run_folders(out, seeds)
    saving = [folder / STAGING for folder in (out, *folders)]  # left by a killed save of the same fit
    runs = {file.parent for file in (out / CONFIG, *out.glob(f"*/{CONFIG}")) if file.exists()}
    staying = sorted(runs - {*folders, *saving})
    if staying:
        raise InputError(f"{staying[0]} holds a run that this fit does not replace; name a new folder or remove it")

    ours = bool(runs) or (out / SUMMARY).exists() or any(folder.is_dir() for folder in saving)
    if not ours and any(path.name not in HIDDEN for path in out.iterdir()):
        raise InputError(f"{out} exists and is no run; name a new folder")
    for folder in folders:
        if folder.exists() and not may_replace(folder):
            raise InputError(f"{folder} exists and is no run; name a new folder")
