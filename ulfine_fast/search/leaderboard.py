"""The results of a sweep: trials in order, the rows behind them, which settings mattered, and the best as settings."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.digests import BLANK, sealed
from ulfine_fast.cache.io.files import write_atomically
from ulfine_fast.cache.io.toml import toml_text
from ulfine_fast.metrics.intervals import Interval, mean_interval
from ulfine_fast.search.objective import sign, tell_importance
from ulfine_fast.search.saved import BEST, LEADERBOARD, RESULTS, result_rows

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from ulfine_fast.search.plan import Plan


@dataclass(frozen=True)
class RankedTrial:
    """A complete trial and its rank.

    Attributes:
        rank: from 1.
        trial: its number in the study.
        metrics: mean over seeds and half width of the 95% t-interval, by metric.
        params: its searched settings.
        settings: all its settings, except the seed.
    """

    rank: int
    trial: int
    metrics: dict[str, Interval]
    params: dict[str, Any]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types; the half width of a single seed is None."""
        metrics = {
            name: {"mean": interval.mean, "half_width": _finite(interval.half), "n": interval.n}
            for name, interval in self.metrics.items()
        }
        return {"rank": self.rank, "trial": self.trial, "figures": metrics, "params": self.params}


def rank_trials(trials: Sequence[FrozenTrial], plan: Plan) -> list[RankedTrial]:
    """Complete trials, best first.

    With several metrics the trials that no other beats in all of them come first, then those that only these beat, and
    so on; each such front is in the order of its first metric.
    """
    from optuna.trial import TrialState  # half a second to start

    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    values = np.array([trial.values for trial in complete]).reshape(-1, len(plan.metrics))
    signed = values * [sign(metric) for metric in plan.metrics]  # (n, M), higher is better
    fronts = _fronts(signed)
    order = sorted(range(len(complete)), key=lambda i: (fronts[i], -signed[i, 0], complete[i].number))

    ranked = []
    for rank, i in enumerate(order, start=1):
        trial = complete[i]
        seeds = [record["val"] for record in trial.user_attrs["seeds"]]
        intervals = {name: mean_interval(metrics[name] for metrics in seeds) for name in plan.metrics}
        ranked.append(
            RankedTrial(
                rank=rank,
                trial=trial.number,
                metrics={name: interval for name, interval in intervals.items() if interval is not None},
                params=dict(trial.params),
                settings=plan.space.settings(trial.params),
            )
        )
    return ranked


def _fronts(signed: np.ndarray[Any, Any]) -> list[int]:
    """Number of the Pareto front of each row (n, M); 0 for rows that no other row beats."""
    fronts = np.full(len(signed), -1)
    front = 0
    while (fronts < 0).any():
        left = np.flatnonzero(fronts < 0)
        rows = signed[left]
        at_least = (rows[:, None] >= rows[None]).all(2)  # (n, n), row i is nowhere worse than row j
        better = (rows[:, None] > rows[None]).any(2)
        fronts[left[~(at_least & better).any(0)]] = front
        front += 1
    return [int(value) for value in fronts]


def importance(study: Study, plan: Plan, ranked: Sequence[RankedTrial]) -> dict[str, dict[str, float]]:
    """How much of a metric's variation each setting explains, as fractions that sum to 1, by metric.

    A metric is left out where too few trials differ in it.

    SOURCE: PED-ANOVA, Watanabe et al., arXiv 2304.10255.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances  # half a second to start

    by_metric: dict[str, dict[str, float]] = {}
    for i, metric in enumerate(plan.metrics):
        if not tell_importance([sign(metric) * trial.metrics[metric].mean for trial in ranked]):
            continue

        def loss(trial: FrozenTrial, i: int = i) -> float:
            # the evaluator takes the smallest tenth for the best
            return -sign(plan.metrics[i]) * trial.values[i]

        fractions = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), target=loss)
        by_metric[metric] = {name: float(fraction) for name, fraction in fractions.items()}
    return by_metric


def write_leaderboard(out: Path, ranked: Sequence[RankedTrial], plan: Plan) -> None:
    """Write leaderboard.csv: rank, trial, mean and half width of each metric, searched settings."""
    text = io.StringIO()
    writer = csv.writer(text)
    columns = [f"{metric}{end}" for metric in plan.metrics for end in ("", "_half_width")]
    writer.writerow(["rank", "trial", "seeds", *columns, *plan.space.searched])
    for trial in ranked:
        metrics = [value for interval in trial.metrics.values() for value in (interval.mean, _finite(interval.half))]
        params = [trial.params[name] for name in plan.space.searched]
        row = [trial.rank, trial.trial, plan.seeds, *metrics, *params]
        writer.writerow(["" if value is None else value for value in row])
    write_atomically(out / LEADERBOARD, text.getvalue().encode())


def write_results(out: Path, trials: Sequence[FrozenTrial]) -> None:
    """Write results.parquet: a row for each trial and seed, with settings and all validation metrics."""
    rows = [row for trial in trials for row in result_rows(trial)]
    # failed seeds have no metrics, and methods of one space may have metrics that others lack
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    content = io.BytesIO()
    pq.write_table(table, content)
    write_atomically(out / RESULTS, content.getvalue())


def write_best(out: Path, ranked: Sequence[RankedTrial], count: int) -> None:
    """Write best.toml, and best-1.toml, best-2.toml, ... for the first `count`.

    They contain no seed: `fit --config best.toml --seeds 5` says which seeds to fit.
    """
    files = {BEST: ranked[0], **{f"best-{trial.rank}.toml": trial for trial in ranked[:count]}}
    for name, trial in files.items():
        metrics = ", ".join(f"{metric} {interval.mean:.4f}" for metric, interval in trial.metrics.items())
        heading = f"trial {trial.trial} of a sweep by ulfine-fast {__version__}; on validation: {metrics}"
        write_atomically(out / name, toml_text(trial.settings, heading).encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_sealed_json(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write a JSON object with its own digest in the field "digest"; returns it."""
    text = json.dumps({**content, "digest": BLANK}, indent=2, allow_nan=False)
    data = sealed(f"{text}\n".encode())
    write_atomically(path, data)
    written: dict[str, Any] = json.loads(data)
    return written


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
