"""Order, fronts, importance and files of a sweep's results, on metrics written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest

from ulfine_fast.cache.io.toml import read_toml, toml_text
from ulfine_fast.config import FitConfig
from ulfine_fast.metrics.intervals import Interval
from ulfine_fast.search.leaderboard import (
    _fronts,
    importance,
    rank_trials,
    write_best,
    write_leaderboard,
    write_results,
)
from ulfine_fast.search.plan import Plan, default_batch, trial_count
from ulfine_fast.search.samplers import distributions, quiet_optuna
from ulfine_fast.search.space import parse_space

SPACE = parse_space({"method": "ulfine", "lr": {"low": 0.0, "high": 1.0}, "tau": {"low": 0.0, "high": 1.0}})


@pytest.fixture
def plan(tmp_path):
    fixed = {"sampler": "random", "pruning": "none", "trials": 9, "batch": 9, "seeds": 2, "seed": 0, "owner": "me"}
    return Plan(space=SPACE, metrics=("few", "ece"), out=tmp_path, storage="sqlite://", study="s", cache="c", **fixed)


def trial(number, lr, tau, few=(), ece=(), state="COMPLETE"):
    """A trial as the study keeps it, with metrics of two seeds."""
    seeds = [
        {"seed": i, "status": "done", "val": {"few": f, "ece": e}}
        for i, (f, e) in enumerate(zip(few, ece, strict=True))
    ]
    done = optuna.trial.create_trial(
        state=optuna.trial.TrialState[state],
        params={"lr": lr, "tau": tau},
        distributions=distributions(SPACE),
        values=[float(np.mean(few)), float(np.mean(ece))] if few else None,
        user_attrs={"seeds": seeds},
    )
    done.number = number
    return done


TRIALS = [
    trial(0, 0.1, 0.0, (0.4, 0.6), (0.2, 0.2)),
    trial(1, 0.2, 0.1, (0.6, 0.8), (0.3, 0.5)),
    trial(2, 0.3, 0.2, (0.3, 0.3), (0.3, 0.3)),
    trial(3, 0.4, 0.3, state="FAIL"),
]


def test_fronts_by_hand():
    # (2, 0) and (0, 2) and (1, 1) are beaten by no row; (1, 0) is beaten by (1, 1); (0, 0) by (1, 0) too
    rows = np.array([[2, 0], [1, 0], [0, 2], [0, 0], [1, 1]])
    assert _fronts(rows) == [0, 1, 0, 2, 0]
    # equals do not beat each other
    assert _fronts(np.array([[1, 1], [1, 1]])) == [0, 0]
    assert _fronts(np.zeros((0, 2))) == []


def test_the_leaderboard(plan):
    board = rank_trials(TRIALS, plan)
    # trial 1 has the best few, trial 0 the best ece; trial 0 beats trial 2 in both
    assert [one.trial for one in board] == [1, 0, 2]
    assert board[0].metrics["few"].mean == pytest.approx(0.7)
    # Student's t with one degree of freedom: 12.706 sd / sqrt(2), sd = 0.2 / sqrt(2)
    assert board[0].metrics["few"].half == pytest.approx(12.706 * 0.1, rel=1e-4)
    assert board[0].settings == {"method": "ulfine", "lr": 0.2, "tau": 0.1}


def test_files(plan, tmp_path):
    board = rank_trials(TRIALS, plan)
    write_leaderboard(tmp_path, board, plan)
    lines = (tmp_path / "leaderboard.csv").read_text().splitlines()
    assert lines[0] == "rank,trial,seeds,few,few_half_width,ece,ece_half_width,lr,tau"
    assert lines[3] == "3,2,2,0.3,0.0,0.3,0.0,0.3,0.2"
    write_results(tmp_path, TRIALS)
    import pyarrow.parquet as pq

    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(row["trial"], row["seed"], row["val_few"]) for row in rows[:3]] == [(0, 0, 0.4), (0, 1, 0.6), (1, 0, 0.6)]
    write_best(tmp_path, board, 2)
    assert read_toml(tmp_path / "best-2.toml") == {"method": "ulfine", "lr": 0.1, "tau": 0.0}
    assert FitConfig.from_dict(read_toml(tmp_path / "best.toml")).lr == 0.2


def test_a_single_seed_has_no_interval():
    ranked = rank_trials([trial(0, 0.1, 0.0, (0.4,), (0.2,))], plan_of_one())[0]
    assert ranked.to_dict()["figures"]["few"] == {"mean": 0.4, "half_width": None, "n": 1}
    assert isinstance(ranked.metrics["few"], Interval)


def plan_of_one():
    fixed = {"sampler": "tpe", "pruning": "none", "trials": 1, "batch": 1, "seeds": 1, "seed": 0, "owner": "me"}
    return Plan(SPACE, ("few", "ece"), out=Path(), storage="sqlite://", study="s", cache="c", **fixed)


def test_what_decides_is_important(plan):
    random = np.random.default_rng(0)
    trials = []
    for number in range(60):
        lr, tau = random.random(2)
        trials.append(trial(number, lr, tau, (lr, lr), (tau, tau)))
    study = optuna.create_study(directions=plan.directions)
    study.add_trials(trials)
    with quiet_optuna():
        fractions = importance(study, plan, rank_trials(trials, plan))
    assert fractions["few"]["lr"] > 0.9
    assert fractions["ece"]["tau"] > 0.9


def test_equals_have_no_importance(plan):
    trials = [trial(number, number / 9, 0.0, (0.5, 0.5), (0.1 * number,) * 2) for number in range(9)]
    study = optuna.create_study(directions=plan.directions)
    study.add_trials(trials)
    with quiet_optuna():
        assert set(importance(study, plan, rank_trials(trials, plan))) == {"ece"}
        assert importance(study, plan, []) == {}


def test_how_many_are_proposed_together(clusters):
    assert default_batch("random", 512, 3, clusters, workers=False) == 512
    assert default_batch("random", 512, 3, clusters, workers=True) == 64
    assert default_batch("tpe", 512, 3, clusters, workers=False) == 64
    assert default_batch("tpe", 10, 3, clusters, workers=False) == 10
    # a gibibyte of runs: 16 bytes of head a class and dimension, 8 an image, 3 seeds
    each = 16 * 4 * 16 + 8 * len(clusters)
    assert default_batch("random", 10**6, 3, clusters, workers=False) == 2**30 // (3 * each)
    assert trial_count(SPACE, "grid", 512) == 25
    assert trial_count(SPACE, "random", 512) == 512


def test_toml_there_and_back(tmp_path):
    values = {"a": 1, "b": 1e-5, "c": True, "d": 'quo"te\\ ü', "e": 3.0}
    (tmp_path / "x.toml").write_text(toml_text(values, "one\ntwo"), encoding="utf-8")
    assert (tmp_path / "x.toml").read_text(encoding="utf-8").startswith("# one\n# two\n")
    read = read_toml(tmp_path / "x.toml")
    assert read == values
    assert [type(value) for value in read.values()] == [int, float, bool, str, float]
