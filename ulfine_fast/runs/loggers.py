"""Runs for the programs in which people watch their experiments: TensorBoard, Weights & Biases, MLflow.

Everything is written to files on this machine. Figures per class stay in the run folder.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulfine_fast.cache.io.errors import InputError

if TYPE_CHECKING:
    from ulfine_fast.runs.files import RunFiles

PROJECT = "ulfine-fast"
_PER_CLASS = ("rate_", "precision_", "recall_")


def log_run(run: RunFiles, to: str, out: Path) -> None:
    """Writes one run's settings, its figures at each evaluation and its last ones.

    Args:
        run: what its folder says.
        to: "tensorboard", "wandb" (offline, unless WANDB_MODE says otherwise) or "mlflow" (a SQLite store).
        out: folder of that program's files; runs are added to what is there.

    Raises:
        InputError: another program, or one that is not installed.
    """
    refuse_unknown(to)
    LOGGERS[to](run, out)


def refuse_unknown(to: str) -> None:
    """Refuse a program that runs cannot be logged to, before any work is done for it.

    Raises:
        InputError: another program, or one that is not installed.
    """
    if to not in LOGGERS:
        raise InputError(f"runs are logged to {', '.join(LOGGERS)}, got {to!r}")
    if importlib.util.find_spec(to) is None:
        raise InputError(f'{to} is not installed; pip install "ulfine-fast[{to}]"')


def points(run: RunFiles) -> Iterator[tuple[int, dict[str, float]]]:
    """Each evaluation's step with the figures that are defined there, those of single classes left out."""
    names = [name for name in run.history if name != "step" and not _of_a_class(name)]
    for row, step in enumerate(run.history.get("step", [])):
        values = {name: float(run.history[name][row]) for name in names}
        yield int(step), {name: value for name, value in values.items() if math.isfinite(value)}


def figures(run: RunFiles) -> dict[str, float]:
    """Numbers of metrics.json: "test/accuracy", "val/accuracy" and so on."""
    parts = {"test": run.metrics, "val": run.metrics.get("val") or {}}
    return {
        f"{part}/{name}": float(value)
        for part, values in parts.items()
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def named(run: RunFiles) -> str:
    """The last two folders of the run's path: "ulfine/seed-0"."""
    return "/".join(run.path.resolve().parts[-2:])


def _of_a_class(name: str) -> bool:
    return any(name.startswith(start) and name.removeprefix(start).isdigit() for start in _PER_CLASS)


def _settings(run: RunFiles) -> dict[str, Any]:
    """The run's settings, in types that every program takes; "cache" and "encoder" say what they were fitted on."""
    plain = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in run.config.items()}
    return {**plain, "cache": str(run.cache), "encoder": str(run.encoder.get("name"))}


def _to_tensorboard(run: RunFiles, out: Path) -> None:
    # torch's own writer needs the package
    from torch.utils.tensorboard.writer import SummaryWriter

    writer = SummaryWriter(str(out / named(run)))
    for step, values in points(run):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    writer.add_hparams(_settings(run), figures(run), run_name=".")
    writer.close()


def _to_wandb(run: RunFiles, out: Path) -> None:
    import wandb

    out.mkdir(parents=True, exist_ok=True)
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    settings = wandb.Settings(silent=True)
    with wandb.init(
        project=project, name=named(run), config=_settings(run), dir=str(out), mode=mode, settings=settings
    ) as there:
        for step, values in points(run):
            there.log(values, step=step)
        there.summary.update(figures(run))


def _to_mlflow(run: RunFiles, out: Path) -> None:
    from mlflow.tracking import MlflowClient

    # how it lays out its tables is nobody's news
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # a database is the only local store that current versions keep up
    out.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(f"sqlite:///{out.resolve() / 'mlflow.db'}")
    found, files = client.get_experiment_by_name(PROJECT), (out / "artifacts").resolve().as_uri()
    experiment = found.experiment_id if found else client.create_experiment(PROJECT, artifact_location=files)
    begun = client.create_run(experiment, run_name=named(run)).info.run_id
    for name, value in _settings(run).items():
        client.log_param(begun, name, value)
    for step, values in points(run):
        for name, value in values.items():
            client.log_metric(begun, name, value, step=step)
    for name, value in figures(run).items():
        client.log_metric(begun, name, value)
    for file in ("config.json", "metrics.json", "split.json"):
        client.log_artifact(begun, str(run.path / file))
    client.set_terminated(begun)


LOGGERS: dict[str, Callable[[RunFiles, Path], None]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
}
