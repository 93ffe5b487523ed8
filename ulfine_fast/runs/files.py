"""The run folder's format: its files, written and read in this module alone (docs/run-folder.md)."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from ulfine_fast.runs.run import Run

RUN_FORMAT, VERSION = "ulfine-fast-run", 1
_SPLIT_FORMAT = "ulfine-fast-split"
_FILES = ("config.json", "split.json", "metrics.json", "predictions.parquet")
_ROLES = ("labeled", "unlabeled", "val", "test")
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
_METRICS_PER_CLASS = (
    "per_class_accuracy",
    "class_counts",
    "per_class_pseudo_label_precision",
    "per_class_pseudo_label_recall",
)


@dataclass(frozen=True, slots=True)
class Predictions:
    """Predictions of a run's test images.

    Attributes:
        ids: image ids, length n.
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
        values = self.metrics.get(key) or [None] * len(self.class_names)
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

    def predictions(self) -> Predictions:
        """Read the test rows of predictions.parquet.

        Raises:
            InputError: the file is cut, lacks a column, or names a class that does not exist.
        """
        file, classes = self.path / "predictions.parquet", len(self.class_names)
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
            raise _missing(file)
        # imports torch, which a report does without
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read ({error}); it is cut or damaged, fit the run again") from error


def write_run(run: Run, folder: Path) -> None:
    """Write the run folder, over an earlier run there.

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").exists())):
        raise InputError(f"{folder} exists and is no run; name a new folder")
    # imports torch, which a report does without
    from safetensors.torch import save_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in run.tensors.items()}, folder / "heads.safetensors")
        _write_json(folder / "split.json", run.split)
        _write_json(folder / "metrics.json", run.metrics)
        _write_history(folder / "history.csv", run.history, len(run.class_names))
        _write_predictions(folder / "predictions.parquet", run)
        config = {
            "format": RUN_FORMAT,
            "version": VERSION,
            "config": run.config.to_dict(),
            "cache": None if run.cache_path is None else str(run.cache_path),
            "encoder": run.encoder,
            "class_names": run.class_names,
            "status": run.status,
            "relabeled": run.relabeled,
            "created_by": f"ulfine-fast {__version__}",
        }
        # last: a folder with config.json is a whole run
        _write_json(folder / "config.json", config)
    except OSError as error:
        raise InputError(f"cannot write the run to {folder}: {error.strerror or error}") from error


def load_run(folder: Path) -> RunFiles:
    """Read one run folder.

    Raises:
        InputError: a file is missing, cut or of another format version.
    """
    # config.json
    content = _read_json(folder / "config.json", RUN_FORMAT)
    class_names = _field(content, "class_names", list, folder)
    config = _field(content, "config", dict, folder)
    _field(config, "method", str, folder)

    # split.json; in the digest the order of the ids does not count
    split = _read_json(folder / "split.json", _SPLIT_FORMAT)
    members = [sorted(map(str, split.get(role) or [])) for role in ("labeled", "unlabeled", "test")]

    # metrics.json
    metrics = _read_json(folder / "metrics.json")
    for key in _METRICS_PER_CLASS:
        values = metrics.get(key)
        if values is not None and (not isinstance(values, list) or len(values) != len(class_names)):
            got = len(values) if isinstance(values, list) else repr(values)
            raise InputError(f"metrics.json in {folder}: {key} should have {len(class_names)} values, got {got}")

    _check_parquet(folder / "predictions.parquet")
    return RunFiles(
        path=folder,
        config=config,
        encoder=content.get("encoder") or {},
        cache=content.get("cache"),
        class_names=[str(name) for name in class_names],
        created_by=str(content.get("created_by", "unknown")),
        status=str(content.get("status", "done")),
        relabeled=content.get("relabeled"),
        split_rule=str(split.get("rule", "not recorded")),
        split_rows={role: len(split.get(role) or []) for role in _ROLES},
        split_digest=hashlib.sha256(json.dumps(members).encode()).hexdigest(),
        metrics=metrics,
        history=_read_history(folder / "history.csv", needed=bool(metrics.get("steps"))),
    )


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
    runs = sorted((folder for folder in folders if _looks_like_run(folder)), key=_natural)
    if not runs:
        raise InputError(f"no run in {path}; give a folder written by `ulfine-fast fit`, or one above such folders")
    return runs


def _looks_like_run(folder: Path) -> bool:
    # other programs write a config.json too: that of a run has a second file beside it, or names the format
    if sum((folder / name).is_file() for name in _FILES) > 1:
        return True
    config = folder / "config.json"
    return config.is_file() and RUN_FORMAT.encode() in config.read_bytes()[:65536]


def _natural(path: Path) -> list[tuple[int, int, str]]:
    pieces = re.split(r"(\d+)", path.as_posix())
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces]


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(file: Path, kind: str | None = None) -> dict[str, Any]:
    """The object in a file, of the format `kind` where that is given."""
    if not file.is_file():
        raise _missing(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{file} cannot be read ({error}); it is cut or damaged, fit the run again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} should hold a JSON object, got {type(content).__name__}; fit the run again")
    written_as, version = content.get("format"), content.get("version")
    if kind is not None and (written_as, version) != (kind, VERSION):
        raise InputError(
            f"{file} is {written_as!r} version {version!r}, this program reads {kind!r} version {VERSION}; "
            "use the version that wrote it, or fit the run again"
        )
    return content


def _missing(file: Path) -> InputError:
    return InputError(f"{file.name} is missing in {file.parent}; the run was not finished, fit it again")


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
    if not file.is_file():
        if needed:
            raise _missing(file)
        return {}
    text = file.read_text(encoding="utf-8")
    rows = list(csv.reader(text.splitlines()))
    if not rows:
        return {}
    # a file cut in the middle of its last number has a whole row, but no end of line
    if rows[0][0] != "step" or any(len(row) != len(rows[0]) for row in rows) or not text.endswith("\n"):
        raise InputError(f"{file} is cut or has other columns; fit the run again")
    try:
        cells = [[float(cell) if cell else math.nan for cell in row] for row in rows[1:]]
    except ValueError as error:
        raise InputError(f"{file} holds a cell that is not a number ({error}); fit the run again") from error
    table = np.array(cells, dtype=np.float64).reshape(len(cells), len(rows[0]))  # (evaluations, columns)
    return dict(zip(rows[0], table.T, strict=True))


def _write_predictions(file: Path, run: Run) -> None:
    probabilities = run.test_probabilities
    columns = {
        "id": pa.array(run.test_ids, pa.string()),
        "split": pa.array(["test"] * len(run.test_ids), pa.string()),
        "label": pa.array(run.test_labels, pa.int32()),
        "predicted": pa.array(probabilities.argmax(1) if len(probabilities) else [], pa.int32()),
        "confidence": pa.array(probabilities.max(1) if len(probabilities) else [], pa.float32()),
        "probabilities": pa.array(list(probabilities), pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), file)


def _check_parquet(file: Path) -> None:
    """Refuse a missing or cut file by its footer, which is cheap even for many runs."""
    if not file.is_file():
        raise _missing(file)
    try:
        pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} is cut or not a parquet file; fit the run again") from error
