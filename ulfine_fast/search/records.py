"""What the study records of a trial, and the check that a trial is what was recorded.

A database has no checksums of its own. A proposed trial has a digest of its batch and its options; the record of each
of its seeds has one of these and of its metrics. State and values in the database follow from the records.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from msgspec import Meta

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.json_files import check_schema
from ulfine_fast.search.objective import mean_metrics
from ulfine_fast.search.storage import RESTORE

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# attributes of a trial; the names are part of the format
BATCH = "share"
SEEDS = "seeds"
PROPOSED = "proposed"
GENERATION = "cma:generation"
POPULATION = "cma:population"

MOST_TRIALS = 1_000_000
"""Trials of a study."""

State = Literal["complete", "pruned", "failed"]
Owner = Annotated[str, Meta(pattern="^[0-9a-f]{12}$")]
_Count = Annotated[int, Meta(ge=0, le=MOST_TRIALS)]
_Size = Annotated[int, Meta(ge=1, le=MOST_TRIALS)]
_Metric = Annotated[float, Meta(ge=-1e9, le=1e9)]


@dataclass(frozen=True, slots=True)
class StudyBatch:
    """Trials of a study that are proposed, trained and recorded together.

    Attributes:
        owner: id of the sweep they belong to.
        number: of the batch within that sweep, from 0.
        start: index of its first trial in the search's sequence.
        size: how many trials.
    """

    owner: Owner
    number: _Count
    start: _Count
    size: _Size

    @property
    def name(self) -> str:
        """Unique in a study, and valid as a folder's name."""
        return f"{self.owner}-{self.number:05d}"


Status = Literal["done", "stopped", "pruned", "failed"]
"""Of a run, see :class:`ulfine_fast.Run`."""


class _Record(TypedDict):
    seed: int
    status: Status
    seconds: float | None
    failed_at: int | None
    val: dict[str, _Metric | None]


class SeedRecord(_Record, total=False):
    """What is kept of one seed of a trial, in JSON's types.

    Attributes:
        seed: of the run.
        status: of the run.
        seconds: that it took.
        failed_at: step at which its numbers were no longer finite.
        val: metrics on validation, except those of single classes; None for a metric without rows.
        rungs: the metric that pruning compares, by the step of the comparison.
        digest: of the trial's number, batch and values, and of this record; version 0.1 wrote none.
    """

    rungs: dict[str, _Metric | None]
    digest: str


class _Proposal(TypedDict, total=False):
    generation: _Count
    population: Annotated[int, Meta(ge=4, le=MOST_TRIALS)]


def outcome(records: Sequence[SeedRecord], metrics: Sequence[str]) -> tuple[State, list[float] | None]:
    """The state of a trial, and its values where it is complete.

    A seed that diverged fails the trial, one that was dropped prunes it, and one without a metric fails it.
    """
    states = {record["status"] for record in records}
    values = mean_metrics([record["val"] for record in records], metrics)
    if "failed" in states or (values is None and "pruned" not in states):
        return "failed", None
    return ("pruned", None) if "pruned" in states else ("complete", values)


def mean_at_rungs(records: Sequence[SeedRecord]) -> dict[int, float]:
    """By step, the mean over the seeds of the metric that pruning compares."""
    by_step: dict[int, list[float]] = {}
    for record in records:
        for step, value in record.get("rungs", {}).items():
            if value is not None:
                by_step.setdefault(int(step), []).append(value)
    return {step: sum(values) / len(values) for step, values in by_step.items()}


def proposal_digest(params: Mapping[str, Any], batch: StudyBatch, attributes: Mapping[str, Any]) -> str:
    """Digest of a trial that is proposed.

    Args:
        params: its searched options.
        batch: its batch.
        attributes: what its sampler keeps.
    """
    return _digest({"params": dict(params), "batch": asdict(batch), "attributes": dict(attributes)})


def sealed_records(
    records: Sequence[SeedRecord], number: int, params: Mapping[str, Any], batch: StudyBatch
) -> list[SeedRecord]:
    """The records with their digests.

    Args:
        records: of a trial's seeds.
        number: of the trial.
        params: its searched options.
        batch: its batch.
    """
    return [{**record, "digest": _record_digest(record, number, params, batch)} for record in records]


def check_trial(trial: FrozenTrial, metrics: Sequence[str], seeds: Sequence[int]) -> None:
    """Refuse a trial that a sweep did not record, or that was changed afterwards.

    Args:
        trial: as the database has it.
        metrics: that the study optimises.
        seeds: that each trial is averaged over.

    Raises:
        InputError: says what differs.
    """
    name = f"trial {trial.number} of the study"
    if BATCH not in trial.user_attrs:
        raise InputError(f"{name} was not made by sweep; name another study with --study")

    # the proposal
    batch = check_schema(trial.user_attrs[BATCH], StudyBatch, name=name, fix=RESTORE)
    attributes = {key: value for key, value in trial.system_attrs.items() if key in (GENERATION, POPULATION)}
    check_schema({key.partition(":")[2]: value for key, value in attributes.items()}, _Proposal, name=name, fix=RESTORE)
    proposed = trial.user_attrs.get(PROPOSED)
    if proposed is not None and proposed != proposal_digest(trial.params, batch, attributes):
        raise _changed(name, "its values are not those that were proposed")
    if trial.datetime_start is None or not all(map(math.isfinite, trial.intermediate_values.values())):
        raise _changed(name, "its start or a metric on the way is missing")
    if trial.state.name == "RUNNING":
        return

    # the records; a trial whose proposal has a digest has them there too
    recorded = trial.user_attrs.get(SEEDS)
    records = check_schema(recorded, list[SeedRecord], name=name, fix=RESTORE)
    if [record["seed"] for record in records] != list(seeds):
        raise _changed(name, f"its seeds are not {', '.join(map(str, seeds))}")
    for record in recorded or []:
        digest = _record_digest(record, trial.number, trial.params, batch)
        if (proposed is not None or "digest" in record) and record.get("digest") != digest:
            raise _changed(name, f"its results for seed {record['seed']} are not those that were recorded")

    # what the database says beside the records
    state, values = outcome(records, metrics)
    if {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}.get(trial.state.name) != state:
        raise _changed(name, f"its state is {trial.state.name.lower()}, by its results it is {state}")
    if trial.datetime_complete is None or trial.values != values:
        raise _changed(name, f"its values are {trial.values}, by its results {values}")


def _changed(name: str, reason: str) -> InputError:
    return InputError(f"{name} was changed after it was recorded ({reason}); {RESTORE}")


def _record_digest(record: Mapping[str, Any], number: int, params: Mapping[str, Any], batch: StudyBatch) -> str:
    own = {key: value for key, value in record.items() if key != "digest"}
    return _digest({"number": number, "params": dict(params), "batch": asdict(batch), "record": own})


def _digest(content: Mapping[str, Any]) -> str:
    """Hex SHA-256 of content in JSON's types, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
