"""The study on disk: which trials there are, who works on them, and what came out."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ulfine_fast.cache.io.errors import InputError

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from ulfine_fast.search.plan import Plan

_WAIT = 60  # seconds that SQLite waits for another process to finish writing


@dataclass(frozen=True, slots=True)
class Share:
    """The trials of one pass.

    Attributes:
        owner: which sweep asks for them. number: of the pass, from 0.
        start: place of the first in the search's sequence. size: how many.
    """

    owner: str
    number: int
    start: int
    size: int

    @property
    def name(self) -> str:
        """Unique in a study, and fit for a folder."""
        return f"{self.owner}-{self.number:05d}"


class Ledger:
    """One study in its database.

    A trial is written with all its values and the pass it belongs to in one transaction, so that a process may die at
    any instant: whoever redoes the pass finds the trials that were asked for, and asks for the rest.
    """

    def __init__(self, study: Study, storage: RDBStorage) -> None:
        """Use :meth:`open`."""
        self.study, self.storage = study, storage
        self._id = storage.get_study_id_from_name(study.study_name)

    @classmethod
    def open(cls, plan: Plan) -> Ledger:
        """Open the plan's study, or create it.

        Raises:
            InputError: a storage that cannot be opened, or a study made by another space, cache or objective.
        """
        import optuna

        storage = open_storage(plan.storage)
        if plan.study in optuna.get_all_study_names(storage):
            found = optuna.load_study(study_name=plan.study, storage=storage)
            if not _is_void(plan, found):
                _refuse_other(plan, found.user_attrs.get("sweep"))
                return cls(found, storage)
            optuna.delete_study(study_name=plan.study, storage=storage)
        # two workers may create it in the same instant
        study = optuna.create_study(
            study_name=plan.study, storage=storage, directions=plan.directions, load_if_exists=True
        )
        study.set_metric_names(list(plan.metrics))
        study.set_user_attr("sweep", plan.identity())
        return cls(study, storage)

    def trials(self) -> list[FrozenTrial]:
        """All trials, in the order of their numbers."""
        return self.study.get_trials(deepcopy=False)

    def shares(self, trials: Sequence[FrozenTrial]) -> dict[Share, list[FrozenTrial]]:
        """Every pass that asked for at least one trial, with its trials."""
        found: dict[Share, list[FrozenTrial]] = {}
        for trial in trials:
            if "share" in trial.user_attrs:
                found.setdefault(Share(**trial.user_attrs["share"]), []).append(trial)
        return found

    def claim(self, plan: Plan, share: Share) -> list[FrozenTrial]:
        """The trials of a pass: those asked for before it was interrupted, and newly asked ones.

        Returns:
            `share.size` trials in the order of their numbers; finished ones are among them where the pass died late.
        """
        from ulfine_fast.search.samplers import propose

        past = self.trials()
        mine = self.shares(past).get(share, [])
        # more than were wanted, where two workers took the pass for dead at once
        if len(mine) >= share.size:
            return mine[: share.size]
        new = propose(
            plan.space,
            plan.sampler,
            past,
            plan.directions,
            start=share.start + len(mine),
            count=share.size - len(mine),
            seed=plan.seed,
            batch=plan.batch,
        )
        for trial in new:
            self._write(trial, share)
        return self.shares(self.trials())[share]

    def _write(self, trial: FrozenTrial, share: Share) -> None:
        from dataclasses import asdict

        from optuna.trial import TrialState, create_trial

        self.study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={"share": asdict(share)},
                # samplers such as CMA-ES keep their own state here
                system_attrs=trial.system_attrs,
            )
        )

    def report(self, number: int, step: int, value: float) -> None:
        """Note a trial's figure at an evaluation."""
        self.storage.set_trial_intermediate_value(self._trial_id(number), step, value)

    def tell(self, number: int, values: Sequence[float] | None, state: str, seeds: Sequence[Mapping[str, Any]]) -> None:
        """Finish a trial.

        Args:
            number: of the trial.
            values: one for each metric; None unless complete.
            state: "complete", "pruned" or "failed".
            seeds: what came out for each seed, in JSON's types.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        # a worker that was believed dead may have told the trial, and would have told the same
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
        arguments = {"connect_args": {"timeout": _WAIT}} if make_url(url).get_backend_name() == "sqlite" else {}
        storage = optuna.storages.RDBStorage(url, engine_kwargs=arguments)
    except ArgumentError as error:
        raise InputError(f"--storage {url!r} is no database URL; give one such as sqlite:///sweep.db") from error
    except (SQLAlchemyError, ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot open the storage {hidden(url)} ({reason}); check the URL and its driver") from error
    if arguments:
        event.listen(storage.engine, "connect", _hurry)
        storage.engine.dispose()
    return storage


def _hurry(connection: Any, _record: Any) -> None:
    """SQLite's write-ahead log: a commit need not wait for the disk, and survives the death of the process."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def hidden(url: str) -> str:
    """The URL without its password."""
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


def _is_void(plan: Plan, study: Study) -> bool:
    """Whether a study of other settings holds nothing but questions of this very sweep.

    So it is after a first pass that was refused, say for a split the data cannot give: mending the space must not need
    another folder.
    """
    trials = study.get_trials(deepcopy=False)
    own = all(trial.user_attrs.get("share", {}).get("owner") == plan.owner for trial in trials)
    return (
        bool(trials)
        and own
        and study.user_attrs.get("sweep") != plan.identity()
        and not any(trial.state.is_finished() for trial in trials)
    )


def _refuse_other(plan: Plan, found: Any) -> None:
    """Refuse to mix trials of two sweeps, naming the first field that differs."""
    if not isinstance(found, dict):
        raise InputError(f"study {plan.study!r} was not made by sweep; name another with --study")
    wanted = plan.identity()
    for name in wanted:
        if found.get(name) == wanted[name]:
            continue
        field, mine, theirs = _first_difference(name, found.get(name), wanted[name])
        raise InputError(
            f"study {plan.study!r} was made with {field} = {mine!r}, this sweep says {theirs!r}; "
            "use the same, or another --out"
        )


def _first_difference(name: str, found: Any, wanted: Any) -> tuple[str, Any, Any]:
    """The dotted name of the first entry that differs, with both values."""
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return name, found, wanted
    for key in [*wanted, *found]:
        if key not in found or key not in wanted or found[key] != wanted[key]:
            return _first_difference(f"{name}.{key}", found.get(key), wanted.get(key))
    return name, found, wanted
