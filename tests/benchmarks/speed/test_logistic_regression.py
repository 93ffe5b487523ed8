"""Both contenders on a small world, and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.data import unit_rows
from benchmarks.speed import logistic_regression
from benchmarks.speed.logistic_regression import CLOSE, engine, measure, objective, sklearn
from tests.benchmarks.program import run_command
from tests.conftest import make_clusters
from ulfine_fast.config import FitConfig
from ulfine_fast.engine.fit import draw_splits


@pytest.fixture(scope="module")
def cache():
    return make_clusters(noise=1.5)


def test_both_reach_the_same_loss(cache, monkeypatch):
    # scikit-learn takes thousands of iterations without a penalty
    monkeypatch.setattr(logistic_regression, "INVERSE_PENALTIES", (1e-2, 1e1))
    rows = measure(cache, 3, [0, 1], reference_seeds=2, threads=1, device="cpu")
    assert [row["contender"] for row in rows] == ["engine", "scikit-learn"]
    for row in rows:
        assert row["unfinished"] == 0
        assert row["excess"] <= CLOSE
        assert row["seconds"] > 0
    assert rows[0]["ratio"] == pytest.approx(rows[1]["seconds"] / rows[0]["seconds"])


def test_fewer_reference_seeds_count_in_proportion(cache, monkeypatch):
    monkeypatch.setattr(logistic_regression, "INVERSE_PENALTIES", (1e-2, 1e1))
    monkeypatch.setattr(
        logistic_regression, "sklearn", lambda *args: (logistic_regression.Seconds(2.0, 3.0), np.ones(len(args[2])))
    )
    _, reference = measure(cache, 3, [0, 1, 2], reference_seeds=1, threads=1, device="cpu")
    assert reference["seconds"] == 6.0
    assert reference["core_seconds"] == 9.0


def test_the_objective_of_zero_is_the_logarithm_of_the_classes(cache):
    rows, labels = unit_rows(cache.plain[:40]), cache.labels[:40]
    zero = objective(rows, labels, np.zeros((4, cache.dim)), np.zeros(4), 1.0)
    assert zero == pytest.approx(40 * np.log(4))
    one = objective(rows, labels, np.ones((4, cache.dim)), np.zeros(4), 0.5)
    assert one == pytest.approx(zero + 4 * cache.dim)


def test_scikit_learn_goes_on_until_it_has_the_loss(cache):
    [split] = draw_splits(cache, [FitConfig(method="linear_probe")])
    values = [1e-2, 1e1, 1e2]
    _, goals, unfinished = engine(cache, [split], [0], values, "cpu")
    _, losses = sklearn(cache, split, values, goals[0], 1)
    assert unfinished == 0
    np.testing.assert_array_less(losses, goals[0] * (1 + CLOSE))


def test_the_command_prints_and_writes(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(logistic_regression, "open_features", lambda data: cache)
    monkeypatch.setattr(logistic_regression, "INVERSE_PENALTIES", (1e-2, 1e1))
    file = tmp_path / "rows.json"
    options = ["--penalties", "3", "--seeds", "0-1", "--reference-seeds", "1", "--json", str(file)]
    done = run_command(logistic_regression.logistic_regression, *options)
    assert done.exit_code == 0, done.output
    assert "scikit-learn" in done.output
    assert [row["data"] for row in json.loads(file.read_text())] == ["fashion_mnist"] * 2
