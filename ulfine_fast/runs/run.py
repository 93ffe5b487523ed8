"""A fitted trial: its heads, figures and predictions; saved as a folder of JSON, CSV, safetensors and parquet."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig, per_trial_options
from ulfine_fast.core.heads import Tensors, apply_adapter
from ulfine_fast.core.types import Trials
from ulfine_fast.methods.registry import method_of
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.runs.files import HISTORY, HISTORY_OF_A_CLASS, RUN_FORMAT, VERSION, load_run


@dataclass
class Run:
    """What :func:`ulfine_fast.fit` returns.

    Attributes:
        config: the trial's settings.
        class_names: (K,).
        tensors: the heads by name, without a trials axis, e.g. "linear" (K, D).
        split: image ids by role, see :mod:`ulfine_fast.data.splits`.
        metrics: figures on the test split, under "val" on validation; shares in [0, 1].
        history: one row per evaluation.
        test_ids: image ids of the test split (E,). test_labels: (E,). test_probabilities: calibrated (E, K).
        encoder: name, weights and preprocessing of the model the features came from, None for plain arrays.
        cache_path: the cache's folder, None for a cache in memory.
        status: "done"; "stopped" early, for want of progress; "pruned", dropped by whoever watched; or "failed", its
            numbers no longer finite, without tensors. `metrics` then has the step as "stopped_at" and so on.
        relabeled: digest of the labels that stood in the place of the cache's own, None where none did.
    """

    config: FitConfig
    class_names: list[str]
    tensors: dict[str, Tensor]
    metrics: dict[str, Any]
    split: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    test_ids: list[str] = field(default_factory=list)
    test_labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    test_probabilities: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))
    encoder: dict[str, Any] | None = None
    cache_path: Path | None = None
    status: str = "done"
    relabeled: str | None = None

    def logits(self, features: NDArray[Any], *, exact: bool = False) -> NDArray[np.floating[Any]]:
        """Uncalibrated logits.

        Args:
            features: image features of the run's encoder (n, D), of any length; with the adapter adaptformer or the
                feature pre-projection the tokens of its cache (n, S, W), as they are.
            exact: whether to compute in float64, so that a row's logits do not depend on the rows beside it.

        Returns:
            Logits (n, K), float32 or float64.

        Raises:
            InputError: features of another width, or not finite; the run failed.
        """
        self.refuse_failed()
        # rounded to float32 here already: larger numbers are not finite
        rows, shape = torch.from_numpy(np.asarray(features, dtype=np.float32)), self.row_shape
        if tuple(rows.shape[1:]) != shape:
            wanted = ", ".join(map(str, ("n", *shape)))
            raise InputError(f"features must have shape ({wanted}), got {tuple(rows.shape)}")
        if not bool(torch.isfinite(rows).all()):
            raise InputError("features must be finite, got NaN or infinity; extract these images again")
        dtype = torch.float64 if exact else torch.float32
        rows = torch.from_numpy(np.asarray(features)).to(dtype) if exact else rows
        tensors = {name: tensor.unsqueeze(0) for name, tensor in self.tensors.items()}
        tensors = {name: one.to(dtype) if one.is_floating_point() else one for name, one in tensors.items()}
        rows = rows.flatten(1) if self.config.reads_tokens else normalize(rows)
        with torch.no_grad():
            logits = run_logits(self.trial(tensors), tensors, rows.unsqueeze(0))
        return np.asarray(logits[0].to(dtype).numpy())

    def predict_proba(self, features: NDArray[Any]) -> NDArray[np.float32]:
        """Class probabilities (n, K) of features (n, D), at the temperature fitted on validation."""
        return metrics.softmax(self.logits(features) / self.metrics.get("temperature", 1.0)).astype(np.float32)

    def predict(self, features: NDArray[Any]) -> NDArray[np.int64]:
        """Class indices (n,) of features (n, D)."""
        return self.logits(features).argmax(axis=1).astype(np.int64)

    def save(self, folder: str | Path) -> Path:
        """Write the run folder, over an earlier run there.

        Raises:
            InputError: the folder holds something else, or cannot be written; the run failed.
        """
        self.refuse_failed()
        folder = Path(folder)
        if folder.exists() and (
            not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").exists())
        ):
            raise InputError(f"{folder} exists and is no run; name a new folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write(folder)
        except OSError as error:
            raise InputError(f"cannot write the run to {folder}: {error.strerror or error}") from error
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read a run folder.

        Raises:
            InputError: no run there, of another version, or damaged.
        """
        folder = Path(folder)
        _refuse_no_run(folder)
        files = load_run(folder)
        rows = files.predictions()
        return cls(
            config=FitConfig.from_dict(files.config, saved=True),
            class_names=files.class_names,
            tensors=files.heads(),
            metrics=files.metrics,
            split=files.split(),
            history=_rows_of(files.history, len(files.class_names)),
            test_ids=rows.ids,
            test_labels=rows.labels,
            test_probabilities=rows.probabilities,
            encoder=files.encoder or None,
            cache_path=None if files.cache is None else Path(files.cache),
            status=files.status,
            relabeled=files.relabeled,
        )

    @property
    def failure(self) -> str | None:
        """Where a failed run diverged, in a sentence; None for others."""
        if self.status != "failed":
            return None
        return (
            f"seed {self.config.seed} of {self.config.method} diverged: its loss or weights were not finite at "
            f"step {self.metrics['failed_at']}; lower lr (now {self.config.lr:g})"
        )

    def refuse_failed(self) -> None:
        """Refuse to go on with a failed run.

        Raises:
            InputError: the run failed.
        """
        if self.failure is not None:
            raise InputError(self.failure)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """What :meth:`logits` is given of one image: (D,), or (S, W) for tokens."""
        if "backbone.projection" in self.tensors:
            return 2, self.tensors["backbone.projection"].shape[0]
        width = next(t.shape[-1] for name, t in self.tensors.items() if name in ("linear", "prototypes"))
        return (1, width) if self.config.reads_tokens else (width,)

    def trial(self, tensors: dict[str, Tensor]) -> Trials:
        """The context that a method's logits need, for T = 1, given the run's tensors with a trials axis."""
        numbers = {name: [float(getattr(self.config, name))] for name in per_trial_options(self.config)}
        start = tensors.get("prototypes", tensors.get("linear"))
        assert start is not None
        values = {name: torch.tensor(number, dtype=start.dtype) for name, number in numbers.items()}
        return Trials(self.config, values, torch.tensor([self.config.seed]), start, torch.zeros(start.shape[:2]))

    def _write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / "heads.safetensors")
        _write_json(folder / "split.json", self.split)
        _write_json(folder / "metrics.json", self.metrics)
        self._write_history(folder / "history.csv")
        self._write_predictions(folder / "predictions.parquet")
        # last: a folder with config.json is a whole run
        _write_json(
            folder / "config.json",
            {
                "format": RUN_FORMAT,
                "version": VERSION,
                "config": self.config.to_dict(),
                "cache": None if self.cache_path is None else str(self.cache_path),
                "encoder": self.encoder,
                "class_names": self.class_names,
                "status": self.status,
                "relabeled": self.relabeled,
                "created_by": f"ulfine-fast {__version__}",
            },
        )

    def _write_history(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_history_columns(len(self.class_names)))
            for row in self.history:
                figures = [row.get(name) for name in HISTORY]
                for name in HISTORY_OF_A_CLASS:
                    figures += row.get(f"per_class_pseudo_label_{name}") or [None] * len(self.class_names)
                writer.writerow(["" if value is None else value for value in figures])

    def _write_predictions(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        probabilities = self.test_probabilities
        columns = {
            "id": pa.array(self.test_ids, pa.string()),
            "split": pa.array(["test"] * len(self.test_ids), pa.string()),
            "label": pa.array(self.test_labels, pa.int32()),
            "predicted": pa.array(probabilities.argmax(1) if len(probabilities) else [], pa.int32()),
            "confidence": pa.array(probabilities.max(1) if len(probabilities) else [], pa.float32()),
            "probabilities": pa.array(list(probabilities), pa.list_(pa.float32())),
        }
        pq.write_table(pa.table(columns), path)


def run_logits(trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
    """Logits (T, B, K) of fitted runs: their method's, or those of a realigned run.

    A realigned run may hold "realigned.weight" (T, K, D), an affine head in the place of the cosine head, and
    "realigned.bias" (T, K).
    """
    if "realigned.weight" in tensors:
        adapted = apply_adapter(tensors, features, trials.values["adapter_scale"])
        logits = adapted @ tensors["realigned.weight"].transpose(1, 2)
    else:
        logits = method_of(trials.config).logits(trials, tensors, features)
    return logits + tensors["realigned.bias"].unsqueeze(1) if "realigned.bias" in tensors else logits


def _refuse_no_run(folder: Path) -> None:
    """Say what stands in the place of a run."""
    if (folder / "config.json").exists():
        return
    inner = sorted(folder.glob("*/config.json"))
    if inner:
        raise InputError(f"{folder} holds {len(inner)} runs; name one, such as {inner[0].parent}")
    raise InputError(f"{folder} is no run: it has no config.json; name a folder that `ulfine-fast fit` wrote")


def _history_columns(classes: int) -> list[str]:
    return [*HISTORY, *(f"{name}_{k}" for name in HISTORY_OF_A_CLASS for k in range(classes))]


def _rows_of(columns: dict[str, NDArray[np.float64]], classes: int) -> list[dict[str, Any]]:
    """One dictionary per evaluation, None where a figure is not defined, as a fit keeps them."""
    rows = []
    for i, step in enumerate(columns.get("step", [])):
        row = {name: None if np.isnan(values[i]) else float(values[i]) for name, values in columns.items()}
        found: dict[str, Any] = {name: row.get(name) for name in HISTORY}
        found["step"] = int(step)
        for name in HISTORY_OF_A_CLASS:
            found[f"per_class_pseudo_label_{name}"] = [row.get(f"{name}_{k}") for k in range(classes)]
        rows.append(found)
    return rows


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
