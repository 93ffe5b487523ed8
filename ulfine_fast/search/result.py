"""What a sweep returns, and the folder that it is kept in."""

from __future__ import annotations

import importlib.metadata
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.digests import file_digest
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import make_folder, read_regular_file, write_atomically
from ulfine_fast.search.leaderboard import (
    RankedTrial,
    importance,
    rank_trials,
    write_best,
    write_json,
    write_leaderboard,
    write_results,
    write_sealed_json,
)
from ulfine_fast.search.plan import Plan
from ulfine_fast.search.records import Owner
from ulfine_fast.search.saved import BEST, FORMAT, IMPORTANCE, LEADERBOARD, OWNER, RESULTS, SUMMARY, VERSION
from ulfine_fast.search.storage import open_storage, without_password
from ulfine_fast.search.study import SweepStudy

if TYPE_CHECKING:
    from optuna.study import Study


@dataclass
class SweepResult:
    """What :func:`ulfine_fast.sweep` returns.

    Attributes:
        out: folder of the results.
        storage: URL of the study's database.
        study_name: name of the study in it.
        metrics: what was optimised, on validation.
        counts: trials by state: complete, pruned, fail.
        leaderboard: complete trials, best first.
        importance: how much of each metric's variation each setting explains, as fractions.
        best: for each refit trial, best first: rank, trial, seeds, the file of its settings, the folder of its runs,
            and under "test" mean and half width of the test metrics.
        warnings: sentences on the space.
        forecast: deprecated: of the best trial, as `forecast.json` has it; None where none was asked for.
    """

    out: Path
    storage: str
    study_name: str
    metrics: tuple[str, ...]
    counts: dict[str, int]
    leaderboard: list[RankedTrial]
    importance: dict[str, dict[str, float]]
    best: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    forecast: dict[str, Any] | None = None

    @property
    def study(self) -> Study:
        """The Optuna study, for its plots and its dashboard."""
        import optuna  # half a second to start

        return optuna.load_study(study_name=self.study_name, storage=open_storage(self.storage))

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "out": str(self.out),
            "storage": without_password(self.storage),
            "study": self.study_name,
            "metrics": list(self.metrics),
            "counts": self.counts,
            "leaderboard": [trial.to_dict() for trial in self.leaderboard],
            "importance": self.importance,
            "best": self.best,
            "warnings": self.warnings,
            **({} if self.forecast is None else {"forecast": self.forecast}),
        }


def sweep_folder(out: Path) -> str:
    """Make the folder of a sweep, or find the sweep in it; returns its id, which no other sweep has.

    Raises:
        InputError: the folder holds something else, cannot be made, or has a damaged id.
    """
    owner = out / OWNER
    try:
        name = read_regular_file(owner, 1 << 10).decode().strip()
        msgspec.convert(name, Owner)
        return name
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise InputError(
            f"{owner} does not hold the id of a sweep ({error}); restore it from a copy, or name a new folder"
        ) from error
    # a process that died while it wrote the id left nothing else
    if out.exists() and (not out.is_dir() or any(path.name != f"{OWNER}.tmp" for path in out.iterdir())):
        raise InputError(f"{out} exists and is no sweep; name a new folder")
    make_folder(out)
    name = uuid.uuid4().hex[:12]
    write_atomically(owner, name.encode())
    return name


def collect(study: SweepStudy, plan: Plan) -> SweepResult:
    """Read the study and write all files except those of the refits.

    Raises:
        InputError: no trial is complete; says why.
    """
    trials = study.trials()
    ranked = rank_trials(trials, plan)
    result = SweepResult(
        out=plan.out,
        storage=plan.storage,
        study_name=plan.study,
        metrics=plan.metrics,
        counts=dict(Counter(trial.state.name.lower() for trial in trials)),
        leaderboard=ranked,
        importance=importance(study.in_memory(), plan, ranked),
        warnings=plan.space.warnings,
    )
    # written even where nothing is complete: the rows say what happened to every trial
    write_leaderboard(plan.out, ranked, plan)
    write_results(plan.out, trials)
    write_json(plan.out / IMPORTANCE, result.importance)
    if not ranked:
        raise InputError(_why_none_is_complete(trials, plan))
    write_best(plan.out, ranked, 0)
    return result


def write_summary(result: SweepResult, plan: Plan, test_reads: int) -> None:
    """Write sweep.json, the last file: what was searched, by which versions, the refits, and digests of the others."""
    files = [LEADERBOARD, RESULTS, IMPORTANCE, BEST, *(refit["settings"] for refit in result.best)]
    about = {
        "format": FORMAT,
        "version": VERSION,
        "owner": plan.owner,
        **plan.identity(),
        "sampler": plan.sampler,
        "trials": plan.trials,
        "batch": plan.batch,
        "storage": without_password(plan.storage),
        "study": plan.study,
        "counts": result.counts,
        "best": result.best,
        "test_reads": test_reads,
        "versions": {"ulfine-fast": __version__, **{n: importlib.metadata.version(n) for n in ("optuna", "torch")}},
        "files": {name: file_digest(plan.out / name) for name in files},
    }
    write_sealed_json(plan.out / SUMMARY, about)


def _why_none_is_complete(trials: Sequence[Any], plan: Plan) -> str:
    """Why not a single trial is complete."""
    records = [record for trial in trials for record in trial.user_attrs.get("seeds", [])]
    if any(record["status"] == "failed" for record in records):
        return f"all {len(trials)} trials diverged; lower lr in the space"
    if records and not records[0]["val"]:
        return "the split has no validation images to judge by; set val_fraction above 0"
    missing = [name for name in plan.metrics if records and records[0]["val"].get(name) is None]
    return f"no trial has {missing[0] if missing else 'a metric'} on validation; choose another --metric"
