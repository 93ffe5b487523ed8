"""Sweeps from the first proposal to the refit: the same twice, whatever the trial batches."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.conftest import make_clusters
from tests.search.conftest import SPACE, recorded
from ulfine_fast import FitConfig, InputError, Run, fit_many
from ulfine_fast.cache.io.toml import read_toml
from ulfine_fast.metrics.intervals import mean_interval

ROOT = Path(__file__).parents[2]


# every class has validation images, and trials differ
HARD = {**SPACE, "gamma_l": 4.0, "val_fraction": 0.4, "lr": {"low": 0.00001, "high": 0.3, "log": True}}


def test_a_random_search_is_the_same_in_any_batches(search, tmp_path):
    whole = search(out=tmp_path / "whole", seeds=2)
    split = search(out=tmp_path / "split", seeds=2, batch=4)
    assert recorded(whole) == recorded(split)
    assert recorded(whole) != recorded(search(out=tmp_path / "other", seeds=2, seed=1))


def test_values_are_those_of_fit_many(search, clusters):
    result = search(trials=3, seeds=2, seed=5)
    for trial in result.study.trials:
        fixed = {name: value for name, value in SPACE.items() if not isinstance(value, dict)}
        runs = fit_many(clusters, [FitConfig(**fixed, **trial.params, seed=seed) for seed in (5, 6)])
        assert trial.value == pytest.approx(np.mean([run.metrics["val"]["balanced_accuracy"] for run in runs]))


def test_the_test_split_is_not_read_before_the_refit(search, monkeypatch):
    seen = []
    real = fit_many

    def spy(*args, **options):
        runs = real(*args, **options)
        seen.append([("accuracy" in run.metrics, len(run.test_ids)) for run in runs])
        return runs

    monkeypatch.setattr("ulfine_fast.search.trial_batches.fit_many", spy)
    monkeypatch.setattr("ulfine_fast.search.sweep.fit_many", spy)
    search(trials=3, refit=1, refit_seeds=2)
    assert seen == [[(False, 0)] * 3, [(True, 60)] * 2]


def test_what_is_written(search):
    result = search(HARD, make_clusters(noise=3.0), trials=8, seeds=2, refit=2, refit_seeds=3)
    out, best = result.out, result.leaderboard[0]
    assert [trial.rank for trial in result.leaderboard] == list(range(1, 9))
    means = [trial.metrics["balanced_accuracy"].mean for trial in result.leaderboard]
    assert means == sorted(means, reverse=True)
    with (out / "leaderboard.csv").open() as file:
        first = next(csv.DictReader(file))
    assert float(first["balanced_accuracy"]) == best.metrics["balanced_accuracy"].mean
    assert float(first["balanced_accuracy_half_width"]) == best.metrics["balanced_accuracy"].half
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert len(rows) == 16
    best_rows = [row["val_balanced_accuracy"] for row in rows if row["trial"] == best.trial]
    assert best.metrics["balanced_accuracy"] == mean_interval(best_rows)
    assert {row["seed"] for row in rows} == {0, 1}
    assert rows[0]["lr"] == result.study.trials[0].params["lr"]
    fractions = json.loads((out / "importance.json").read_text())["balanced_accuracy"]
    assert sum(fractions.values()) == pytest.approx(1)
    assert fractions == result.importance["balanced_accuracy"]
    about = json.loads((out / "sweep.json").read_text())
    assert about["counts"] == {"complete": 8}
    assert about["test_reads"] == 1
    assert read_toml(out / "best.toml") == read_toml(out / "best-1.toml") == best.settings
    assert read_toml(out / "best-2.toml") == result.leaderboard[1].settings
    json.dumps(result.to_dict(), allow_nan=False)
    assert not (out / ".checkpoint").exists()


def test_the_refit_has_fresh_seeds_and_its_runs(search):
    result = search(trials=3, seeds=2, refit=1, refit_seeds=2)
    assert result.best[0]["seeds"] == [2, 3]
    runs = [Run.load(result.out / "best-1" / f"seed-{seed}") for seed in (2, 3)]
    assert result.best[0]["test"]["accuracy"]["mean"] == np.mean([run.metrics["accuracy"] for run in runs])
    assert {run.config.lr for run in runs} == {result.leaderboard[0].settings["lr"]}


def test_bad_trials_are_dropped_from_the_batch(search):
    # with lr = 0 the zero-initialised adapter and head never leave the text, which is far worse than training
    space = {**SPACE, "eval_every": 1, "lr": [0.0, 0.05], "tau": [0.5, 0.75, 1.0]}
    cache = make_clusters(text_noise=3.0)
    result = search(space, cache, trials=6, sampler="grid", pruning="halving")
    states = {trial.params["lr"]: set() for trial in result.study.trials}
    for trial in result.study.trials:
        states[trial.params["lr"]].add(trial.state.name)
    assert states[0.0] == {"PRUNED"}
    assert "COMPLETE" in states[0.05]
    pruned = next(trial for trial in result.study.trials if trial.params["lr"] == 0.0)
    assert set(pruned.intermediate_values) <= {1, 3, 9}
    assert result.counts["pruned"] >= 3


def test_hyperband_leaves_its_last_bracket_alone(search):
    result = search({**SPACE, "eval_every": 3}, trials=12, pruning="hyperband", seeds=2)
    assert result.counts["complete"] >= 1
    assert sum(result.counts.values()) == 12


def test_a_diverged_trial_fails_and_its_neighbours_do_not_notice(search, tmp_path):
    space = {**SPACE, "lr": [0.05, 1e30], "threshold": 0.9, "tau": [0.5, 1.0]}
    result = search(space, trials=4, sampler="grid")
    lone = search({**space, "lr": 0.05}, trials=2, sampler="grid", out=tmp_path / "lone")
    assert result.counts == {"complete": 2, "fail": 2}
    good = {trial.params["tau"]: trial.value for trial in result.study.trials if trial.params["lr"] == 0.05}
    assert good == {trial.params["tau"]: trial.value for trial in lone.study.trials}
    failed = next(trial for trial in result.study.trials if trial.params["lr"] == 1e30)
    assert failed.state.name == "FAIL"
    assert failed.user_attrs["seeds"][0]["failed_at"] >= 1


def test_a_sweep_without_a_complete_trial_says_why(search, tmp_path):
    with pytest.raises(InputError, match="all 2 trials diverged; lower lr"):
        search({**SPACE, "lr": [1e30, 1e31], "threshold": 0.9}, trials=2, sampler="grid")
    with pytest.raises(InputError, match="no validation images to judge by; set val_fraction"):
        search({**SPACE, "val_fraction": 0.0}, trials=2, out=tmp_path / "blind")
    with pytest.raises(
        InputError, match="no trial has many_shot on validation: no class is in that group; choose another --metric"
    ):
        search(trials=2, out=tmp_path / "few", metrics=["many_shot"])


def test_several_metrics_rank_by_fronts(search):
    result = search(HARD, make_clusters(noise=3.0), trials=8, metrics=["few", "ece"])
    assert [direction.name for direction in result.study.directions] == ["MAXIMIZE", "MINIMIZE"]
    front = {trial.number for trial in result.study.best_trials}
    assert {trial.trial for trial in result.leaderboard[: len(front)]} == front
    assert set(result.importance) <= {"few", "ece"}


def test_a_bar_says_how_fast_it_goes(search, capsys):
    search(trials=2, progress=True)
    seen = capsys.readouterr().err
    assert "54/54" in seen
    assert "trial-steps/s" in seen
    search(trials=3, progress=False)
    assert capsys.readouterr().err == ""


def test_a_folder_may_be_moved(search, tmp_path):
    before = recorded(search(trials=2))
    (tmp_path / "sweep").rename(tmp_path / "moved")
    assert recorded(search(trials=3, out=tmp_path / "moved"))[:2] == before


def test_learning_samplers_go_batch_by_batch(search):
    result = search(trials=6, batch=3, sampler="tpe")
    assert [trial.user_attrs["share"]["number"] for trial in result.study.trials] == [0, 0, 0, 1, 1, 1]
    assert result.counts == {"complete": 6}
