"""Runs in other programs' files, read back by those programs."""

from __future__ import annotations

import csv
import json
import struct

import pytest

from tests.cache.samples import write_cache
from tests.cli.program import refused, usage_error
from tests.cli.program import run as command
from tests.report.writer import write_run
from ulfine_fast.runs.files import load_run
from ulfine_fast.runs.loggers import evaluations, final_metrics, run_name


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / "runs" / "ulfine" / name) for name in ("seed-0", "seed-1")]


@pytest.fixture
def logged(runs, tmp_path):
    def to(name):
        done = command("log", tmp_path / "runs", "--to", name, "--out", tmp_path / "logs", "--json")
        assert done.exit_code == 0, done.output
        printed = json.loads(done.stdout)
        assert printed == {"to": name, "out": str(tmp_path / "logs"), "runs": ["ulfine/seed-0", "ulfine/seed-1"]}
        return tmp_path / "logs"

    return to


def column(run, name):
    """Step and value of the cells of a column of history.csv that are not empty."""
    with (run / "history.csv").open() as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row[name]]


def leveldb_records(data, block=2**15):
    """Payloads of a log in LevelDB's format, which wandb begins with seven bytes of its own."""
    whole, at = b"", 7
    while at < len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        # 1: all of it; 2, 3, 4: its beginning, middle and end
        if kind in (1, 4):
            yield whole
            whole = b""


def test_tensorboard_shows_the_history_and_the_final_metrics(logged, runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = logged("tensorboard") / "ulfine" / "seed-0"
    events = EventAccumulator(str(folder)).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(step, pytest.approx(value)) for step, value in column(runs[0], "loss")]
    accuracy = json.loads((runs[0] / "metrics.json").read_text())["accuracy"]
    assert events.Scalars("test/accuracy")[-1].value == pytest.approx(accuracy)
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("rate_")]


def test_wandb_files_hold_settings_history_and_summary(logged, runs):
    from wandb.proto import wandb_internal_pb2

    files = sorted((logged("wandb") / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    records = [wandb_internal_pb2.Record.FromString(data) for data in leveldb_records(files[0].read_bytes())]
    name = next(record.run.display_name for record in records if record.HasField("run"))
    first = runs[int(name[-1])]
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["_step"], row["loss"]) for row in rows] == [
        (step, pytest.approx(value)) for step, value in column(first, "loss")
    ]
    config = {
        item.key: json.loads(item.value_json)
        for record in records
        if record.HasField("run")
        for item in record.run.config.update
    }
    assert config["method"] == json.loads((first / "config.json").read_text())["config"]["method"]


def test_mlflow_store_holds_settings_history_metrics_and_files(logged, runs):
    from mlflow.tracking import MlflowClient

    folder = logged("mlflow")
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ulfine-fast")
    stored = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(stored) == {"ulfine/seed-0", "ulfine/seed-1"}
    first = stored["ulfine/seed-0"]
    history = client.get_metric_history(first.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [
        (step, pytest.approx(value)) for step, value in column(runs[0], "loss")
    ]
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    assert first.data.metrics["test/accuracy"] == pytest.approx(metrics["accuracy"])
    assert first.data.params["seed"] == str(json.loads((runs[0] / "config.json").read_text())["config"]["seed"])
    copies = list((folder / "artifacts").rglob("metrics.json"))
    assert sorted(path.read_bytes() for path in copies) == sorted((run / "metrics.json").read_bytes() for run in runs)


def test_values_that_are_not_finite_are_left_out(runs):
    run = load_run(runs[0])
    assert run_name(run) == "ulfine/seed-0"
    assert all(value == value for _, values in evaluations(run) for value in values.values())
    assert "test/method" not in final_metrics(run)
    assert "test/per_class_accuracy" not in final_metrics(run)


def test_another_program_is_refused_before_anything_is_read(tmp_path):
    sentence = usage_error("log", tmp_path / "nothing", "--to", "excel")
    assert "'excel' is not one of 'tensorboard', 'wandb', 'mlflow'" in sentence
    assert "got 'excel'" in refused("fit", tmp_path / "nothing", "--log", "excel")


def test_fit_logs_every_seed_that_it_fitted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "cache", [("train", 6), ("train", 6), ("unlabeled", 4), ("val", 2), ("test", 3)])
    options = ["--steps", 4, "--eval-every", 2, "--seeds", 2, "--log", "tensorboard"]
    done = command("fit", tmp_path / "cache", "--out", tmp_path / "run", *options)
    assert done.exit_code == 0, done.output
    for seed in ("seed-0", "seed-1"):
        assert list((tmp_path / "logs" / "tensorboard" / "run" / seed).glob("events.out.*"))
