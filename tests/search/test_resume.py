"""Sweeps that died, at any point, continue there."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from tests.search.conftest import SPACE, recorded
from ulfine_fast import FeatureCache, InputError, sweep
from ulfine_fast.cache.io.toml import read_toml
from ulfine_fast.related.forecast.from_sweep import forecast_sweep
from ulfine_fast.search import sweep as module
from ulfine_fast.search.space import parse_space
from ulfine_fast.search.study import SweepStudy, _with_current_names
from ulfine_fast.search.trial_batches import EvaluationWatch

ROOT = Path(__file__).parents[2]
EVERY_STEP = {**SPACE, "eval_every": 1}


def test_finished_trials_are_never_run_again(search, monkeypatch):
    before = recorded(search(trials=4, refit=1, refit_seeds=1))
    later = search(trials=6, refit=1, refit_seeds=1)
    assert recorded(later)[:4] == before
    assert len(later.study.trials) == 6
    assert json.loads((later.out / "sweep.json").read_text())["trials"] == 6
    monkeypatch.setattr(module, "run_batch", None)
    monkeypatch.setattr(module, "fit_many", None)
    assert recorded(search(trials=6, refit=1, refit_seeds=1)) == recorded(later)
    assert recorded(search(trials=2, refit=1, refit_seeds=1)) == recorded(later)


KILLED = """
import os, signal
from tests.conftest import make_clusters
from tests.search.conftest import SPACE
from ulfine_fast import sweep
from ulfine_fast.search.trial_batches import EvaluationWatch

look = EvaluationWatch.__call__

def fatal(watch, step, rows):
    dropped = look(watch, step, rows)
    if step == 14 and watch._trials[0].number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return dropped

EvaluationWatch.__call__ = fatal
sweep(make_clusters(), {{**SPACE, "eval_every": 1}}, out={out!r}, trials=6, batch=3, sampler="random", refit=0)
"""


def test_a_sweep_killed_in_its_second_batch_continues_there(search, tmp_path, monkeypatch):
    out = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(out=str(out))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(out.glob(".checkpoint/*/batch-*.safetensors"))) == 1
    steps = []
    look = EvaluationWatch.__call__

    def spy(watch, step, rows):
        steps.append(step)
        return look(watch, step, rows)

    monkeypatch.setattr(EvaluationWatch, "__call__", spy)
    continued = search(EVERY_STEP, out=out, batch=3)
    # the evaluation it died in may be seen again, earlier ones may not
    assert 14 <= steps[0] <= 15
    assert steps[-1] == 27
    assert recorded(continued) == recorded(search(EVERY_STEP, out=tmp_path / "whole"))


def test_a_sweep_that_died_while_recording_keeps_what_was_recorded(search, tmp_path, monkeypatch):
    real = SweepStudy.finish

    def fatal(study, number, *results):
        if number == 2:
            raise KeyboardInterrupt
        real(study, number, *results)

    monkeypatch.setattr(SweepStudy, "finish", fatal)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on from here"):
        search()
    again = []
    monkeypatch.setattr(
        SweepStudy, "finish", lambda study, number, *results: (again.append(number), real(study, number, *results))
    )
    continued = search()
    assert again == [2, 3, 4, 5]
    assert recorded(continued) == recorded(search(out=tmp_path / "whole"))


def test_a_sweep_that_died_while_proposing_proposes_the_rest(search, tmp_path, monkeypatch):
    real = optuna.Study.add_trial
    added = []

    def fatal(study, trial):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(trial)
        real(study, trial)

    monkeypatch.setattr(optuna.Study, "add_trial", fatal)
    with pytest.raises(KeyboardInterrupt):
        search()
    monkeypatch.undo()
    assert recorded(search()) == recorded(search(out=tmp_path / "whole"))


@pytest.fixture
def old_sweep(tmp_path):
    """The fixture's sweep, which version 0.1 made, and what its command was: cache, space and options."""
    fixture = ROOT / "tests/fixtures/v0_1"
    shutil.copytree(fixture / "sweep", tmp_path / "sweep")
    # settings that neither method reads, which version 0.1 searched all the same
    unread = ("shrink", "lean", "trust")
    space = {name: entry for name, entry in read_toml(fixture / "sweep/space.toml").items() if name not in unread}
    options = {"out": tmp_path / "sweep", "seeds": 2, "refit": 1, "refit_seeds": 2}
    return FeatureCache.open(fixture / "cache"), space, options


def test_a_sweep_of_version_0_1_continues(old_sweep, monkeypatch):
    cache, space, options = old_sweep
    with (options["out"] / "leaderboard.csv").open() as file:
        before = {row["trial"]: row for row in csv.DictReader(file)}
    refits = json.loads((options["out"] / "sweep.json").read_text())["best"]
    monkeypatch.setattr("ulfine_fast.search.trial_batches.fit_many", None)
    monkeypatch.setattr(module, "fit_many", None)
    same = sweep(cache, space, trials=6, **options)
    monkeypatch.undo()
    assert [str(trial.trial) for trial in same.leaderboard] == list(before)
    assert same.best == refits
    for trial in same.leaderboard:
        row = before[str(trial.trial)]
        assert trial.metrics["balanced_accuracy"].mean == float(row["balanced_accuracy"])
        # `defer` is now called `reweight_after`
        assert list(trial.params) == ["method", "lr", "reweight_after"]
        assert (trial.params["method"], trial.params["lr"]) == (row["method"], float(row["lr"]))
        assert trial.params["reweight_after"] == float(row["defer"])

    further = sweep(cache, space, trials=9, **options)
    assert further.counts == {"complete": 9}
    values = {trial.trial: trial.metrics["balanced_accuracy"].mean for trial in further.leaderboard}
    assert {str(number): values[number] for number in range(6)} == {
        number: float(row["balanced_accuracy"]) for number, row in before.items()
    }
    assert set(further.importance["balanced_accuracy"]) == {"method", "lr", "reweight_after"}
    with pytest.raises(InputError, match=r"was made with space\.lr = "):
        sweep(cache, {**space, "lr": [0.1, 0.2]}, trials=6, **options)


def test_a_sweep_of_version_0_1_is_forecast(old_sweep):
    cache, _, options = old_sweep
    content = forecast_sweep(options["out"], cache, "steps", 2.0, seeds=3)
    assert (content["trial"], content["seeds"]) == (1, [2, 3, 4])
    assert content["curve"]["budgets"] == [8, 10, 15, 21, 30]


def test_a_saved_study_without_a_method_is_of_ulfine():
    space = parse_space({"method": "ulfine", "mu": [0.1, 0.2]})
    named = {"space": space.to_dict()}
    unnamed = {"space": {name: entry for name, entry in space.to_dict().items() if name != "method"}}
    assert _with_current_names(unnamed, space) == named
    other = parse_space({"method": "ulfine_plus", "lr": [0.1, 0.2]})
    assert _with_current_names({"space": {"lr": [0.1, 0.2]}}, other)["space"] == {"method": "ulfine", "lr": [0.1, 0.2]}
