"""The run folder's files and how they are read; nothing here knows how a run was made."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ulfine_fast.cache.io.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

RUN_FORMAT, VERSION = "ulfine-fast-run", 1
# columns of history.csv; those of a class K are called "rate_K" and so on
HISTORY = (
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
HISTORY_OF_A_CLASS = ("rate", "precision", "recall")
_SPLIT_FORMAT = "ulfine-fast-split"
_FILES = ("config.json", "split.json", "metrics.json", "predictions.parquet")
_PARTS = ("labeled", "unlabeled", "val", "test")
_PER_CLASS = (
    "per_class_accuracy",
    "class_counts",
    "per_class_pseudo_label_precision",
    "per_class_pseudo_label_recall",
)


@dataclass(frozen=True, slots=True)
class Predictions:
    """The test rows of one run.

    Attributes:
        ids: row ids, length n.
        labels: true class (n,) int64, -1 where unknown.
        predicted: predicted class (n,) int64.
        confidence: probability of the predicted class (n,) float64, 0..1, after temperature scaling.
        probabilities: the same of all classes (n, K) float32, rows sum to 1.
    """

    ids: list[str]
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What the files of one run folder say, except image ids, predictions and heads, which are read on demand.

    Attributes:
        path: the run folder.
        config: the fields of the fit, `method` and `seed` among them.
        encoder: the manifest's description of the encoder.
        cache: path of the feature cache, or None.
        class_names: K names; untrusted text.
        created_by: name and version of the program that wrote the run.
        status: "done" or "stopped", as :class:`ulfine_fast.Run` has it.
        relabeled: digest of the labels that stood in the place of the cache's own, None where none did.
        split_rule: how the split was drawn, in words.
        split_rows: rows in "labeled", "unlabeled", "val" and "test".
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

    def number(self, key: str) -> float:
        """One metric as a float; NaN where it is null or absent, `val.` looks into the validation metrics."""
        values = self.metrics
        if key.startswith("val."):
            values, key = self.metrics.get("val") or {}, key[4:]
        return _number(values.get(key), key, self.path / "metrics.json")

    def per_class(self, key: str) -> np.ndarray:
        """One metric per class (K,) float64; NaN where it is null, all NaN when the metric is absent."""
        values = self.metrics.get(key)
        where = self.path / "metrics.json"
        return np.array([_number(v, key, where) for v in values or [None] * len(self.class_names)], dtype=np.float64)

    def predictions(self) -> Predictions:
        """Read the test rows of predictions.parquet.

        Raises:
            InputError: the file is cut, lacks a column, or names a class that does not exist.
        """
        return _read_predictions(self.path / "predictions.parquet", len(self.class_names))

    def split(self) -> dict[str, Any]:
        """Read split.json: image ids by role, see :mod:`ulfine_fast.data.splits`.

        Raises:
            InputError: the file is missing, cut or of another version.
        """
        return _read_json(self.path / "split.json", _SPLIT_FORMAT)

    def heads(self) -> dict[str, Tensor]:
        """Read heads.safetensors: the trained tensors by name.

        Raises:
            InputError: the file is missing or cut.
        """
        file = self.path / "heads.safetensors"
        if not file.is_file():
            raise InputError(_missing(file))
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read ({error}); it is cut or damaged, fit the run again") from error


def load_runs(paths: Sequence[Path]) -> list[RunFiles]:
    """Read every run at or below the given folders, each once, in natural order below each folder.

    Raises:
        InputError: no run there, a file missing, cut or of another version, or runs with other classes.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        folders.update(dict.fromkeys(find_runs(Path(path))))
    runs = [load_run(folder) for folder in folders]
    if not runs:
        raise InputError("a report needs at least one run folder, got none")
    _refuse_other_classes(runs)
    return runs


def find_runs(path: Path) -> list[Path]:
    """Return the run folders at or below `path`, in natural order (seed-2 before seed-10).

    Raises:
        InputError: the folder does not exist or holds no run.
    """
    if not path.is_dir():
        raise InputError(f"no folder at {path}; give a run folder written by `ulfine-fast fit`")
    found = sorted(set(_candidates(path)), key=_natural)
    if not found:
        raise InputError(f"no run in {path}; give a folder written by `ulfine-fast fit`, or one above such folders")
    return found


def load_run(folder: Path) -> RunFiles:
    """Read one run folder.

    Raises:
        InputError: a file is missing, cut or of another format version.
    """
    head = _read_json(folder / "config.json", RUN_FORMAT)
    names, config = _field(head, "class_names", list, folder), _field(head, "config", dict, folder)
    _field(config, "method", str, folder)
    split = _read_json(folder / "split.json", _SPLIT_FORMAT)
    metrics = _read_json(folder / "metrics.json", None)
    _check_per_class(metrics, len(names), folder)
    _check_parquet(folder / "predictions.parquet")
    return RunFiles(
        path=folder,
        config=config,
        encoder=head.get("encoder") or {},
        cache=head.get("cache"),
        class_names=[str(name) for name in names],
        created_by=str(head.get("created_by", "unknown")),
        status=str(head.get("status", "done")),
        relabeled=head.get("relabeled"),
        split_rule=str(split.get("rule", "not recorded")),
        split_rows={part: len(split.get(part) or []) for part in _PARTS},
        split_digest=_digest(split),
        metrics=metrics,
        history=_read_history(folder / "history.csv", needed=bool(metrics.get("steps"))),
    )


def _candidates(path: Path) -> Iterator[Path]:
    """Yield folders that are runs; one that lost a file still counts, so that the missing file gets named."""
    for marker in ("config.json", "metrics.json"):
        for file in path.rglob(marker):
            if _looks_like_run(file.parent):
                yield file.parent


def _looks_like_run(folder: Path) -> bool:
    # other programs write a config.json too: ours has a second file of a run beside it, or says what it is
    if sum((folder / name).is_file() for name in _FILES) > 1:
        return True
    config = folder / "config.json"
    return config.is_file() and RUN_FORMAT.encode() in config.read_bytes()[:65536]


def _natural(path: Path) -> list[tuple[int, int, str]]:
    pieces = re.split(r"(\d+)", path.as_posix())
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces]


def _read_json(file: Path, wanted: str | None) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(_missing(file))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{file} cannot be read ({error}); it is cut or damaged, fit the run again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} should hold a JSON object, got {type(content).__name__}; fit the run again")
    if wanted is not None:
        _check_version(content, wanted, file)
    return content


def _missing(file: Path) -> str:
    return f"{file.name} is missing in {file.parent}; the run was not finished, fit it again"


def _check_version(content: dict[str, Any], wanted: str, file: Path) -> None:
    found = (content.get("format"), content.get("version"))
    if found != (wanted, VERSION):
        raise InputError(
            f"{file} is {found[0]!r} version {found[1]!r}, this program reads {wanted!r} version {VERSION}; "
            "use the version that wrote it, or fit the run again"
        )


def _field(content: dict[str, Any], key: str, kind: type, folder: Path) -> Any:
    value = content.get(key)
    if not isinstance(value, kind):
        raise InputError(f"config.json in {folder} has no {key} ({kind.__name__}); fit the run again")
    return value


def _number(value: object, key: str, file: Path) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{file}: {key} should be a number or null, got {value!r}; fit the run again")
    return float(value)


def _check_per_class(metrics: dict[str, Any], classes: int, folder: Path) -> None:
    for key in _PER_CLASS:
        values = metrics.get(key)
        if values is not None and (not isinstance(values, list) or len(values) != classes):
            got = len(values) if isinstance(values, list) else repr(values)
            raise InputError(f"metrics.json in {folder}: {key} should have {classes} values, got {got}")


def _digest(split: dict[str, Any]) -> str:
    """Fingerprint of who is labelled, unlabelled and tested; two runs with the same one can be paired."""
    # sorted: the order of the ids in the file says nothing about who is in a part
    parts = [sorted(map(str, split.get(part) or [])) for part in ("labeled", "unlabeled", "test")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _refuse_other_classes(runs: list[RunFiles]) -> None:
    first = runs[0]
    for run in runs[1:]:
        if run.class_names != first.class_names:
            raise InputError(
                f"{run.path} has other classes ({len(run.class_names)}) than {first.path} ({len(first.class_names)}); "
                "write one report for each set of classes"
            )


def _read_history(file: Path, *, needed: bool) -> dict[str, np.ndarray]:
    """Read the columns of history.csv; a method that takes no step (zero shot) may have none."""
    if not file.is_file():
        if needed:
            raise InputError(_missing(file))
        return {}
    text = file.read_text(encoding="utf-8")
    rows = list(csv.reader(text.splitlines()))
    if not rows:
        return {}
    # a cut in the middle of the last number leaves a whole row, but not the end of its line
    if rows[0][0] != "step" or any(len(row) != len(rows[0]) for row in rows) or not text.endswith("\n"):
        raise InputError(f"{file} is cut or has other columns; fit the run again")
    try:
        cells = [[float(cell) if cell else math.nan for cell in row] for row in rows[1:]]
    except ValueError as error:
        raise InputError(f"{file} holds a cell that is not a number ({error}); fit the run again") from error
    table = np.array(cells, dtype=np.float64).reshape(len(cells), len(rows[0]))  # (evaluations, columns)
    return dict(zip(rows[0], table.T, strict=True))


def _check_parquet(file: Path) -> None:
    """Refuse a missing or cut file by its footer, which is cheap even for many runs."""
    if not file.is_file():
        raise InputError(_missing(file))
    try:
        pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} is cut or not a parquet file; fit the run again") from error


def _read_predictions(file: Path, classes: int) -> Predictions:
    _check_parquet(file)
    try:
        table = pq.read_table(file, columns=["id", "split", "label", "predicted", "confidence", "probabilities"])
        table = table.filter(pa.compute.equal(table["split"], "test"))
        labels, predicted = (table[name].to_numpy().astype(np.int64) for name in ("label", "predicted"))
        flat = table["probabilities"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        probabilities = flat.astype(np.float32).reshape(len(labels), classes)  # (n, K)
    except (pa.ArrowException, KeyError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}); it is damaged, fit the run again") from error
    if ((labels < -1) | (labels >= classes) | (predicted < 0) | (predicted >= classes)).any():
        raise InputError(f"{file} names a class outside 0..{classes - 1}; fit the run again")
    confidence = table["confidence"].to_numpy().astype(np.float64)
    return Predictions(table["id"].to_pylist(), labels, predicted, confidence, probabilities)
