"""What a sweep found: the trials in order, the rows behind them, what mattered, and the best as files of settings."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.files import write_atomically
from ulfine_fast.cache.io.toml import toml_text
from ulfine_fast.metrics.intervals import Interval, mean_interval
from ulfine_fast.search.objective import sign

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from ulfine_fast.search.plan import Plan


@dataclass(frozen=True)
class Place:
    """A finished trial on the board.

    Attributes:
        rank: from 1. trial: its number.
        figures: mean over seeds and half width of the 95% t-interval, for each metric.
        params: its searched settings. settings: all of them, but for the seed.
    """

    rank: int
    trial: int
    figures: dict[str, Interval]
    params: dict[str, Any]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types; the half width of a single seed is None."""
        figures = {name: {"mean": f.mean, "half_width": _known(f.half), "n": f.n} for name, f in self.figures.items()}
        return {"rank": self.rank, "trial": self.trial, "figures": figures, "params": self.params}


def rank_trials(trials: Sequence[FrozenTrial], plan: Plan) -> list[Place]:
    """Complete trials, best first.

    With several metrics those that no other trial beats in all of them stand first, each such front in the order of
    its first metric.
    """
    from optuna.trial import TrialState

    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    values = np.array([trial.values for trial in complete]).reshape(-1, len(plan.metrics))
    signed = values * [sign(metric) for metric in plan.metrics]  # (n, M), more is better
    fronts = _fronts(signed)
    order = sorted(range(len(complete)), key=lambda i: (fronts[i], -signed[i, 0], complete[i].number))
    return [_place(rank, complete[i], plan) for rank, i in enumerate(order, start=1)]


def _place(rank: int, trial: FrozenTrial, plan: Plan) -> Place:
    seeds = [row["val"] for row in trial.user_attrs["seeds"]]
    found = {name: mean_interval(figures[name] for figures in seeds) for name in plan.metrics}
    figures = {name: figure for name, figure in found.items() if figure is not None}
    return Place(rank, trial.number, figures, dict(trial.params), plan.space.settings(trial.params))


def _fronts(signed: np.ndarray[Any, Any]) -> list[int]:
    """Number of the Pareto front of each row (n, M); 0 for rows that none beats."""
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


def importance(study: Study, plan: Plan, ranked: Sequence[Place]) -> dict[str, dict[str, float]]:
    """Share of each setting in how much the metric moves, for each metric; left out where trials do not differ.

    SOURCE: PED-ANOVA, Watanabe et al., arXiv 2304.10255.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    found: dict[str, dict[str, float]] = {}
    for i, metric in enumerate(plan.metrics):
        if not _tells_apart([sign(metric) * place.figures[metric].mean for place in ranked]):
            continue

        def figure(trial: FrozenTrial, i: int = i) -> float:
            # the evaluator takes the smallest tenth for the best
            return -sign(plan.metrics[i]) * trial.values[i]

        evaluator = PedAnovaImportanceEvaluator()
        shares = get_param_importances(study, evaluator=evaluator, target=figure)
        found[metric] = {name: float(share) for name, share in shares.items()}
    return found


def _tells_apart(scores: Sequence[float]) -> bool:
    """Whether the best tenth, at least two, is not everybody; small validation sets make many equals."""
    if len(scores) < 3:
        return False
    tenth = max(2, math.ceil(len(scores) / 10))
    return min(scores) < sorted(scores, reverse=True)[tenth - 1]


def write_board(out: Path, ranked: Sequence[Place], plan: Plan) -> None:
    """Write leaderboard.csv: rank, trial, mean and half width of each metric, searched settings."""
    import io

    text = io.StringIO()
    writer = csv.writer(text)
    figures = [f"{metric}{end}" for metric in plan.metrics for end in ("", "_half_width")]
    writer.writerow(["rank", "trial", "seeds", *figures, *plan.space.searched])
    for place in ranked:
        cells = [value for figure in place.figures.values() for value in (figure.mean, _known(figure.half))]
        row = [place.rank, place.trial, plan.seeds, *cells, *(place.params[name] for name in plan.space.searched)]
        writer.writerow(["" if value is None else value for value in row])
    write_atomically(out / "leaderboard.csv", text.getvalue().encode())


def write_rows(out: Path, trials: Sequence[FrozenTrial], plan: Plan) -> None:
    """Write results.parquet: a row for each trial and seed, with settings and all validation figures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row for trial in trials for row in _rows(trial)]
    # failed seeds have no figures, and methods in one space may have figures of their own
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    pq.write_table(table, out / "results.parquet")


def _rows(trial: FrozenTrial) -> list[dict[str, Any]]:
    found = []
    for seed in trial.user_attrs.get("seeds", []):
        own = {"trial": trial.number, "state": trial.state.name.lower(), **trial.params}
        rest = {name: value for name, value in seed.items() if name != "val"}
        found.append({**own, **rest, **{f"val_{name}": value for name, value in seed["val"].items()}})
    return found


def write_best(out: Path, ranked: Sequence[Place], count: int) -> None:
    """Write best.toml, and best-1.toml, best-2.toml, ... for the first `count`.

    They say no seed: `fit --config best.toml --seeds 5` decides that.
    """
    write_atomically(out / "best.toml", _settings_text(ranked[0]).encode())
    for place in ranked[:count]:
        write_atomically(out / f"best-{place.rank}.toml", _settings_text(place).encode())


def _settings_text(place: Place) -> str:
    figures = ", ".join(f"{name} {figure.mean:.4f}" for name, figure in place.figures.items())
    heading = f"trial {place.trial} of a sweep by ulfine-fast {__version__}; on validation: {figures}"
    return toml_text(place.settings, heading)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
