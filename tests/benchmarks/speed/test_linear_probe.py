"""Both paths on a small world, and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.speed import linear_probe
from benchmarks.speed.linear_probe import engine, measure, path, sklearn
from tests.benchmarks.program import run_command
from tests.conftest import make_clusters
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import draw_split

CONFIG = FitConfig(method="linear_probe", steps=20, eval_every=20, batch_labeled=16, lr=0.3)


@pytest.fixture(scope="module")
def cache():
    return make_clusters(noise=0.5)


def test_a_path_is_even_in_the_logarithm():
    np.testing.assert_allclose(path(1e-2, 1e2, 5), [1e-2, 1e-1, 1, 10, 100])
    assert path(1e-6, 1.0, 1) == [1e-6]


def test_both_choose_on_validation_and_read_the_test_split(cache):
    rows = measure(cache, 4, CONFIG, iterations=50, device="cpu")
    assert [row["contender"] for row in rows] == ["engine", "scikit-learn"]
    for row in rows:
        assert row["penalties"] == 4
        assert row["seconds"] > 0
        assert row["val_accuracy"] >= row["val_accuracy_lowest"]
        assert row["balanced_accuracy"] > 0.8


def test_scikit_learns_choice_is_the_best_of_fits_from_scratch(cache):
    from sklearn.linear_model import LogisticRegression

    split = draw_split(cache.labels, cache.splits, cache.class_names, CONFIG)
    row = sklearn(cache, split, 5, 500)
    rows = np.asarray(cache.plain, dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    model = LogisticRegression(C=row["chosen"], max_iter=500).fit(rows[split.labeled], cache.labels[split.labeled])
    assert row["val_accuracy"] == pytest.approx(model.score(rows[split.val], cache.labels[split.val]), abs=0.05)
    assert row["accuracy"] == pytest.approx(model.score(rows[split.test], cache.labels[split.test]), abs=0.05)


def test_the_engines_accuracy_is_that_of_the_chosen_penalty(cache, monkeypatch):
    seen = []
    fit_many = linear_probe.fit_many
    monkeypatch.setattr(
        linear_probe, "fit_many", lambda *arguments, **named: seen.append(fit_many(*arguments, **named)) or seen[0]
    )
    split = draw_split(cache.labels, cache.splits, cache.class_names, CONFIG)
    row = engine(cache, split, 3, CONFIG, "cpu")
    [runs] = seen
    chosen = next(run for run in runs if run.config.weight_decay == row["chosen"])
    assert chosen.metrics["val"]["accuracy"] == max(run.metrics["val"]["accuracy"] for run in runs)
    assert row["accuracy"] == chosen.metrics["accuracy"]


def test_a_split_without_validation_is_refused(cache):
    config = FitConfig.from_dict({**CONFIG.to_dict(), "val_fraction": 0.0})
    with pytest.raises(InputError, match="validation"):
        measure(cache, 2, config, iterations=5, device="cpu")


def test_the_command_prints_and_writes(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(linear_probe, "open_features", lambda data: cache)
    file = tmp_path / "rows.json"
    options = ["--penalties", "2", "--steps", "5", "--iterations", "20", "--json", str(file)]
    done = run_command(linear_probe.linear_probe, *options)
    assert done.exit_code == 0, done.output
    assert "scikit-learn" in done.output
    assert [row["data"] for row in json.loads(file.read_text())] == ["demo", "demo"]
