"""The run folder's format: its files, written and read in this module alone (docs/run-folder.md)."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.digests import BLANK, file_digest, is_sealed, sealed
from ulfine_fast.cache.io.errors import InputError, one_line
from ulfine_fast.cache.io.files import opened_regular_file, read_regular_file
from ulfine_fast.cache.io.json_files import MAX_BYTES, check_schema, parse_json
from ulfine_fast.cache.io.paths import names_another_machine
from ulfine_fast.data.splits import MAX_SPLIT_BYTES, SavedSplit, Split, read_split
from ulfine_fast.runs.calibration import SCORE, Calibration
from ulfine_fast.runs.columns import number_column, text_column
from ulfine_fast.runs.folder import (
    CALIBRATION,
    CONFIG,
    FILES,
    HIDDEN,
    STAGING,
    SUMMARY,
    discard_staged,
    flush_file,
    locked,
    staged,
    swap_in,
    write_error,
)
from ulfine_fast.runs.schemas import Config, CrossValidation, Metrics

if TYPE_CHECKING:
    from torch import Tensor

    from ulfine_fast.runs.run import Run

# version 2 has digests: of every other file in config.json, and of config.json in itself
RUN_FORMAT, VERSIONS = "ulfine-fast-run", (1, 2)
_SPLIT_FORMAT, _SPLIT_VERSIONS = "ulfine-fast-split", (1,)
_REQUIRED = ("config.json", "split.json", "metrics.json", "predictions.parquet")
_FIX = "fit the run again"
_MAX_HISTORY_BYTES = 1 << 30
_ROLES = ("labeled", "unlabeled", "val", "test")
# the part of predictions.parquet with labelled images by fits without them
HELD_OUT = "cross-validation"
# columns of history.csv; those of class K are "rate_K" and so on
_HISTORY = (
    "step",
    "loss",
    "loss_labeled",
    "loss_unlabeled",
    "val_accuracy",
    "val_balanced_accuracy",
    "pseudo_label_rate",
    "pseudo_label_precision",
    "confidence_on_false",
)
_HISTORY_PER_CLASS = ("rate", "precision", "recall")
# files that a run of version 2 has a digest of, beside summary.json and calibration.parquet where they were written
_DIGESTED = tuple(name for name in FILES if name not in (CONFIG, SUMMARY, CALIBRATION))
_METRICS_PER_CLASS = (
    "per_class_accuracy",
    "class_counts",
    "per_class_pseudo_label_precision",
    "per_class_pseudo_label_recall",
)


@dataclass(frozen=True, slots=True)
class Predictions:
    """Predictions of a run's test images, or of its labelled images by fits without them.

    Attributes:
        ids: image ids, length n.
        labels: true class (n,) int64, -1 where unknown.
        predicted: predicted class (n,) int64.
        confidence: probability of the predicted class (n,) float64, 0..1, after temperature scaling.
        probabilities: the same of all classes (n, K) float32, rows sum to 1.
        correct: of cross-validation the fraction of its repeats in which the prediction is right (n,) float64; of test
            images None.
    """

    ids: list[str]
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    probabilities: np.ndarray
    correct: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The content of a run folder; image ids, predictions and heads are read on demand.

    Attributes:
        path: the run folder.
        config: the settings of the fit, `method` and `seed` among them.
        encoder: the manifest's description of the encoder.
        cache: path of the feature cache, or None.
        class_names: K names; untrusted text.
        created_by: name and version of the program that wrote the run.
        status: "done" or "stopped", as :class:`ulfine_fast.Run` has it.
        relabeled: digest of the labels that replaced the cache's own, None where none did.
        second: "encoder" and "cache" of the second encoder, None for a run of one.
        split_rule: how the split was drawn, in words.
        split_rows: number of rows in "labeled", "unlabeled", "val" and "test".
        split_digest: equal for two runs exactly when their labelled, unlabelled and test ids are equal.
        metrics: metrics.json as it is.
        history: column name -> (evaluations,) float64, NaN where not defined; empty without training.
    """

    path: Path
    config: dict[str, Any]
    encoder: dict[str, Any]
    cache: str | None
    class_names: list[str]
    created_by: str
    status: str
    relabeled: str | None
    second: dict[str, Any] | None
    split_rule: str
    split_rows: dict[str, int]
    split_digest: str
    metrics: dict[str, Any]
    history: dict[str, np.ndarray]

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.config["method"])

    @property
    def seed(self) -> object:
        """Seed of the run, or None where the config has none."""
        return self.config.get("seed")

    @property
    def local_cache(self) -> str | None:
        """Path of the cache, where it is on this machine: what a file names is not asked for over a network."""
        return None if self.cache is None or names_another_machine(self.cache) else self.cache

    def number(self, key: str) -> float:
        """One metric as a float, NaN where it is null or absent; `val.` and `cross_validation.` look into these."""
        part, _, name = key.rpartition(".")
        values, key = (self.metrics.get(part) or {}, name) if part else (self.metrics, name)
        return _number(values.get(key), key, self.path / "metrics.json")

    def per_class(self, key: str) -> np.ndarray:
        """One metric per class (K,) float64; NaN where it is null, all NaN when the metric is absent.

        Accuracies are those of cross-validation where there is no test split.
        """
        estimate = self.metrics.get("cross_validation") or {}
        values = self.metrics.get(key) or estimate.get(key) or [None] * len(self.class_names)
        return np.array([_number(value, key, self.path / "metrics.json") for value in values], dtype=np.float64)

    def history_rows(self) -> list[dict[str, Any]]:
        """History as :class:`ulfine_fast.Run` has it: one dictionary per evaluation, None where not defined."""
        rows = []
        for i, step in enumerate(self.history.get("step", [])):
            cells = {name: None if math.isnan(column[i]) else float(column[i]) for name, column in self.history.items()}
            row: dict[str, Any] = {name: cells.get(name) for name in _HISTORY}
            row["step"] = int(step)
            for name in _HISTORY_PER_CLASS:
                row[f"per_class_pseudo_label_{name}"] = [cells.get(f"{name}_{k}") for k in range(len(self.class_names))]
            rows.append(row)
        return rows

    @property
    def is_cross_validated(self) -> bool:
        """Whether its metrics are estimates by cross-validation, as it has no test split."""
        return bool((self.metrics.get("cross_validation") or {}).get("rows"))

    def predictions(self) -> Predictions:
        """Read what the metrics are of in predictions.parquet: test rows, or labelled rows by cross-validation.

        Raises:
            InputError: the file is cut, lacks a column, or names a class that does not exist.
        """
        return self._predictions(HELD_OUT if self.is_cross_validated else "test")

    def test_predictions(self) -> Predictions:
        """Read the test rows of predictions.parquet, none of a run without a test split; raises likewise."""
        return self._predictions("test")

    def _predictions(self, split: str) -> Predictions:
        file, classes = self.path / "predictions.parquet", len(self.class_names)
        _check_parquet(file)
        try:
            columns = ["id", "split", "label", "predicted", "confidence", "probabilities"]
            table = pq.read_table(file, columns=[*columns, *(["correct"] if split == HELD_OUT else [])])
            table = table.filter(pa.compute.equal(table["split"], split))
            ids = table["id"].cast(pa.string()).to_pylist()
            labels, predicted = (table[name].cast(pa.int64()).to_numpy() for name in ("label", "predicted"))
            confidence = table["confidence"].cast(pa.float64()).to_numpy()
            flat = table["probabilities"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            probabilities = flat.astype(np.float32).reshape(len(labels), classes)  # (n, K)
            correct = table["correct"].cast(pa.float64()).to_numpy() if split == HELD_OUT else None
            missing = sum(table[name].null_count for name in ("id", "label", "predicted"))
        except (pa.ArrowException, KeyError, OSError, ValueError, TypeError, AttributeError, MemoryError) as error:
            raise InputError(f"{file} cannot be read ({one_line(error)}); it is damaged, {_FIX}") from error
        if missing or not np.isfinite(probabilities).all() or (correct is not None and np.isnan(correct).any()):
            raise InputError(f"{file} has an empty cell or a probability that is no number; {_FIX}")
        if ((labels < -1) | (labels >= classes) | (predicted < 0) | (predicted >= classes)).any():
            raise InputError(f"{file} names a class outside 0..{classes - 1}; fit the run again")
        return Predictions(ids, labels, predicted, confidence, probabilities, correct)

    def calibration(self) -> Calibration | None:
        """Read calibration.parquet: what rejection and sets are calibrated on; None where the run has no such file.

        Raises:
            InputError: the file is cut, lacks a column, names a class that does not exist, or has another score.
        """
        file, classes = self.path / CALIBRATION, len(self.class_names)
        if not os.path.lexists(file):
            return None
        _check_parquet(file)
        try:
            table = pq.read_table(file)
            score = (table.schema.metadata or {}).get(b"score", b"").decode()
            ids, parts = (table[name].cast(pa.string()).to_pylist() for name in ("id", "part"))
            labels = table["label"].cast(pa.int64()).to_numpy()
            probabilities, scores = (table[name].cast(pa.float32()).to_numpy() for name in ("probability", "score"))
            missing = sum(column.null_count for column in table.columns)
        except (pa.ArrowException, KeyError, OSError, ValueError, TypeError, AttributeError, MemoryError) as error:
            raise InputError(f"{file} cannot be read ({one_line(error)}); it is damaged, {_FIX}") from error
        if score != SCORE:
            raise InputError(f"{file} holds the score {score!r}, this program rejects by {SCORE!r}; {_FIX}")
        if missing or not (np.isfinite(probabilities).all() and np.isfinite(scores).all()):
            raise InputError(f"{file} has an empty cell or a score that is no number; {_FIX}")
        if ((labels < 0) | (labels >= classes)).any():
            raise InputError(f"{file} names a class outside 0..{classes - 1}; {_FIX}")
        return Calibration(ids, labels, np.array(parts) == "fold", probabilities, scores)

    def split(self) -> dict[str, Any]:
        """Read split.json: image ids by role, see :mod:`ulfine_fast.data.splits`.

        Raises:
            InputError: the file is missing, cut or of another version.
        """
        return _read_object(self.path / "split.json", _SPLIT_FORMAT, _SPLIT_VERSIONS, MAX_SPLIT_BYTES)

    def heads(self) -> dict[str, Tensor]:
        """Read heads.safetensors: the trained tensors by name.

        Raises:
            InputError: the file is missing or cut.
        """
        file = self.path / "heads.safetensors"
        _refuse_missing(file)
        # imports torch, which a report does without
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            with opened_regular_file(file):  # a pipe would be waited for
                return load_file(file)
        # the library has errors of its own for a header of other types
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
            raise InputError(f"{file} cannot be read ({one_line(error)}); it is cut or damaged, {_FIX}") from error


def write_run(run: Run, folder: Path) -> None:
    """Write the run folder; replaces an earlier run there.

    Raises:
        InputError: the folder holds something else, another process writes there, or it cannot be written.
    """
    write_runs({folder: run})


def write_runs(
    runs: Mapping[Path, Run], summary: tuple[Path, bytes] | None = None, emptied: Sequence[Path] = ()
) -> None:
    """Write the runs of one fit; earlier runs there are replaced once all of these are complete.

    Args:
        runs: by folder.
        summary: a folder, of a run or above the runs, and the content of its summary.json; None for no such file.
        emptied: folders whose earlier runs go without a new one, such as those of seeds that diverged.

    Raises:
        InputError: a folder holds something else, another process writes there, or it cannot be written.
    """
    for folder in runs:
        if folder.exists() and not may_replace(folder):
            raise InputError(f"{folder} exists and is no run; name a new folder")
    folders = list(dict.fromkeys([*runs, *([] if summary is None else [summary[0]])]))
    with locked(*folders, *emptied):
        folder = folders[0]
        try:
            for folder in folders:
                staging = staged(folder)
                if summary is not None and folder == summary[0]:
                    (staging / SUMMARY).write_bytes(summary[1])
                if folder in runs:
                    _write_files(runs[folder], staging)
                for path in staging.iterdir():
                    flush_file(path)
        except BaseException as error:
            discard_staged(folders)
            if isinstance(error, OSError):
                raise write_error(folder, error) from error
            raise
        try:
            swap_in(folders, emptied)
        except OSError as error:
            raise write_error(folder, error) from error


def as_unicode(text: str) -> str:
    """The text; what is no Unicode in it, such as a byte of a folder's name, as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def write_tensors(run: Run, file: Path) -> None:
    """Write the tensors of a run as safetensors.

    Raises:
        OSError: the file system refused.
    """
    # imports torch, which a report does without
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in run.tensors.items()}, file)
    except SafetensorError as error:
        raise OSError(one_line(error)) from error


def may_replace(folder: Path) -> bool:
    """Whether a folder is empty, holds a run, or what a killed save left."""
    if not folder.is_dir():
        return False
    if (folder / STAGING).is_dir() or _looks_like_run(folder):
        return True
    return all(path.name in HIDDEN for path in folder.iterdir())


def _write_files(run: Run, folder: Path) -> None:
    """Write the files of a run, config.json last, with the digests of the others."""
    write_tensors(run, folder / "heads.safetensors")
    _write_json(folder / "split.json", run.split)
    _write_json(folder / "metrics.json", run.metrics)
    _write_history(folder / "history.csv", run.history, len(run.class_names))
    _write_predictions(folder / "predictions.parquet", run)
    if run.calibration is not None:
        _write_calibration(folder / CALIBRATION, run.calibration)
    config = {
        "format": RUN_FORMAT,
        "version": VERSIONS[-1],
        "config": run.config.to_dict(),
        "cache": None if run.cache_path is None else as_unicode(str(run.cache_path)),
        "encoder": run.encoder,
        "class_names": [as_unicode(name) for name in run.class_names],
        "status": run.status,
        "relabeled": run.relabeled,
        "created_by": f"ulfine-fast {__version__}",
        "digests": {path.name: file_digest(path) for path in sorted(folder.iterdir())},
        "digest": BLANK,
    }
    if run.second is not None:
        path = run.second.cache_path
        config["second"] = {
            "encoder": run.second.encoder,
            "cache": None if path is None else as_unicode(str(path)),
        }
    (folder / CONFIG).write_bytes(sealed(_json_bytes(config)))


def load_run(folder: Path) -> RunFiles:
    """Read one run folder; of version 2, whose files have digests, only as it was written.

    Raises:
        InputError: a file is missing, cut, changed since or of another format version.
    """
    # config.json
    file = folder / CONFIG
    data = _read_bytes(file, MAX_BYTES)
    content = _object(data, file, RUN_FORMAT, VERSIONS)
    known = check_schema(content, Config, name=str(file), fix=_FIX)
    if content["version"] == 1:
        # such a file has none: one with digests had another version once
        sound = not {"digest", "digests"} & content.keys()
    else:
        sound = is_sealed(data) and known.digests is not None and set(_DIGESTED) <= known.digests.keys() <= set(FILES)
    if not sound:
        raise InputError(f"{file} has changed since the run was saved; {_FIX}")

    # the other files are those that it names
    for name, digest in sorted((known.digests or {}).items()):
        path = folder / name
        _refuse_missing(path)
        try:
            same = file_digest(path) == digest
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror or error}); {_FIX}") from error
        if not same:
            raise InputError(f"{path} has changed since the run was saved; {_FIX}")

    # split.json; in the digest the order of the ids does not count
    split_file = folder / "split.json"
    split = check_schema(
        _read_object(split_file, _SPLIT_FORMAT, _SPLIT_VERSIONS, MAX_SPLIT_BYTES),
        SavedSplit,
        name=str(split_file),
        fix=_FIX,
    )
    roles = {role: getattr(split, role) for role in _ROLES}
    members = [sorted(roles[role]) for role in ("labeled", "unlabeled", "test")]

    # metrics.json
    metrics_file = folder / "metrics.json"
    metrics = _read_object(metrics_file)
    numbers = check_schema(metrics, Metrics, name=str(metrics_file), fix=_FIX)
    classes = len(known.class_names)
    estimate = numbers.cross_validation or CrossValidation()
    per_class = [(key, getattr(numbers, key)) for key in _METRICS_PER_CLASS]
    per_class += [(key, getattr(estimate, key)) for key in ("per_class_accuracy", "per_class_interval")]
    for key, values in per_class:
        if values is not None and len(values) != classes:
            raise InputError(f"metrics.json in {folder}: {key} should have {classes} values, got {len(values)}; {_FIX}")

    _check_parquet(folder / "predictions.parquet")
    return RunFiles(
        path=folder,
        config=content["config"],
        encoder=content.get("encoder") or {},
        cache=known.cache,
        class_names=known.class_names,
        created_by=known.created_by,
        status=known.status,
        relabeled=known.relabeled,
        second=content.get("second"),
        split_rule=split.rule,
        split_rows={role: len(ids) for role, ids in roles.items()},
        split_digest=hashlib.sha256(json.dumps(members).encode()).hexdigest(),
        metrics=metrics,
        history=_read_history(folder / "history.csv", needed=bool(numbers.steps)),
    )


def split_at(path: Path, ids: list[str]) -> Split:
    """The split in a file or a run folder, the run checked as a whole.

    Args:
        path: a split.json, or a folder that holds one.
        ids: the cache's image ids, in row order.

    Raises:
        InputError: no split there, of a run that has changed since it was saved, or an image the cache lacks.
    """
    if (path / CONFIG).exists():
        load_run(path)
    return read_split(path, ids)


def load_runs(paths: Sequence[Path]) -> list[RunFiles]:
    """Read every run at or below the given folders, each once, in natural order below each folder.

    Raises:
        InputError: no run there, a file missing, cut or of another version, or runs with other classes.
    """
    folders = dict.fromkeys(folder for path in paths for folder in find_runs(Path(path)))
    runs = [load_run(folder) for folder in folders]
    if not runs:
        raise InputError("a report needs at least one run folder, got none")
    first = runs[0]
    for run in runs[1:]:
        if run.class_names != first.class_names:
            raise InputError(
                f"{run.path} has other classes ({len(run.class_names)}) than {first.path} ({len(first.class_names)}); "
                "write one report for each set of classes"
            )
    return runs


def find_runs(path: Path) -> list[Path]:
    """The run folders at or below `path`, in natural order (seed-2 before seed-10).

    A run that lost a file is among them, so that reading it names the missing file.

    Raises:
        InputError: the folder does not exist or holds no run.
    """
    if not path.is_dir():
        raise InputError(f"no folder at {path}; give a run folder written by `ulfine-fast fit`")
    folders = {file.parent for name in ("config.json", "metrics.json") for file in path.rglob(name)}
    # a killed save leaves files that are no run yet
    folders = {folder for folder in folders if folder.name != STAGING}
    runs = sorted((folder for folder in folders if _looks_like_run(folder)), key=_natural)
    if not runs:
        raise InputError(f"no run in {path}; give a folder written by `ulfine-fast fit`, or one above such folders")
    return runs


def _looks_like_run(folder: Path) -> bool:
    # other programs write a config.json too: that of a run has a second file beside it, or names the format
    if sum((folder / name).is_file() for name in _REQUIRED) > 1:
        return True
    try:
        return RUN_FORMAT.encode() in read_regular_file(folder / CONFIG, MAX_BYTES)
    except OSError:
        return False


def _natural(path: Path) -> list[tuple[int, int, str]]:
    pieces = re.split(r"(\d+)", path.as_posix())
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces]


def _write_json(file: Path, value: Any) -> None:
    file.write_bytes(_json_bytes(value))


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _read_bytes(file: Path, max_bytes: int) -> bytes:
    _refuse_missing(file)
    try:
        return read_regular_file(file, max_bytes)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or error}); {_FIX}") from error


def _read_object(
    file: Path, kind: str | None = None, versions: Sequence[int] = (), max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """The object in a file, of the format `kind` where that is given."""
    return _object(_read_bytes(file, max_bytes), file, kind, versions)


def _object(data: bytes, file: Path, kind: str | None, versions: Sequence[int]) -> dict[str, Any]:
    content = parse_json(data, dict[str, Any], name=str(file), fix=_FIX)
    written_as, version = content.get("format"), content.get("version")
    # true is equal to 1
    known = written_as == kind and version in versions and not isinstance(version, bool)
    if kind is not None and not known:
        raise InputError(
            f"{file} is {written_as!r} version {version!r}, this program reads {kind!r} version "
            f"{' and '.join(map(str, versions))}; use the version that wrote it, or fit the run again"
        )
    return content


def _refuse_missing(file: Path) -> None:
    if not os.path.lexists(file):
        raise InputError(f"{file.name} is missing in {file.parent}; the run was not finished, fit it again")


def _number(value: object, key: str, file: Path) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{file}: {key} should be a number or null, got {value!r}; fit the run again")
    return float(value)


def _write_history(file: Path, history: Sequence[dict[str, Any]], classes: int) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow([*_HISTORY, *(f"{name}_{k}" for name in _HISTORY_PER_CLASS for k in range(classes))])
        for row in history:
            cells = [row.get(name) for name in _HISTORY]
            for name in _HISTORY_PER_CLASS:
                cells += row.get(f"per_class_pseudo_label_{name}") or [None] * classes
            writer.writerow(["" if cell is None else cell for cell in cells])


def _read_history(file: Path, *, needed: bool) -> dict[str, np.ndarray]:
    """The columns of history.csv; a method that takes no step (zero shot) may have none."""
    if not needed and not os.path.lexists(file):
        return {}
    data = _read_bytes(file, _MAX_HISTORY_BYTES)
    try:
        text = data.decode("utf-8")
        rows = list(csv.reader(text.splitlines()))
    except (ValueError, csv.Error) as error:
        raise InputError(f"{file} cannot be read ({one_line(error)}); {_FIX}") from error
    if not rows:
        return {}
    # a file cut in the middle of its last number has a whole row, but no end of line
    header = rows[0]
    whole = all(len(row) == len(header) for row in rows) and text.endswith("\n")
    if header[:1] != ["step"] or len(set(header)) < len(header) or not whole:
        raise InputError(f"{file} is cut or has other columns; fit the run again")
    try:
        cells = [[float(cell) if cell else math.nan for cell in row] for row in rows[1:]]
    except ValueError as error:
        raise InputError(f"{file} holds a cell that is not a number ({error}); fit the run again") from error
    table = np.array(cells, dtype=np.float64).reshape(len(cells), len(header))  # (evaluations, columns)
    steps = table[:, 0]
    if not (np.isfinite(steps) & (steps >= 0) & (steps < 2**53)).all():
        raise InputError(f"{file} has a step that is no whole number; {_FIX}")
    return dict(zip(header, table.T, strict=True))


def _write_predictions(file: Path, run: Run) -> None:
    held_out = run.held_out
    if held_out is None:
        ids, labels, probabilities, split = run.test_ids, run.test_labels, run.test_probabilities, "test"
    else:
        ids, labels, probabilities, split = held_out.ids, held_out.labels, held_out.probabilities, HELD_OUT
    columns = {
        "id": text_column(ids),
        "split": text_column([split] * len(ids)),
        "label": number_column(labels, np.int32),
        "predicted": number_column(probabilities.argmax(1) if len(probabilities) else [], np.int32),
        "confidence": number_column(probabilities.max(1) if len(probabilities) else [], np.float32),
        "probabilities": number_column(probabilities, np.float32),
    }
    if held_out is not None:
        columns["correct"] = number_column(held_out.correct, np.float32)
    pq.write_table(pa.table(columns), file)


def _write_calibration(file: Path, calibration: Calibration) -> None:
    parts = np.where(calibration.in_fold, "fold", "val").tolist()
    columns = {
        "id": text_column(calibration.ids),
        "part": text_column(parts),
        "label": number_column(calibration.labels, np.int32),
        "probability": number_column(calibration.probabilities, np.float32),
        "score": number_column(calibration.scores, np.float32),
    }
    pq.write_table(pa.table(columns).replace_schema_metadata({"score": SCORE}), file)


def _check_parquet(file: Path) -> None:
    """Refuse a missing or cut file by its footer, which is cheap even for many runs."""
    _refuse_missing(file)
    try:
        with opened_regular_file(file) as stream:
            pq.read_metadata(stream)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise InputError(f"{file} is cut or not a parquet file; fit the run again") from error
