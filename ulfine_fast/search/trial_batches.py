"""One pass of a sweep: its trials are asked for, trained together, and told together."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ulfine_fast.search.objective import mean_figures, sign
from ulfine_fast.search.plan import Plan
from ulfine_fast.search.pruning import bracket, hopeless, rungs
from ulfine_fast.search.study import Ledger, Share

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.runs.run import Run

Rows = Mapping[int, Mapping[str, Any]]
Advance = Callable[[int], None]

CHECKPOINTS = ".checkpoint"
"""Folder of the passes under way, in that of the sweep."""


def plan_shares(ledger: Ledger, plan: Plan) -> list[Share]:
    """Passes that this sweep has still to run: those an earlier call left unfinished first, then new ones."""
    known = ledger.shares(ledger.trials())
    left = [share for share, trials in known.items() if share.owner == plan.owner and _unfinished(share, trials)]
    missing = plan.trials - sum(share.size for share in known)
    start = max((share.start + share.size for share in known), default=0)
    number = max((share.number + 1 for share in known if share.owner == plan.owner), default=0)
    for first in range(0, max(missing, 0), plan.batch):
        left.append(Share(plan.owner, number, start + first, min(plan.batch, missing - first)))
        number += 1
    return left


def _unfinished(share: Share, trials: Sequence[FrozenTrial]) -> bool:
    return len(trials) < share.size or any(not trial.state.is_finished() for trial in trials)


def run_share(
    plan: Plan, cache: FeatureCache, share: Share, ledger: Ledger | None = None, advance: Advance | None = None
) -> int:
    """Ask for the trials of a pass, train them, tell what came out.

    A pass that died is continued from its last evaluation, and trials that were told before are left as they are.

    Args:
        plan: the sweep's.
        cache: its features.
        share: which pass.
        ledger: the study, where it is open.
        advance: called with the trial-steps done since the last call.

    Returns:
        How many trials were told.
    """
    from ulfine_fast.engine.fit import fit_many

    ledger = ledger or Ledger.open(plan)
    # a pass dies with a checkpoint before the first is told, or without one after: the rest is always the same
    trials = [trial for trial in ledger.claim(plan, share) if not trial.state.is_finished()]
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
        checkpoint=plan.out / CHECKPOINTS / share.name,
        watch=Watch(plan, ledger, trials, advance or (lambda _steps: None)),
    )
    _tell(ledger, plan, trials, runs)
    return len(trials)


def _tell(ledger: Ledger, plan: Plan, trials: Sequence[FrozenTrial], runs: Sequence[Run]) -> None:
    """Tell the study what came out."""
    for i, trial in enumerate(trials):
        group = runs[i * plan.seeds : (i + 1) * plan.seeds]
        values = mean_figures([run.metrics.get("val") or {} for run in group], plan.metrics)
        state = _state(group, values)
        ledger.tell(trial.number, values if state == "complete" else None, state, [_seed_row(run) for run in group])


def _state(group: Sequence[Run], values: list[float] | None) -> str:
    """A trial is as good as its worst seed: one that diverged fails it, one that was dropped prunes it."""
    states = {run.status for run in group}
    if "failed" in states or (values is None and "pruned" not in states):
        return "failed"
    return "pruned" if "pruned" in states else "complete"


def _seed_row(run: Run) -> dict[str, Any]:
    """What is kept of one seed: figures on validation, but for those of single classes."""
    figures = run.metrics.get("val") or {}
    kept = {name: value for name, value in figures.items() if not isinstance(value, list)}
    row = {"seed": run.config.seed, "status": run.status, "seconds": run.metrics.get("seconds")}
    return {**row, "failed_at": run.metrics.get("failed_at"), "val": {k: _finite(v) for k, v in kept.items()}}


def _finite(value: Any) -> Any:
    # JSON of a database knows no NaN
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Watch:
    """Looks at every evaluation of a pass: counts steps, and drops the trials that pruning gives up."""

    def __init__(self, plan: Plan, ledger: Ledger, trials: Sequence[FrozenTrial], advance: Advance) -> None:
        """Watch these trials of a plan."""
        self._plan, self._ledger, self._trials, self._advance = plan, ledger, trials, advance
        self._done: dict[int, int] = {}
        self._given_up: set[int] = set()
        config = plan.space.config(trials[0].params, plan.seed)
        self._rungs = [] if plan.pruning == "none" else rungs(config.steps, config.eval_every)
        self._past = ledger.trials() if self._rungs else []

    def __call__(self, step: int, rows: Rows) -> Collection[int]:
        """Return the configs to drop.

        Args:
            step: of the evaluation.
            rows: history row of each config still trained, by its place among the pass's configs.
        """
        self._advance(sum(step - self._done.get(i, 0) for i in rows))
        self._done.update(dict.fromkeys(rows, step))
        if step in self._rungs:
            self._judge(step, rows)
        # configs of a trial may be trained in several chunks of memory: what one gave up, the others drop as well
        return [i for i in rows if i // self._plan.seeds in self._given_up]

    def _judge(self, step: int, rows: Rows) -> None:
        """Give up trials that are not among the best of their bracket, earlier passes included."""
        mine = self._values(rows)
        for place, value in mine.items():
            self._ledger.report(self._trials[place].number, step, value)
        by_bracket: dict[int, dict[int, float]] = {}
        for number, value in {**self._earlier(step), **{self._trials[p].number: v for p, v in mine.items()}}.items():
            skipped = bracket(number, self._plan.pruning, len(self._rungs))
            by_bracket.setdefault(skipped, {})[number] = sign(self._plan.metrics[0]) * value
        rung = self._rungs.index(step)
        lost = {n for skipped, scores in by_bracket.items() if skipped <= rung for n in hopeless(scores)}
        self._given_up |= {place for place in mine if self._trials[place].number in lost}

    def _values(self, rows: Rows) -> dict[int, float]:
        """Mean validation figure over the seeds of each trial, by its place in the pass."""
        groups: dict[int, list[float]] = {}
        for i, row in rows.items():
            value = row.get(f"val_{self._plan.metrics[0]}")
            if value is not None and math.isfinite(value):
                groups.setdefault(i // self._plan.seeds, []).append(value)
        return {place: sum(values) / len(values) for place, values in groups.items()}

    def _earlier(self, step: int) -> dict[int, float]:
        """Figures of other trials at this step, by number."""
        return {t.number: t.intermediate_values[step] for t in self._past if step in t.intermediate_values}
