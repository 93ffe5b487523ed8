"""A fitted multi-label trial: its head, figures and predictions; a folder of JSON, safetensors and tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.related.multilabel.heads import logits_of
from ulfine_fast.related.multilabel.settings import MultiLabelConfig

FORMAT = "ulfine-fast-multilabel-run"
_SUMMARY = "ulfine-fast-multilabel-summary"
HEADLINE = ("map", "many", "medium", "few")


class Restored(NamedTuple):
    """An unknown label that a run takes for present."""

    id: str
    class_name: str
    probability: float


@dataclass(frozen=True)
class MultiLabelRun:
    """What :func:`ulfine_fast.related.multilabel.train.fit_labels` returns.

    Attributes:
        config: the trial's settings. class_names: (K,).
        tensors: "weights" (K, D) and "bias" (K,) of the classifier that predicts.
        encoder: name, weights and preprocessing of the features' model, None for plain arrays.
        cache_path: the cache's folder, None for a cache in memory. labels_digest: of the label table.
        metrics: see :func:`ulfine_fast.related.multilabel.metrics.figures`, under "val" on validation.
        ids, roles: of all N images of the cache; a role is train, val, test or "" for what the labels do not name.
        predictions: probability of each class (N, K).
        restored: unknown training labels that COMIC takes for present.
    """

    config: MultiLabelConfig
    class_names: list[str]
    tensors: dict[str, Tensor]
    encoder: dict[str, Any] | None = None
    cache_path: Path | None = None
    labels_digest: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    predictions: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))
    restored: list[Restored] = field(default_factory=list)

    def probabilities(self, features: NDArray[Any]) -> NDArray[np.float32]:
        """Probability of each class (n, K), each between 0 and 1 for itself.

        Args:
            features: of the run's encoder (n, D), of any length.

        Raises:
            InputError: features of another width, or not finite.
        """
        rows, dim = torch.from_numpy(np.asarray(features, dtype=np.float32)), self.tensors["weights"].shape[-1]
        if rows.ndim != 2 or rows.shape[1] != dim:
            raise InputError(f"features must have shape (n, {dim}), got {tuple(rows.shape)}")
        if not bool(torch.isfinite(rows).all()):
            raise InputError("features must be finite, got NaN or infinity; extract these images again")
        parameters = {name: tensor[None, None] for name, tensor in self.tensors.items()}
        logits = logits_of(parameters, normalize(rows)[None], torch.tensor([self.config.scale]))[0, 0]
        found: NDArray[np.float32] = logits.sigmoid().numpy()
        return found

    def save(self, folder: Path, *, table: str = "csv") -> None:
        """Write metrics.json, head.safetensors, predictions, restored.csv, and config.json last.

        Args:
            folder: new, or a multi-label run that is replaced.
            table: "csv" or "parquet", of the predictions.

        Raises:
            InputError: the folder cannot be written.
        """
        from safetensors.torch import save_file

        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_json(folder / "metrics.json", self.metrics)
            save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / "head.safetensors")
            self._write_predictions(folder, table)
            _write_rows(folder / "restored.csv", ["id", "class", "probability"], self.restored)
            _write_json(folder / "config.json", self._head())
        except OSError as error:
            raise InputError(f"cannot write the run to {folder}: {error.strerror or error}") from error

    @classmethod
    def load(cls, folder: Path) -> MultiLabelRun:
        """Read what predicts, and the figures; not the predictions.

        Raises:
            InputError: no multi-label run there, or a damaged one.
        """
        from safetensors.torch import load_file

        try:
            head = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if head["format"] != FORMAT or head["version"] != 1:
                raise InputError(f"{folder} is a {head['format']}, not one that `ulfine-fast multilabel` wrote")
            return cls(
                MultiLabelConfig.from_dict(head["config"]),
                head["class_names"],
                load_file(folder / "head.safetensors"),
                head["encoder"],
                None if head["cache"] is None else Path(head["cache"]),
                head["labels"],
                json.loads((folder / "metrics.json").read_text(encoding="utf-8")),
            )
        except InputError:
            raise
        except Exception as error:  # each library has errors of its own for a damaged file
            raise InputError(f"{folder} is no multi-label run ({type(error).__name__}: {error})") from error

    def _head(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": 1,
            "config": asdict(self.config),
            "cache": None if self.cache_path is None else str(self.cache_path),
            "encoder": self.encoder,
            "labels": self.labels_digest,
            "class_names": self.class_names,
            "created_by": f"ulfine-fast {__version__}",
        }

    def _write_predictions(self, folder: Path, table: str) -> None:
        """One line for each image: id, split, and a column for each class."""
        for old in folder.glob("predictions.*"):
            old.unlink()
        if table == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            columns = {"id": self.ids, "split": self.roles}
            pq.write_table(
                pa.table({**columns, **dict(zip(self.class_names, self.predictions.T, strict=True))}),
                folder / "predictions.parquet",
            )
            return
        lines = zip(self.ids, self.roles, self.predictions.tolist(), strict=True)
        rows = [[name, role, *(f"{one:.6f}" for one in own)] for name, role, own in lines]
        _write_rows(folder / "predictions.csv", ["id", "split", *self.class_names], rows)


def save_label_runs(runs: Sequence[MultiLabelRun], out: Path, *, table: str = "csv") -> dict[str, dict[str, Any]]:
    """Save one run as `out`, several as `out/seed-N`, with `out/summary.json` beside them; returns the summary."""
    folders = label_run_folders(out, [run.config.seed for run in runs])
    for run, folder in zip(runs, folders, strict=True):
        run.save(folder, table=table)
    summary = summarize_labels(runs)
    method, seeds = runs[0].config.method, [run.config.seed for run in runs]
    about = {"format": _SUMMARY, "version": 1, "method": method, "seeds": seeds}
    _write_json(out / "summary.json", {**about, "metrics": summary})
    return summary


def summarize_labels(runs: Sequence[MultiLabelRun]) -> dict[str, dict[str, Any]]:
    """Mean, half width of the 95% interval (0 for one run) and n of mAP, all and by group."""
    summary = {}
    for name in HEADLINE:
        found = mean_interval(run.metrics[name] for run in runs if run.metrics[name] is not None)
        if found is not None:
            half = 0.0 if found.n == 1 else found.half
            summary[name] = {"mean": found.mean, "half_width": half, "n": found.n}
    return summary


def label_run_folders(out: Path, seeds: Sequence[int]) -> list[Path]:
    """Where the runs of these seeds go: one run is `out` itself, several are `out/seed-N`."""
    return [out] if len(seeds) == 1 else [out / f"seed-{seed}" for seed in seeds]


def is_label_folder(folder: Path) -> bool:
    """Whether a folder is empty or holds what :func:`save_label_runs` writes, so that it may be replaced."""
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    for name, kind in (("config.json", FORMAT), ("summary.json", _SUMMARY)):
        try:
            if json.loads((folder / name).read_text(encoding="utf-8"))["format"] == kind:
                return True
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return False


def _write_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
