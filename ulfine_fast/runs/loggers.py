"""Runs in the files of experiment trackers: TensorBoard, Weights & Biases, MLflow.

Everything is written to files on this machine. Metrics of single classes stay in the run folder.
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
from ulfine_fast.cache.io.names import one_of

if TYPE_CHECKING:
    from ulfine_fast.runs.files import RunFiles

PROJECT = "ulfine-fast"
_PER_CLASS = ("rate_", "precision_", "recall_")


def log_run(run: RunFiles, to: str, out: Path) -> None:
    """Write one run's settings, its metrics at each evaluation and its final ones.

    Args:
        run: the content of its folder.
        to: "tensorboard", "wandb" (offline, unless WANDB_MODE is set) or "mlflow" (a SQLite store).
        out: folder of that program's files; runs are added to those already there.

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
        raise one_of("the program to log to", to, LOGGERS)
    if importlib.util.find_spec(to) is None:
        raise InputError(f'{to} is not installed; pip install "ulfine-fast[{to}]"')


def evaluations(run: RunFiles) -> Iterator[tuple[int, dict[str, float]]]:
    """Step and defined metrics of each evaluation, those of single classes left out."""
    names = [name for name in run.history if name != "step" and not _is_per_class(name)]
    for row, step in enumerate(run.history.get("step", [])):
        values = {name: float(run.history[name][row]) for name in names}
        yield int(step), {name: value for name, value in values.items() if math.isfinite(value)}


def final_metrics(run: RunFiles) -> dict[str, float]:
    """Numbers of metrics.json: "test/accuracy", "val/accuracy", "cross_validation/accuracy" and so on."""
    splits = {"test": run.metrics, **{name: run.metrics.get(name) or {} for name in ("val", "cross_validation")}}
    return {
        f"{split}/{name}": float(value)
        for split, values in splits.items()
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def run_name(run: RunFiles) -> str:
    """The last two folders of the run's path: "ulfine/seed-0"."""
    return "/".join(run.path.resolve().parts[-2:])


def _is_per_class(column: str) -> bool:
    return any(column.startswith(start) and column.removeprefix(start).isdigit() for start in _PER_CLASS)


def _settings(run: RunFiles) -> dict[str, Any]:
    """The run's settings, in types that every program takes, with the names of its cache and encoder."""
    plain = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in run.config.items()}
    return {**plain, "cache": str(run.cache), "encoder": str(run.encoder.get("name"))}


def _to_tensorboard(run: RunFiles, out: Path) -> None:
    # torch's own writer needs the package
    from torch.utils.tensorboard.writer import SummaryWriter

    writer = SummaryWriter(str(out / run_name(run)))
    for step, values in evaluations(run):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    writer.add_hparams(_settings(run), final_metrics(run), run_name=".")
    writer.close()


def _to_wandb(run: RunFiles, out: Path) -> None:
    import wandb

    out.mkdir(parents=True, exist_ok=True)
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run_name(run),
        config=_settings(run),
        dir=str(out),
        mode=mode,
        settings=wandb.Settings(silent=True),
    ) as experiment:
        for step, values in evaluations(run):
            experiment.log(values, step=step)
        experiment.summary.update(final_metrics(run))


def _to_mlflow(run: RunFiles, out: Path) -> None:
    from mlflow.tracking import MlflowClient

    # it reports the creation of its tables
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # a database is the only local store that current versions maintain
    out.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(f"sqlite:///{out.resolve() / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(PROJECT)
    if experiment is None:
        artifacts = (out / "artifacts").resolve().as_uri()
        experiment_id = client.create_experiment(PROJECT, artifact_location=artifacts)
    else:
        experiment_id = experiment.experiment_id
    run_id = client.create_run(experiment_id, run_name=run_name(run)).info.run_id
    for name, value in _settings(run).items():
        client.log_param(run_id, name, value)
    for step, values in evaluations(run):
        for name, value in values.items():
            client.log_metric(run_id, name, value, step=step)
    for name, value in final_metrics(run).items():
        client.log_metric(run_id, name, value)
    for file in ("config.json", "metrics.json", "split.json"):
        client.log_artifact(run_id, str(run.path / file))
    client.set_terminated(run_id)


LOGGERS: dict[str, Callable[[RunFiles, Path], None]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
}
