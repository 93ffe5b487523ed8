"""A fitted multi-label trial: its head, metrics and predictions; a folder of JSON, safetensors and tables."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.digests import BLANK, file_digest, is_sealed, sealed
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import read_regular_file
from ulfine_fast.cache.io.json_files import MAX_BYTES, check_schema, parse_json, read_json
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.related.multilabel.heads import head_logits
from ulfine_fast.related.multilabel.settings import MultiLabelConfig
from ulfine_fast.runs.seeds import MeanMetrics, mean_metrics, run_folders

Table = Literal["csv", "parquet"]

FORMAT = "ulfine-fast-multilabel-run"
_SUMMARY = "ulfine-fast-multilabel-summary"
HEADLINE = ("map", "many", "medium", "few")
# Files that config.json holds the digests of since version 2, in which it holds its own too.
_DIGESTED = ("metrics.json", "head.safetensors")
_MAX_HEAD_BYTES = 4 << 30


class _Saved(msgspec.Struct):
    """config.json."""

    version: Annotated[int, msgspec.Meta(ge=1, le=2)]
    config: dict[str, Any]
    class_names: Annotated[list[str], msgspec.Meta(min_length=1)]
    labels: str
    encoder: dict[str, Any] | None = None
    cache: Annotated[str, msgspec.Meta(pattern="^[^\0]*$")] | None = None
    digests: dict[str, str] = {}


class Restored(NamedTuple):
    """An unknown label that a run takes for present."""

    id: str
    class_name: str
    probability: float


@dataclass(frozen=True)
class MultiLabelRun:
    """What :func:`ulfine_fast.related.multilabel.train.fit_labels` returns.

    Attributes:
        config: the trial's settings.
        class_names: (K,).
        tensors: "weights" (K, D) and "bias" (K,) of the classifier that predicts.
        encoder: name, weights and preprocessing of the features' model, None for plain arrays.
        cache_path: the cache's folder, None for a cache in memory.
        labels_digest: of the label table.
        metrics: see :func:`ulfine_fast.related.multilabel.metrics.multilabel_metrics`, under "val" on validation.
        ids: of all N images of the cache.
        roles: of each image: train, val, test, or "" where the labels do not name it.
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
        """Probability of each class (n, K), each between 0 and 1; they need not sum to 1.

        Args:
            features: of the run's encoder (n, D), of any length.

        Raises:
            InputError: features of another width, or not finite.
        """
        rows = torch.from_numpy(np.asarray(features, dtype=np.float32))
        dim = self.tensors["weights"].shape[-1]
        if rows.ndim != 2 or rows.shape[1] != dim:
            raise InputError(f"features must have shape (n, {dim}), got {tuple(rows.shape)}")
        if not bool(torch.isfinite(rows).all()):
            raise InputError("features must be finite, got NaN or infinity; extract these images again")
        parameters = {name: tensor[None, None] for name, tensor in self.tensors.items()}
        logits = head_logits(parameters, normalize(rows)[None], torch.tensor([self.config.scale]))[0, 0]
        probabilities: NDArray[np.float32] = logits.sigmoid().numpy()
        return probabilities

    def save(self, folder: Path, *, table: Table = "csv") -> None:
        """Write metrics.json, head.safetensors, predictions, restored.csv, and config.json last.

        Args:
            folder: new, or a multi-label run that is replaced.
            table: format of the predictions.

        Raises:
            InputError: the folder cannot be written.
        """
        from safetensors.torch import save_file

        config = {
            "format": FORMAT,
            "version": 2,
            "config": asdict(self.config),
            "cache": None if self.cache_path is None else str(self.cache_path),
            "encoder": self.encoder,
            "labels": self.labels_digest,
            "class_names": self.class_names,
            "created_by": f"ulfine-fast {__version__}",
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # without this file the others are no run, so that a stop leaves no old one beside new metrics
            (folder / "config.json").unlink(missing_ok=True)
            _write_json(folder / "metrics.json", self.metrics)
            save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / "head.safetensors")
            self._write_predictions(folder, table)
            _write_csv(folder / "restored.csv", ["id", "class", "probability"], self.restored)
            config["digests"] = {name: file_digest(folder / name) for name in _DIGESTED}
            text = json.dumps({**config, "digest": BLANK}, indent=2, allow_nan=False)
            (folder / "config.json").write_bytes(sealed(f"{text}\n".encode()))
        except OSError as error:
            raise InputError(f"cannot write the run to {folder}: {error.strerror or error}") from error

    def _write_predictions(self, folder: Path, table: Table) -> None:
        """One line for each image: id, split, and a column for each class."""
        for old in folder.glob("predictions.*"):
            old.unlink()
        if table == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            columns = dict(zip(self.class_names, self.predictions.T, strict=True))
            pq.write_table(pa.table({"id": self.ids, "split": self.roles, **columns}), folder / "predictions.parquet")
            return
        lines = [
            [name, role, *(f"{value:.6f}" for value in row)]
            for name, role, row in zip(self.ids, self.roles, self.predictions.tolist(), strict=True)
        ]
        _write_csv(folder / "predictions.csv", ["id", "split", *self.class_names], lines)

    @classmethod
    def load(cls, folder: Path) -> MultiLabelRun:
        """Read the classifier and the metrics; not the predictions.

        Raises:
            InputError: no multi-label run there, or a damaged one.
        """
        from safetensors.torch import load

        path, fix = folder / "config.json", "fit the run again"
        try:
            data = read_regular_file(path, MAX_BYTES)
            content = parse_json(data, dict[str, Any], name=str(path), fix=fix)
            if content.get("format") != FORMAT:
                raise InputError(f"{folder} is a {content.get('format')}, not one that `ulfine-fast multilabel` wrote")
            saved = check_schema(content, _Saved, name=str(path), fix=fix)
            if (saved.version > 1 or "digest" in content) and not is_sealed(data):
                raise InputError(f"{path} was changed after it was written; {fix}")
            files = {
                "metrics.json": read_regular_file(folder / "metrics.json", MAX_BYTES),
                "head.safetensors": read_regular_file(folder / "head.safetensors", _MAX_HEAD_BYTES),
            }
            for name, file in files.items():
                if saved.version > 1 and saved.digests.get(name) != hashlib.sha256(file).hexdigest():
                    raise InputError(f"{folder / name} is not the file that config.json was written with; {fix}")
            metrics = parse_json(files["metrics.json"], dict[str, Any], name=str(folder / "metrics.json"), fix=fix)
            tensors = load(files["head.safetensors"])
            rows = (len(saved.class_names),)
            if tensors["weights"].shape[:1] != rows or tensors["bias"].shape != rows or tensors["weights"].ndim != 2:
                raise InputError(f"{folder / 'head.safetensors'} is no head of {rows[0]} classes; {fix}")
            return cls(
                config=MultiLabelConfig.from_dict(saved.config),
                class_names=saved.class_names,
                tensors=tensors,
                encoder=saved.encoder,
                cache_path=None if saved.cache is None else Path(saved.cache),
                labels_digest=saved.labels,
                metrics=metrics,
            )
        except InputError:
            raise
        except Exception as error:  # each library has errors of its own for a damaged file
            reason = " ".join(str(error).split())
            raise InputError(f"{folder} is no multi-label run ({type(error).__name__}: {reason})") from error


def save_label_runs(runs: Sequence[MultiLabelRun], out: Path, *, table: Table = "csv") -> MeanMetrics:
    """Save one run as `out`, several as `out/seed-N`; returns the mean metrics of `out/summary.json` beside them."""
    seeds = [run.config.seed for run in runs]
    for run, folder in zip(runs, run_folders(out, seeds), strict=True):
        run.save(folder, table=table)
    means = mean_metrics([run.metrics for run in runs], HEADLINE)
    content = {
        "format": _SUMMARY,
        "version": 1,
        "method": runs[0].config.method,
        "seeds": seeds,
        "metrics": means,
    }
    _write_json(out / "summary.json", content)
    return means


def refuse_other_folder(out: Path) -> None:
    """Refuse to overwrite anything but multi-label runs; to be called before minutes of training.

    Raises:
        InputError: `out` is a file, or holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    for name, expected in (("config.json", FORMAT), ("summary.json", _SUMMARY)):
        with contextlib.suppress(InputError):
            if read_json(out / name, dict[str, Any], fix="name a new folder").get("format") == expected:
                return
    raise InputError(f"{out} exists and is no multi-label run; name a new folder")


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
