from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.studies import rejection
from tests.benchmarks.program import run_command
from tests.conftest import make_clusters
from ulfine_fast import FitConfig, fit


@pytest.fixture(scope="module")
def world():
    return make_clusters(classes=6, train=60, test=20)


def test_the_command(world, tmp_path, monkeypatch):
    monkeypatch.setattr(rejection, "open_features", lambda data: world)
    out = tmp_path / "rows.json"
    words = ["--data", "a/b", "--seeds", "0-1", "--unknown", 2, "--n1", 20, "--m1", 30, "--gamma", 2, "--json", out]
    done = run_command(rejection.rejection, *words)
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())
    assert [(row["data"], row["method"], row["seed"]) for row in rows] == [
        ("b", method, seed) for method in ("ulfine_plus", "linear_probe") for seed in (0, 1)
    ]
    for row in rows:
        assert all(0 <= row[f"coverage_{third}"] <= 1 for third in ("many", "medium", "few"))
        assert 0.5 < row["auroc_own"] <= 1
        assert (row["auroc_own"] == row["auroc_energy"]) == (row["method"] == "linear_probe")
        assert ("auroc_cosine" in row) == (row["method"] == "ulfine_plus")
    assert "false rejection at 0.05" in done.output
    done = run_command(rejection.rejection, *words[:4], "--unknown", 5)
    assert done.exit_code == 2
    assert "--unknown must leave two of 6 classes, got 5" in " ".join(done.output.split())


def test_nothing_of_the_removed_classes_is_left(world):
    kept, rows = rejection.without_classes(world, 2, seed=3)
    assert len(kept) + len(rows) == len(world)
    removed = {world.class_names[k] for k in np.unique(world.labels[rows])}
    assert len(removed) == 2
    assert not removed & set(kept.class_names)
    names = [world.class_names[label] for label in world.labels]
    assert [kept.class_names[label] for label in kept.labels] == [name for name in names if name not in removed]
    texts = [world.text_features[world.class_names.index(name)] for name in kept.class_names]
    np.testing.assert_array_equal(kept.text_features, texts)
    assert rejection.without_classes(world, 2, seed=4)[0].class_names != kept.class_names


def test_scores_by_hand(world):
    run = fit(world, FitConfig(method="ulfine_plus", n1=20, m1=30))
    features = np.asarray(world.plain[-5:], np.float64)
    scores = {name: score(world.plain[-5:]) for name, score in rejection.scorers(run, world).items()}
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    labeled = np.asarray(world.plain[[world.ids.index(name) for name in run.split["labeled"]]], np.float64)
    labeled /= np.linalg.norm(labeled, axis=1, keepdims=True)
    nearest = [sorted((labeled @ row).tolist())[-5:] for row in unit]
    np.testing.assert_allclose(scores["neighbors"], np.mean(nearest, axis=1), atol=1e-4)
    texts = world.prototypes / np.linalg.norm(world.prototypes, axis=1, keepdims=True)
    odds = np.exp(unit @ texts.T)
    np.testing.assert_allclose(scores["mcm"], odds.max(1) / odds.sum(1), atol=1e-4)
    np.testing.assert_allclose(scores["softmax"], np.exp(run.logits(world.plain[-5:])).max(1), atol=1e-4)
    probe = run.tensors["linear"].double().numpy()
    np.testing.assert_allclose(scores["energy"], np.log(np.exp(unit @ probe.T).sum(1)), rtol=1e-4)
    assert (np.abs(scores["cosine"]) <= 1.0001).all()
    assert set(scores) == set(rejection.SCORES)
