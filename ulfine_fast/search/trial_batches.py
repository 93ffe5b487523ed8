"""One trial batch of a sweep: its trials are proposed, trained together and recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ulfine_fast.engine.fit import fit_many
from ulfine_fast.search.objective import sign
from ulfine_fast.search.plan import Plan
from ulfine_fast.search.pruning import bracket, outside_best_third, rungs
from ulfine_fast.search.records import SeedRecord, Status, StudyBatch
from ulfine_fast.search.study import SweepStudy

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.runs.run import Run

Rows = Mapping[int, Mapping[str, Any]]
Advance = Callable[[int], None]

CHECKPOINTS = ".checkpoint"
"""Folder of the batches that are being trained, inside the sweep's folder."""


def missing_batches(study: SweepStudy, plan: Plan) -> list[StudyBatch]:
    """Batches that the sweep still has to run: those that an earlier call did not finish, then new ones."""
    known = study.batches(study.trials())
    missing = [
        batch
        for batch, trials in known.items()
        if batch.owner == plan.owner
        and (len(trials) < batch.size or any(not trial.state.is_finished() for trial in trials))
    ]
    start = max((batch.start + batch.size for batch in known), default=0)
    number = max((batch.number + 1 for batch in known if batch.owner == plan.owner), default=0)
    new_trials = max(plan.trials - sum(batch.size for batch in known), 0)
    for offset in range(0, new_trials, plan.batch):
        missing.append(StudyBatch(plan.owner, number, start + offset, min(plan.batch, new_trials - offset)))
        number += 1
    return missing


def run_batch(
    plan: Plan,
    cache: FeatureCache,
    batch: StudyBatch,
    study: SweepStudy,
    advance: Advance | None = None,
) -> int:
    """Propose the trials of a batch, train them and record their results.

    A batch that died continues from its last evaluation. Trials that were recorded before stay as they are.

    Args:
        plan: the sweep's.
        cache: its features.
        batch: which one.
        study: the sweep's.
        advance: called with the trial-steps done since the last call.

    Returns:
        How many trials were recorded.
    """
    # a batch dies with a checkpoint before its first trial is recorded, or without one after that: those left over are
    # the same trials in both cases
    trials = [trial for trial in study.claim(batch) if not trial.state.is_finished()]
    if not trials:
        return 0
    runs = fit_many(
        cache,
        # trial by trial, its seeds side by side
        [plan.space.config(trial.params, plan.seed + i) for trial in trials for i in range(plan.seeds)],
        split=plan.split,
        device=plan.device,
        progress=False,
        engine=plan.engine,
        read_test=False,
        checkpoint=plan.out / CHECKPOINTS / batch.name,
        watch=EvaluationWatch(plan, study, trials, advance),
    )
    compared = [] if plan.pruning == "none" else rungs(runs[0].config.steps, runs[0].config.eval_every)
    for i, trial in enumerate(trials):
        group = runs[i * plan.seeds : (i + 1) * plan.seeds]
        study.finish(trial.number, [_seed_record(run, plan.metrics[0], compared) for run in group])
    return len(trials)


def _seed_record(run: Run, metric: str, compared: Sequence[int]) -> SeedRecord:
    """What is kept of one seed; `metric` is what pruning compares, at the steps `compared`."""
    metrics = {name: value for name, value in (run.metrics.get("val") or {}).items() if not isinstance(value, list)}
    record: SeedRecord = {
        "seed": run.config.seed,
        "status": cast(Status, run.status),
        "seconds": run.metrics.get("seconds"),
        "failed_at": run.metrics.get("failed_at"),
        "val": {name: _finite(value) for name, value in metrics.items()},
    }
    if compared:
        rows = {row["step"]: row for row in run.history if row["step"] in compared}
        record["rungs"] = {str(step): _finite(row.get(f"val_{metric}")) for step, row in rows.items()}
    return record


def _finite(value: float | None) -> float | None:
    """The value; None for one that JSON in a database does not have."""
    return value if value is not None and math.isfinite(value) else None


class EvaluationWatch:
    """Sees every evaluation of a batch: counts steps, and drops the trials that pruning stops."""

    def __init__(
        self, plan: Plan, study: SweepStudy, trials: Sequence[FrozenTrial], advance: Advance | None = None
    ) -> None:
        """Watch these trials of a plan; `advance` is called with the trial-steps done since the last call."""
        self._plan = plan
        self._study = study
        self._trials = trials
        self._advance = advance
        self._done: dict[int, int] = {}
        self._stopped: set[int] = set()
        config = plan.space.config(trials[0].params, plan.seed)
        self._rungs = [] if plan.pruning == "none" else rungs(config.steps, config.eval_every)
        self._past = study.trials() if self._rungs else []

    def __call__(self, step: int, rows: Rows) -> Collection[int]:
        """Return the configs to drop.

        Args:
            step: of the evaluation.
            rows: history row of each config that is still trained, by its index among the batch's configs.
        """
        if self._advance is not None:
            self._advance(sum(step - self._done.get(i, 0) for i in rows))
        self._done.update(dict.fromkeys(rows, step))
        if step in self._rungs:
            self._compare(step, rows)
        # memory may split the configs of one trial into several chunks: what one chunk stops, the others drop as well
        return [i for i in rows if i // self._plan.seeds in self._stopped]

    def _compare(self, step: int, rows: Rows) -> None:
        """Stop the trials that are not among the best of their bracket, earlier batches included."""
        metric = self._plan.metrics[0]

        # mean over the seeds of each trial, by its index in the batch
        by_trial: dict[int, list[float]] = {}
        for i, row in rows.items():
            value = row.get(f"val_{metric}")
            if value is not None and math.isfinite(value):
                by_trial.setdefault(i // self._plan.seeds, []).append(value)
        means = {index: sum(values) / len(values) for index, values in by_trial.items()}
        for index, mean in means.items():
            self._study.report(self._trials[index].number, step, mean)

        # scores by trial number, those of earlier batches at this step included, in brackets
        values = {t.number: t.intermediate_values[step] for t in self._past if step in t.intermediate_values}
        values.update({self._trials[index].number: mean for index, mean in means.items()})
        brackets: dict[int, dict[int, float]] = {}
        for number, value in values.items():
            skipped = bracket(number, self._plan.pruning, len(self._rungs))
            brackets.setdefault(skipped, {})[number] = sign(metric) * value

        rung = self._rungs.index(step)
        worse = {n for skipped, scores in brackets.items() if skipped <= rung for n in outside_best_third(scores)}
        self._stopped |= {index for index in means if self._trials[index].number in worse}
