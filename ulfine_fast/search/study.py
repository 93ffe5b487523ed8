"""The study in its database: which trials there are, which batch each belongs to, and their results.

Optuna is imported inside functions: it takes half a second to start.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import UNNAMED_METHOD, options_of
from ulfine_fast.search.records import (
    BATCH,
    GENERATION,
    POPULATION,
    PROPOSED,
    SEEDS,
    SeedRecord,
    StudyBatch,
    check_trial,
    mean_at_rungs,
    outcome,
    proposal_digest,
    sealed_records,
)
from ulfine_fast.search.samplers import distributions, propose
from ulfine_fast.search.saved import SUMMARY, Summary, refuse_changed_trials
from ulfine_fast.search.space import Space, new_names
from ulfine_fast.search.storage import RESTORE, open_storage, reading_study

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from ulfine_fast.search.plan import Plan


class SweepStudy:
    """One study in its database.

    A trial is written with all its settings and its batch in one transaction, so that a process may die at any moment:
    the worker that redoes the batch finds the trials that were proposed, and proposes the rest.

    Attributes:
        optuna_study: the study as Optuna knows it.
        storage: its database.
        plan: of the sweep.
    """

    def __init__(self, optuna_study: Study, storage: RDBStorage, plan: Plan) -> None:
        """Use :meth:`open`."""
        self.optuna_study, self.storage, self.plan = optuna_study, storage, plan
        self._id = storage.get_study_id_from_name(optuna_study.study_name)
        self._distributions = distributions(plan.space)
        # by number: a trial as the database has it, and as `trials` returns it
        self._checked: dict[int, tuple[FrozenTrial, FrozenTrial]] = {}

    @classmethod
    def open(cls, plan: Plan) -> SweepStudy:
        """Open the plan's study, or create it.

        Raises:
            InputError: a storage that cannot be opened or read, or a study made with another space, cache or objective.
        """
        import optuna

        storage = open_storage(plan.storage)
        identity = plan.identity()

        # a study of that name: continue it, replace it, or refuse it
        with reading_study(plan.storage):
            exists = plan.study in optuna.get_all_study_names(storage)
        if exists:
            with reading_study(plan.storage):
                existing = optuna.load_study(study_name=plan.study, storage=storage)
                attributes = existing.user_attrs
                trials = existing.get_trials(deepcopy=False)
                directions = [direction.name.lower() for direction in existing.directions]
            saved = _with_current_names(attributes.get("sweep"), plan.space)
            from_this_sweep = all(_owner(trial) == plan.owner for trial in trials)
            # in a database of several sweeps, one without trials may be at work
            unfinished = bool(trials or plan.own_database) and not any(trial.state.is_finished() for trial in trials)
            # a process that died between creating the study and saying what it is left nothing in it
            empty = not trials and not attributes and directions == plan.directions
            # after a first batch that was refused, say for a split the data cannot give, nothing is finished: the
            # corrected space must not need another folder
            corrected = isinstance(saved, dict) and saved != identity and from_this_sweep and unfinished
            if corrected:
                optuna.delete_study(study_name=plan.study, storage=storage)
            elif not empty:
                _refuse_other_sweep(plan, saved, directions)
                return cls(existing, storage, plan)

        # two workers may create it at the same moment
        with reading_study(plan.storage):
            created = optuna.create_study(
                study_name=plan.study, storage=storage, directions=plan.directions, load_if_exists=True
            )
            created.set_metric_names(list(plan.metrics))
            created.set_user_attr("sweep", identity)
            return cls(created, storage, plan)

    def close(self) -> None:
        """Close the database: SQLite then has all of it in one file, which may be copied."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    def trials(self) -> list[FrozenTrial]:
        """All trials, in the order of their numbers, each checked to be what was recorded.

        Version 0.1 had other names for some settings, and searched settings that no method of the space reads: these
        trials get today's names, without such settings.

        Raises:
            InputError: a trial is missing, was changed after it was recorded, or is outside the space.
        """
        with reading_study(self.plan.storage):
            trials = self.optuna_study.get_trials(deepcopy=False)
            if [trial.number for trial in trials] != list(range(len(trials))):
                raise InputError(f"study {self.plan.study!r} lacks a trial before its last one; {RESTORE}")
            return [self._check(trial) for trial in trials]

    def _check(self, trial: FrozenTrial) -> FrozenTrial:
        """The trial with today's names and nothing of the database that is not checked."""
        before, checked = self._checked.get(trial.number, (None, trial))
        if before is trial:
            return checked
        check_trial(trial, self.plan.metrics, self.plan.trial_seeds)

        # options: today's names, those of the space, values that it allows
        names = new_names()
        params = {names.get(name, name): value for name, value in trial.params.items()}
        params = {name: value for name, value in params.items() if name in self._distributions}
        for name in self._distributions:
            if name not in params or not self.plan.space.allows(name, params[name]):
                value = params.get(name)
                raise InputError(f"trial {trial.number} has {name} = {value!r}, which is outside the space; {RESTORE}")

        checked = copy.copy(trial)
        checked.params = params
        checked.distributions = {name: self._distributions[name] for name in params}
        checked.system_attrs = {k: v for k, v in trial.system_attrs.items() if k in (GENERATION, POPULATION)}
        if trial.state.is_finished() and "digest" in trial.user_attrs[SEEDS][0]:
            checked.intermediate_values = mean_at_rungs(trial.user_attrs[SEEDS])
        self._checked[trial.number] = trial, checked
        return checked

    def refuse_changes(self, earlier: Summary | None) -> None:
        """Refuse a study that is not the one that this folder was left with.

        Args:
            earlier: what sweep.json says; None before the first call is finished.

        Raises:
            InputError: trials of another sweep, fewer than there were, or not those of results.parquet.
        """
        owners = {_owner(trial) for trial in self.trials()}
        if self.plan.own_database and owners and self.plan.owner not in owners:
            raise InputError(
                f"the trials of {self.plan.out} are not of the sweep {self.plan.owner} that its file .owner names; "
                f"{RESTORE}"
            )
        if earlier is not None:
            own = {**self.plan.identity(), "owner": earlier.owner and self.plan.owner}
            for name in ("owner", "cache", "metrics", "seeds", "seed", "split"):
                if getattr(earlier, name) != own[name]:
                    raise InputError(f"{self.plan.out / SUMMARY} is of another sweep (its {name} differs); {RESTORE}")
        counted = 0 if earlier is None else sum(earlier.counts.values())
        if counted > len(self._checked):
            raise InputError(
                f"{self.plan.out / SUMMARY} counts {counted} trials, the study {self.plan.study!r} has "
                f"{len(self._checked)}; {RESTORE}"
            )
        refuse_changed_trials(self.plan.out, [checked for _, checked in self._checked.values()])

    def in_memory(self) -> Study:
        """A study of the same trials without a database, for Optuna's analyses."""
        import optuna

        study = optuna.create_study(directions=self.plan.directions)
        study.add_trials(self.trials())
        return study

    def batches(self, trials: Sequence[FrozenTrial]) -> dict[StudyBatch, list[FrozenTrial]]:
        """Every batch of which at least one trial was proposed, with its trials."""
        batches: dict[StudyBatch, list[FrozenTrial]] = {}
        for trial in trials:
            batches.setdefault(StudyBatch(**trial.user_attrs[BATCH]), []).append(trial)
        return batches

    def claim(self, batch: StudyBatch) -> list[FrozenTrial]:
        """The trials of a batch: those proposed before it was interrupted, and newly proposed ones.

        Returns:
            `batch.size` trials in the order of their numbers; some are finished where the batch died late.
        """
        past = self.trials()
        proposed = self.batches(past).get(batch, [])
        # there are too many where two workers both believed that the batch had died
        if len(proposed) >= batch.size:
            return proposed[: batch.size]
        # the whole batch again, as it was proposed before: what a sampler draws depends on where its batch starts
        numbers = {trial.number for trial in proposed}
        new_trials = propose(
            self.plan.space,
            self.plan.sampler,
            [trial for trial in past if trial.number not in numbers],
            self.plan.directions,
            start=batch.start,
            count=batch.size,
            seed=self.plan.seed,
            batch=self.plan.batch,
        )
        for trial in new_trials[len(proposed) :]:
            digest = proposal_digest(trial.params, batch, trial.system_attrs)
            trial.user_attrs = {BATCH: asdict(batch), PROPOSED: digest}
            self.optuna_study.add_trial(trial)
        return self.batches(self.trials())[batch]

    def report(self, number: int, step: int, value: float) -> None:
        """Record a trial's metric at an evaluation."""
        self.storage.set_trial_intermediate_value(self._trial_id(number), step, value)

    def finish(self, number: int, records: Sequence[SeedRecord]) -> None:
        """Record the result of a trial.

        Args:
            number: of a trial that :meth:`claim` returned.
            records: of its seeds.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        state, values = outcome(records, self.plan.metrics)
        # a worker that was believed dead may have finished the trial, with the same results
        with contextlib.suppress(UpdateFinishedTrialError):
            trial_id = self._trial_id(number)
            recorded = self._checked[number][0]
            sealed = sealed_records(records, number, recorded.params, StudyBatch(**recorded.user_attrs[BATCH]))
            self.storage.set_trial_user_attr(trial_id, SEEDS, sealed)
            # what Study.tell comes down to: it reads the trial back twice, which takes longer than a short trial trains
            self.storage.set_trial_state_values(trial_id, states[state], values)

    def _trial_id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self._id, number)


def _owner(trial: FrozenTrial) -> Any:
    """Id of the sweep that a trial belongs to, as the database has it."""
    batch = trial.user_attrs.get(BATCH)
    return batch.get("owner") if isinstance(batch, dict) else None


def _with_current_names(saved: Any, space: Space) -> Any:
    """The saved identity of a study with today's names of settings, without those that no method of the space reads.

    The method is always named, which version 0.1 did not do where it was the default.
    """
    if not isinstance(saved, dict) or not isinstance(saved.get("space"), dict):
        return saved
    names = new_names()
    entries = {"method": UNNAMED_METHOD} | {names.get(name, name): entry for name, entry in saved["space"].items()}
    read = {name for method in space.methods for name in options_of(method)}
    return {**saved, "space": {name: entry for name, entry in entries.items() if name in read}}


def _refuse_other_sweep(plan: Plan, saved: Any, directions: Sequence[str]) -> None:
    """Refuse to mix trials of two sweeps, naming the first entry that differs."""
    if not isinstance(saved, dict):
        raise InputError(f"study {plan.study!r} was not made by sweep; name another with --study")
    for name, value in {**plan.identity(), "directions": plan.directions}.items():
        before = directions if name == "directions" else saved.get(name)
        if before != value:
            field, was, now = _first_difference(name, before, value)
            raise InputError(
                f"study {plan.study!r} was made with {field} = {was!r}, this sweep says {now!r}; "
                "use the same, or another --out"
            )


def _first_difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The dotted name of the first entry that differs, with both values."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return name, before, now
    for key in [*now, *before]:
        if key not in before or key not in now or before[key] != now[key]:
            return _first_difference(f"{name}.{key}", before.get(key), now.get(key))
    return name, before, now
