"""What a fit without a test split says of its accuracy, in sentences, and what its user may do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ulfine_fast.runs.run import Run

UNCERTAIN = 0.4
"""Width of an interval from which a class's accuracy counts as too uncertain to tell."""

_NAMED = 10  # classes that a line names


def estimate_lines(metrics: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> list[str]:
    """How the estimate was made, and the accuracy of each class with its interval; none for other runs.

    Args:
        metrics: of each run of one method; several are averaged.
        class_names: of K classes.
    """
    estimates = _estimates(metrics)
    if not estimates:
        return []
    first = estimates[0]
    if not first.get("rows"):
        return ["trained on every label; no class has two, so that nothing can be held out to estimate the accuracy"]
    seeds = f", mean of {len(estimates)} seeds" if len(estimates) > 1 else ""
    times = "once" if first["repeats"] == 1 else f"{first['repeats']} times"
    accuracy, ends = _by_class(estimates)

    # the least accurate of many classes
    known = np.flatnonzero(~np.isnan(accuracy))
    shown = known if len(known) <= _NAMED else known[np.argsort(accuracy[known], kind="stable")[:_NAMED]]
    classes = [
        f"{class_names[k]} {100 * accuracy[k]:.0f} [{100 * ends[k, 0]:.0f}, {100 * ends[k, 1]:.0f}]" for k in shown
    ]
    title = "accuracy of each class" if len(known) <= _NAMED else f"the {_NAMED} least accurate classes"
    return [
        f"estimated by cross-validation on {first['rows']} labelled images, each held out {times} "
        f"({first['folds']} folds){seeds}; the classifier trains on every label",
        f"{title}, 95% interval: {', '.join(classes)}",
    ]


def selection_lines(runs: Sequence[Run]) -> list[str]:
    """A line where options that need validation images did nothing, since every label trains."""
    config = runs[0].config
    asked = [name for name, on in (("select best", config.select == "best"), ("patience", config.patience > 0)) if on]
    if not asked or not any(run.metrics.get("cross_validation") and not run.split["val"] for run in runs):
        return []
    verb = "need" if len(asked) > 1 else "needs"
    return [f"{' and '.join(asked)} {verb} validation images, and every label trains: the last step is kept"]


def next_steps(metrics: Sequence[Mapping[str, Any]], class_names: Sequence[str], folder: Path) -> list[str]:
    """What to do after a fit without a test split; none for other runs.

    Args:
        metrics: of each run of one method.
        class_names: of K classes.
        folder: of the run, or of one of several seeds.
    """
    estimates = _estimates(metrics)
    if not estimates:
        return []
    accuracy, ends = _by_class(estimates)
    wide = ~(ends[:, 1] - ends[:, 0] <= UNCERTAIN)  # unknown ones too
    uncertain = np.flatnonzero(wide)
    # unknown classes first, then the widest intervals
    width = np.where(np.isnan(accuracy), np.inf, ends[:, 1] - ends[:, 0])
    order = uncertain[np.argsort(-width[uncertain], kind="stable")]
    lines = []
    if len(order):
        names = [f"{class_names[k]} (unknown)" if np.isnan(accuracy[k]) else class_names[k] for k in order[:_NAMED]]
        more = f" and {len(order) - _NAMED} more" if len(order) > _NAMED else ""
        lines.append(f"too uncertain to tell, label more images of them: {', '.join(names)}{more}")
    run = shlex.quote(str(folder))
    lines.append(f"next: `ulfine-fast review {run}` shows which labels to check or add")
    return lines


def _estimates(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [values["cross_validation"] for values in metrics if values.get("cross_validation")]


def _by_class(estimates: Sequence[Mapping[str, Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean accuracy of each class (K,) and ends of its interval (K, 2); NaN for a class of which nothing is known."""
    accuracies = [estimate["per_class_accuracy"] for estimate in estimates]
    ends = [[pair or (None, None) for pair in estimate["per_class_interval"]] for estimate in estimates]
    return np.array(accuracies, dtype=np.float64).mean(0), np.array(ends, dtype=np.float64).mean(0)
