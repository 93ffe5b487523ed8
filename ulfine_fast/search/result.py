"""What a sweep returns, and the folder it is kept in."""

from __future__ import annotations

import importlib.metadata
import json
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import make_folder, write_atomically
from ulfine_fast.search.leaderboard import (
    Place,
    importance,
    rank_trials,
    write_board,
    write_json,
    write_rows,
)
from ulfine_fast.search.plan import Plan
from ulfine_fast.search.study import Ledger, hidden

if TYPE_CHECKING:
    from optuna.study import Study

DATABASE = "sweep.db"
_OWNER = ".owner"


@dataclass
class SweepResult:
    """What :func:`ulfine_fast.sweep` found.

    Attributes:
        out: folder of the results. storage: URL of the study's database. study_name: of the study in it.
        metrics: what was searched for, on validation.
        counts: trials by state: complete, pruned, fail.
        leaderboard: complete trials, best first.
        importance: share of each setting in each metric.
        best: for each refit trial, best first: rank, trial, seeds, the file of its settings, the folder of its runs,
            and under "test" mean and half width of the test figures.
        warnings: sentences on the space.
        forecast: of the first place, as `forecast.json` has it, None where none was asked for.
    """

    out: Path
    storage: str
    study_name: str
    metrics: tuple[str, ...]
    counts: dict[str, int]
    leaderboard: list[Place]
    importance: dict[str, dict[str, float]]
    best: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    forecast: dict[str, Any] | None = None

    @property
    def study(self) -> Study:
        """The Optuna study, for its plots and its dashboard."""
        import optuna

        from ulfine_fast.search.study import open_storage

        return optuna.load_study(study_name=self.study_name, storage=open_storage(self.storage))

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "out": str(self.out),
            "storage": hidden(self.storage),
            "study": self.study_name,
            "metrics": list(self.metrics),
            "counts": self.counts,
            "leaderboard": [place.to_dict() for place in self.leaderboard],
            "importance": self.importance,
            "best": self.best,
            "warnings": self.warnings,
            **({} if self.forecast is None else {"forecast": self.forecast}),
        }


def sweep_folder(out: Path) -> str:
    """Make the folder, or find the sweep in it; returns a name that no other sweep has.

    Raises:
        InputError: the folder holds something else, or cannot be made.
    """
    owner = out / _OWNER
    if owner.exists():
        return owner.read_text(encoding="utf-8").strip()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is no sweep; name a new folder")
    make_folder(out)
    name = uuid.uuid4().hex[:12]
    write_atomically(owner, name.encode())
    return name


def collect(ledger: Ledger, plan: Plan) -> SweepResult:
    """Read the study and write everything but the refits.

    Raises:
        InputError: no trial is complete; says why the first one is not.
    """
    trials = ledger.trials()
    ranked = rank_trials(trials, plan)
    counts = dict(Counter(trial.state.name.lower() for trial in trials))
    result = SweepResult(
        out=plan.out,
        storage=plan.storage,
        study_name=plan.study,
        metrics=plan.metrics,
        counts=counts,
        leaderboard=ranked,
        importance=importance(ledger.study, plan, ranked),
        warnings=plan.space.warnings,
    )
    # written even where nothing is complete: the rows say what became of every trial
    write_board(plan.out, ranked, plan)
    write_rows(plan.out, trials, plan)
    write_json(plan.out / "importance.json", result.importance)
    if not ranked:
        raise InputError(_why_nothing(trials, plan))
    return result


def write_summary(result: SweepResult, plan: Plan, test_reads: int) -> None:
    """Write sweep.json: what was searched and how, by which versions, and what came out."""
    about = {
        "format": "ulfine-fast-sweep",
        "version": 1,
        **plan.identity(),
        "sampler": plan.sampler,
        "trials": plan.trials,
        "batch": plan.batch,
        "storage": hidden(plan.storage),
        "study": plan.study,
        "counts": result.counts,
        "best": result.best,
        "test_reads": test_reads,
        "versions": {"ulfine-fast": __version__, **{n: importlib.metadata.version(n) for n in ("optuna", "torch")}},
    }
    write_json(plan.out / "sweep.json", about)


def earlier_refits(out: Path) -> tuple[list[dict[str, Any]], int]:
    """Refits that an earlier call left in the folder, and how often the test split has been read."""
    try:
        about = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
        return about["best"], int(about["test_reads"])
    except (OSError, ValueError, KeyError, TypeError):  # not there yet, or written by something else
        return [], 0


def _why_nothing(trials: Sequence[Any], plan: Plan) -> str:
    """Why not a single trial is complete."""
    rows = [row for trial in trials for row in trial.user_attrs.get("seeds", [])]
    if any(row["status"] == "failed" for row in rows):
        return f"all {len(trials)} trials diverged; lower lr in the space"
    if rows and not rows[0]["val"]:
        return "the split has no validation images to judge by; set val_fraction above 0"
    lacking = [name for name in plan.metrics if rows and rows[0]["val"].get(name) is None]
    return f"no trial has {lacking[0] if lacking else 'a figure'} on validation; choose another --metric"
