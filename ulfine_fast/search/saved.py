"""The folder of a sweep as it is read again: every file is checked against what sweep.json says of it.

Version 0.1 wrote no digests. Of its folders the files are compared with each other, as far as they say the same.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ulfine_fast.cache.io.digests import is_sealed
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import read_regular_file
from ulfine_fast.cache.io.json_files import MAX_BYTES, check_schema, parse_json, read_json
from ulfine_fast.cache.io.toml import parse_toml
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.search.objective import METRICS, sign, tell_importance
from ulfine_fast.search.records import MOST_TRIALS, SEEDS
from ulfine_fast.search.space import new_names
from ulfine_fast.search.storage import RESTORE

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

OWNER = ".owner"
SUMMARY = "sweep.json"
LEADERBOARD = "leaderboard.csv"
RESULTS = "results.parquet"
IMPORTANCE = "importance.json"
BEST = "best.toml"
FORMAT = "ulfine-fast-sweep"
VERSION = 2
"""Of sweep.json. Version 1, which 0.1 wrote, has no digests."""

_GO_ON = "run the sweep again, which goes on, or name a folder that `sweep` wrote"
_SUMMARY_LOST = "restore it from a copy, or remove it to refit the best once more"

_Count = Annotated[int, msgspec.Meta(ge=0, le=MOST_TRIALS)]
_Positive = Annotated[int, msgspec.Meta(ge=1, le=MOST_TRIALS)]
_Seed = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
# a whole number stays one
_Number = Annotated[int, msgspec.Meta(ge=0, le=10**18)] | Annotated[float, msgspec.Meta(ge=-1e18, le=1e18)]
_Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Refit(TypedDict):
    """A trial that was refit, as :attr:`SweepResult.best` has it.

    Attributes:
        rank: from 1.
        trial: its number.
        seeds: of its runs.
        settings: name of the file of its settings.
        runs: name of the folder of its runs.
        test: mean, half width and number of each test metric.
    """

    rank: _Positive
    trial: _Count
    seeds: list[_Seed]
    settings: str
    runs: str
    test: dict[str, dict[str, _Number]]


class Summary(msgspec.Struct):
    """The content of sweep.json, as far as it is read again.

    Attributes:
        space: fixed values and searched entries by option.
        cache: fingerprint of the features.
        metrics: what was optimised, on validation.
        seeds: how many seeds each trial was averaged over.
        seed: the first of them.
        split: fingerprint of the split that every trial used; None where each config drew its own.
        counts: trials by state.
        best: the refits.
        test_reads: how often the test split was read.
        owner: id of the sweep; None in version 1.
        files: SHA-256 of the other files by name; None in version 1.
    """

    space: dict[str, Any]
    cache: str
    metrics: list[str]
    seeds: _Positive
    seed: _Seed
    split: str | None
    counts: dict[str, _Count]
    best: list[Refit]
    test_reads: _Count
    owner: str | None = None
    files: dict[str, str] | None = None


@dataclass(frozen=True)
class SavedSweep:
    """What the folder of a finished sweep says.

    Attributes:
        folder: of the sweep.
        summary: the content of sweep.json.
        leaderboard: rows of leaderboard.csv, best first; cells by column.
        importance: fraction of each setting, by metric.
        settings: all settings of the best trial, except the seed.
    """

    folder: Path
    summary: Summary
    leaderboard: list[dict[str, str]]
    importance: dict[str, dict[str, float]]
    settings: dict[str, Any]

    @property
    def trial(self) -> int:
        """Number of the best trial."""
        return int(self.leaderboard[0]["trial"])


def read_sweep(folder: Path) -> SavedSweep:
    """Read the folder of a finished sweep.

    Raises:
        InputError: no finished sweep there, or one with a damaged file; names the file.
    """
    try:
        summary = _read_summary(folder, _GO_ON)
        leaderboard = _rows(_checked_file(folder, LEADERBOARD, summary), summary)
        importance = parse_json(
            _checked_file(folder, IMPORTANCE, summary),
            dict[str, dict[str, _Fraction]],
            name=IMPORTANCE,
            fix=_GO_ON,
        )
        settings = parse_toml(_checked_file(folder, BEST, summary), BEST)
        if summary.files is None:
            _compare_files(folder, summary, leaderboard, importance, settings)
        return SavedSweep(folder, summary, leaderboard, importance, settings)
    except OSError as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{folder} is not a finished sweep ({reason}); {_GO_ON}") from error


def is_of_another_program(folder: Path) -> bool:
    """Whether the sweep.json in a folder is not of `sweep`.

    Raises:
        InputError: it cannot be read.
        OSError: likewise.
    """
    if (folder / OWNER).exists():
        return False
    content = parse_json(read_regular_file(folder / SUMMARY, MAX_BYTES), Any, name=str(folder / SUMMARY), fix=_GO_ON)
    return not isinstance(content, dict) or content.get("format") != FORMAT


def earlier_summary(folder: Path) -> Summary | None:
    """What an earlier call left in sweep.json; None before the first is finished.

    Raises:
        InputError: a damaged file, or test metrics that are not those of the refit's runs.
    """
    try:
        return _read_summary(folder, _SUMMARY_LOST)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{folder / SUMMARY} cannot be read ({error.strerror or error}); {_SUMMARY_LOST}") from error


def refuse_changed_trials(folder: Path, trials: Sequence[FrozenTrial]) -> None:
    """Refuse trials of version 0.1 that are not those of results.parquet, where that file can be read.

    Args:
        folder: of the sweep.
        trials: of its study, with today's names of settings.

    Raises:
        InputError: names the trial.
    """
    finished = [trial for trial in trials if trial.state.is_finished()]
    old = [trial for trial in finished if not all("digest" in record for record in trial.user_attrs[SEEDS])]
    results = _results(folder) if old else {}
    names = new_names()
    for trial in old:
        # a process that died may have left the file without the last trials
        rows = [{names.get(name, name): value for name, value in row.items()} for row in results.get(trial.number, [])]
        own = result_rows(trial)
        same = [all(row.get(name) == value for name, value in o.items()) for o, row in zip(own, rows, strict=False)]
        if rows and (len(rows) != len(own) or not all(same)):
            raise InputError(f"trial {trial.number} of the study is not that of {folder / RESULTS}; {RESTORE}")


def result_rows(trial: FrozenTrial) -> list[dict[str, Any]]:
    """The rows of results.parquet of a trial, one for each seed; none before it is finished."""
    rows = []
    for record in trial.user_attrs.get(SEEDS, []) if trial.state.is_finished() else []:
        row = {"trial": trial.number, "state": trial.state.name.lower(), **trial.params}
        row.update({name: value for name, value in record.items() if name not in ("val", "rungs", "digest")})
        row.update({f"val_{name}": value for name, value in record["val"].items()})
        rows.append(row)
    return rows


def _read_summary(folder: Path, fix: str) -> Summary:
    """The content of sweep.json.

    Raises:
        OSError: no such file, or not a regular one.
        InputError: of another program or version, changed since it was written, or of other types.
    """
    path = folder / SUMMARY
    data = read_regular_file(path, MAX_BYTES)
    content = parse_json(data, dict[str, Any], name=str(path), fix=fix)
    if content.get("format") != FORMAT or content.get("version") not in (1, VERSION):
        raise InputError(
            f"{path} has format {content.get('format')!r}, version {content.get('version')!r}; "
            "name a folder that `sweep` wrote"
        )
    if (content["version"] != 1 or "digest" in content) and not is_sealed(data):
        raise InputError(f"{path} was changed after it was written; {fix}")
    summary = check_schema(content, Summary, name=str(path), fix=fix)

    wrong = [metric for metric in summary.metrics if metric not in METRICS]
    if wrong or not summary.metrics or (summary.files is None) != (content["version"] == 1):
        raise InputError(f"{path} names the metrics {summary.metrics!r}; {fix}")
    for i, refit in enumerate(summary.best):
        name = f"best-{i + 1}"
        fresh = [summary.seed + summary.seeds + n for n in range(len(refit["seeds"]))]
        if (refit["rank"], refit["settings"], refit["runs"]) != (i + 1, f"{name}.toml", name):
            raise InputError(f"{path} names no refit {name} in its place; {fix}")
        if refit["seeds"] != fresh or not fresh:
            raise InputError(f"{path} says that {name} was fitted with seeds {refit['seeds']}, not {fresh}; {fix}")
        if summary.files is None and refit["test"]:
            _compare_test_metrics(folder / name, refit, fix)
    return summary


def _checked_file(folder: Path, name: str, summary: Summary) -> bytes:
    """The content of a file.

    Raises:
        OSError: no such file, or not a regular one.
        InputError: it is not the one that sweep.json was written with.
    """
    data = read_regular_file(folder / name, MAX_BYTES)
    if summary.files is not None and summary.files.get(name) != hashlib.sha256(data).hexdigest():
        raise InputError(f"{folder / name} is not the file that sweep.json was written with; {_GO_ON}")
    return data


def _rows(data: bytes, summary: Summary) -> list[dict[str, str]]:
    """The rows of a leaderboard, the best first.

    Raises:
        InputError: other columns, no row, or cells that are no numbers where numbers belong.
    """
    searched = [name for name, entry in summary.space.items() if isinstance(entry, list | dict)]
    metrics = [f"{metric}{end}" for metric in summary.metrics for end in ("", "_half_width")]
    columns = ["rank", "trial", "seeds", *metrics, *searched]
    try:
        header, *rows = csv.reader(io.StringIO(data.decode(), newline=""), strict=True)
        if header != columns or not rows or any(len(row) != len(columns) for row in rows):
            raise ValueError(f"its columns are not {', '.join(columns)}")
        entries = [dict(zip(columns, row, strict=True)) for row in rows]
        for rank, entry in enumerate(entries, start=1):
            if (int(entry["rank"]), int(entry["seeds"])) != (rank, summary.seeds) or int(entry["trial"]) < 0:
                raise ValueError(f"row {rank} has rank {entry['rank']} and seeds {entry['seeds']}")
            if not all(math.isfinite(float(entry[metric])) for metric in summary.metrics):
                raise ValueError(f"row {rank} lacks a metric")
        return entries
    except (ValueError, csv.Error) as error:
        raise InputError(f"{LEADERBOARD} cannot be read ({error}); {_GO_ON}") from error


# -- folders of version 0.1, without digests


def _compare_files(
    folder: Path,
    summary: Summary,
    leaderboard: Sequence[Mapping[str, str]],
    importance: Mapping[str, Mapping[str, float]],
    settings: Mapping[str, Any],
) -> None:
    """Refuse files of version 0.1 that contradict each other.

    Raises:
        InputError: names the file.
    """

    def contradiction(name: str, what: str) -> InputError:
        return InputError(f"{folder / name} contradicts the rest of the sweep ({what}); {_GO_ON}")

    # the leaderboard: the means over the rows of each trial
    results = _results(folder)
    searched = [name for name, entry in summary.space.items() if isinstance(entry, list | dict)]
    for entry in leaderboard:
        rows = results.get(int(entry["trial"]), [])
        if not rows and results:
            raise contradiction(LEADERBOARD, f"no results of trial {entry['trial']}")
        for metric in summary.metrics if rows else ():
            interval = mean_interval(row[f"val_{metric}"] for row in rows)
            if interval is None or not _same(entry[metric], interval.mean):
                raise contradiction(LEADERBOARD, f"{metric} of trial {entry['trial']}")
            if not _same(entry[f"{metric}_half_width"] or "nan", interval.half):
                raise contradiction(LEADERBOARD, f"half width of {metric} of trial {entry['trial']}")
        for name in searched if rows else ():
            if entry[name] != str(rows[0].get(name)):
                raise contradiction(LEADERBOARD, f"{name} of trial {entry['trial']}")
    complete = {number for number, rows in results.items() if rows[0].get("state") == "complete"}
    if results and [len(leaderboard), summary.counts.get("complete")] != [len(complete)] * 2:
        raise contradiction(LEADERBOARD, f"{len(leaderboard)} trials, {len(complete)} are complete")

    # the best settings: fixed ones, and those of the leaderboard's first row
    expected = {name: leaderboard[0][name] if name in searched else str(entry) for name, entry in summary.space.items()}
    different = {name for name, value in expected.items() if str(settings.get(name)) != value}
    if different or len(settings) != len(expected):
        raise contradiction(BEST, ", ".join(sorted(different or settings.keys() - expected.keys())))

    # importance: fractions of the searched settings
    scores = {metric: [sign(metric) * float(entry[metric]) for entry in leaderboard] for metric in summary.metrics}
    if importance.keys() != {metric for metric in summary.metrics if tell_importance(scores[metric])}:
        raise contradiction(IMPORTANCE, f"it is of {', '.join(importance) or 'no metric'}")
    for metric, fractions in importance.items():
        if fractions.keys() - searched or not _same("1", sum(fractions.values())):
            raise contradiction(IMPORTANCE, metric)

    # the refits: of the best trials
    for entry, refit in zip(leaderboard, summary.best, strict=False):
        if int(entry["trial"]) != refit["trial"]:
            raise contradiction(SUMMARY, f"best-{refit['rank']} is trial {refit['trial']}")


def _compare_test_metrics(folder: Path, refit: Refit, fix: str) -> None:
    """Refuse test metrics in sweep.json that are not those of the refit's own summary."""

    class RefitSummary(msgspec.Struct):
        metrics: dict[str, dict[str, float]]
        seeds: list[int]

    path = folder / "summary.json"
    own = read_json(path, RefitSummary, fix=fix)
    if own.metrics != refit["test"]:
        raise InputError(f"{path} has other test metrics than {SUMMARY}; {fix}")


def _results(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The rows of results.parquet by trial; none where it cannot be read, as version 0.1 may have died writing it."""
    try:
        data = read_regular_file(folder / RESULTS, MAX_BYTES)
        rows = pq.read_table(pa.BufferReader(data), use_threads=False).to_pylist()
        by_trial: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            by_trial.setdefault(int(row["trial"]), []).append(row)
        return by_trial
    # a damaged file may fail in any part of the library
    except Exception:
        return {}


def _same(cell: str, value: float) -> bool:
    """Whether a cell holds a number, but for its last digits, which differ between versions of libraries."""
    try:
        number = float(cell)
    except ValueError:
        return False
    return math.isclose(number, value, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(number) and not math.isfinite(value))
