"""The study in its database: which trials there are, which batch each belongs to, and their results.

Optuna and SQLAlchemy are imported inside functions: they take half a second to start.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import options_of
from ulfine_fast.search.samplers import propose
from ulfine_fast.search.space import Space, new_names

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from ulfine_fast.search.plan import Plan

_BATCH = "share"  # attribute of a trial in the database; the name is part of the format
_TIMEOUT = 60  # seconds that SQLite waits for another process to finish writing


@dataclass(frozen=True, slots=True)
class StudyBatch:
    """Trials of a study that are proposed, trained and recorded together.

    Attributes:
        owner: id of the sweep they belong to.
        number: of the batch within that sweep, from 0.
        start: index of its first trial in the search's sequence.
        size: how many trials.
    """

    owner: str
    number: int
    start: int
    size: int

    @property
    def name(self) -> str:
        """Unique in a study, and valid as a folder's name."""
        return f"{self.owner}-{self.number:05d}"


class SweepStudy:
    """One study in its database.

    A trial is written with all its settings and its batch in one transaction, so that a process may die at any moment:
    the worker that redoes the batch finds the trials that were proposed, and proposes the rest.

    Attributes:
        optuna_study: the study as Optuna knows it.
        storage: its database.
    """

    def __init__(self, optuna_study: Study, storage: RDBStorage, searched: Collection[str]) -> None:
        """Use :meth:`open`; `searched` names the settings that trials differ in."""
        self.optuna_study, self.storage = optuna_study, storage
        self._searched = frozenset(searched)
        self._id = storage.get_study_id_from_name(optuna_study.study_name)

    @classmethod
    def open(cls, plan: Plan) -> SweepStudy:
        """Open the plan's study, or create it.

        Raises:
            InputError: a storage that cannot be opened, or a study made with another space, cache or objective.
        """
        import optuna

        storage = open_storage(plan.storage)
        identity = plan.identity()

        # a study of that name: continue it, replace it, or refuse it
        if plan.study in optuna.get_all_study_names(storage):
            existing = optuna.load_study(study_name=plan.study, storage=storage)
            saved = _with_current_names(existing.user_attrs.get("sweep"), plan.space)
            trials = existing.get_trials(deepcopy=False)
            from_this_sweep = all(trial.user_attrs.get(_BATCH, {}).get("owner") == plan.owner for trial in trials)
            unfinished = bool(trials) and not any(trial.state.is_finished() for trial in trials)
            # after a first batch that was refused, say for a split the data cannot give, nothing is finished: the
            # corrected space must not need another folder
            if not (saved != identity and from_this_sweep and unfinished):
                _refuse_other_sweep(plan, saved)
                return cls(existing, storage, plan.space.searched)
            optuna.delete_study(study_name=plan.study, storage=storage)

        # two workers may create it at the same moment
        created = optuna.create_study(
            study_name=plan.study, storage=storage, directions=plan.directions, load_if_exists=True
        )
        created.set_metric_names(list(plan.metrics))
        created.set_user_attr("sweep", identity)
        return cls(created, storage, plan.space.searched)

    def trials(self) -> list[FrozenTrial]:
        """All trials, in the order of their numbers.

        Version 0.1 had other names for some settings, and searched settings that no method of the space reads: these
        trials get today's names, without such settings.
        """
        trials = self.optuna_study.get_trials(deepcopy=False)
        if all(trial.params.keys() == self._searched for trial in trials):
            return trials
        names = new_names()
        current = []
        for trial in trials:
            kept = {name: names.get(name, name) for name in trial.params if names.get(name, name) in self._searched}
            renamed = copy.copy(trial)
            renamed.params = {new: trial.params[name] for name, new in kept.items()}
            renamed.distributions = {new: trial.distributions[name] for name, new in kept.items()}
            current.append(renamed)
        return current

    def in_memory(self) -> Study:
        """A study of the same trials without a database, for Optuna's analyses."""
        import optuna

        study = optuna.create_study(directions=self.optuna_study.directions)
        study.add_trials(self.trials())
        return study

    def batches(self, trials: Sequence[FrozenTrial]) -> dict[StudyBatch, list[FrozenTrial]]:
        """Every batch of which at least one trial was proposed, with its trials."""
        batches: dict[StudyBatch, list[FrozenTrial]] = {}
        for trial in trials:
            if _BATCH in trial.user_attrs:
                batches.setdefault(StudyBatch(**trial.user_attrs[_BATCH]), []).append(trial)
        return batches

    def claim(self, plan: Plan, batch: StudyBatch) -> list[FrozenTrial]:
        """The trials of a batch: those proposed before it was interrupted, and newly proposed ones.

        Returns:
            `batch.size` trials in the order of their numbers; some are finished where the batch died late.
        """
        past = self.trials()
        proposed = self.batches(past).get(batch, [])
        # there are too many where two workers both believed that the batch had died
        if len(proposed) >= batch.size:
            return proposed[: batch.size]
        new_trials = propose(
            plan.space,
            plan.sampler,
            past,
            plan.directions,
            start=batch.start + len(proposed),
            count=batch.size - len(proposed),
            seed=plan.seed,
            batch=plan.batch,
        )
        for trial in new_trials:
            self._add(trial, batch)
        return self.batches(self.trials())[batch]

    def _add(self, trial: FrozenTrial, batch: StudyBatch) -> None:
        """Write a proposed trial, as running."""
        from optuna.trial import TrialState, create_trial

        self.optuna_study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={_BATCH: asdict(batch)},
                # samplers such as CMA-ES keep their own state here
                system_attrs=trial.system_attrs,
            )
        )

    def report(self, number: int, step: int, value: float) -> None:
        """Record a trial's metric at an evaluation."""
        self.storage.set_trial_intermediate_value(self._trial_id(number), step, value)

    def finish(
        self, number: int, values: Sequence[float] | None, state: str, seeds: Sequence[Mapping[str, Any]]
    ) -> None:
        """Record the result of a trial.

        Args:
            number: of the trial.
            values: one for each metric; None unless complete.
            state: "complete", "pruned" or "failed".
            seeds: the results of each seed, in JSON's types.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        # a worker that was believed dead may have finished the trial, with the same results
        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(self._trial_id(number), "seeds", list(seeds))
            # what Study.tell comes down to: it reads the trial back twice, which takes longer than a short trial trains
            self.storage.set_trial_state_values(self._trial_id(number), states[state], values)

    def _trial_id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self._id, number)


def open_storage(url: str) -> RDBStorage:
    """Optuna's storage behind a database's URL.

    Raises:
        InputError: no such database, or one whose driver is not installed.
    """
    import optuna
    from sqlalchemy import event
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        arguments = {"connect_args": {"timeout": _TIMEOUT}} if make_url(url).get_backend_name() == "sqlite" else {}
        storage = optuna.storages.RDBStorage(url, engine_kwargs=arguments)
    except ArgumentError as error:
        raise InputError(f"--storage {url!r} is no database URL; give one such as sqlite:///sweep.db") from error
    except (SQLAlchemyError, ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"cannot open the storage {without_password(url)} ({reason}); check the URL and its driver"
        ) from error
    if arguments:
        event.listen(storage.engine, "connect", _use_write_ahead_log)
        storage.engine.dispose()
    return storage


def _use_write_ahead_log(connection: Any, _record: Any) -> None:
    """A commit to SQLite then need not wait for the disk, and survives the death of the process."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def without_password(url: str) -> str:
    """The URL without its password."""
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


def _with_current_names(saved: Any, space: Space) -> Any:
    """The saved identity of a study with today's names of settings, without those that no method of the space reads."""
    if not isinstance(saved, dict) or not isinstance(saved.get("space"), dict):
        return saved
    names = new_names()
    entries = {names.get(name, name): entry for name, entry in saved["space"].items()}
    read = {name for method in space.methods for name in options_of(method)}
    return {**saved, "space": {name: entry for name, entry in entries.items() if name in read}}


def _refuse_other_sweep(plan: Plan, saved: Any) -> None:
    """Refuse to mix trials of two sweeps, naming the first entry that differs."""
    if not isinstance(saved, dict):
        raise InputError(f"study {plan.study!r} was not made by sweep; name another with --study")
    for name, value in plan.identity().items():
        if saved.get(name) != value:
            field, before, now = _first_difference(name, saved.get(name), value)
            raise InputError(
                f"study {plan.study!r} was made with {field} = {before!r}, this sweep says {now!r}; "
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
