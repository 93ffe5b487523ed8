"""Predictions of a cache: features in, no encoder, as for features of another program."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from tests.cli.program import refused, run
from ulfine_fast import FeatureCache, Run


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A cache of imported features of three classes, a run of two seeds on it, and a cache of other features."""
    folder = tmp_path_factory.mktemp("imported")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 16)).astype(np.float32)
    y = np.repeat([0, 1, 2], 20)
    for name, n in (("cache", 60), ("new", 30)):
        rows = y[rng.permutation(60)[:n]]
        features = centres[rows] + 0.1 * rng.normal(size=(n, 16)).astype(np.float32)
        labels = rows if name == "cache" else np.full(n, -1)
        arrays = {"features": features, "labels": labels, "class_names": ["a", "b", "c"], "text_features": centres}
        np.savez(folder / f"{name}.npz", **arrays)
        done = run("cache", "import", folder / f"{name}.npz", "--out", folder / name)
        assert done.exit_code == 0, done.output
    fit = ("fit", folder / "cache", "--method", "linear_probe", "--steps", 4, "--eval-every", 2, "--seeds", 2)
    done = run(*fit, "--out", folder / "runs")
    assert done.exit_code == 0, done.output
    return folder


def test_the_table_is_what_the_runs_predict_of_the_features(imported, tmp_path):
    done = run("predict", imported / "runs", imported / "new", "--out", tmp_path / "p.csv", "--sets", 0.9)
    assert done.exit_code == 0, done.output
    assert "30 images, mean of 2 seeds" in done.stdout
    cache = FeatureCache.open(imported / "new")
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == list(cache.ids)
    seeds = [Run.load(imported / "runs" / f"seed-{seed}").predict_proba(cache.plain) for seed in (0, 1)]
    mean = np.mean(seeds, axis=0)
    assert [row["class"] for row in rows] == [cache.class_names[k] for k in mean.argmax(axis=1)]
    np.testing.assert_allclose([float(row["probability"]) for row in rows], mean.max(axis=1), atol=1e-6)
    assert all(row["class"] in row["set"] for row in rows)


def test_what_cannot_be_predicted_is_one_sentence(imported, tmp_path, model):
    from tests.cache.samples import write_images

    images = write_images(tmp_path / "images", {"train/cat": 2, "train/dog": 2})
    assert "were imported without --model" in refused("predict", imported / "runs", images)
    assert "five crops are of images" in refused("predict", imported / "runs", imported / "new", "--five-crops")
    done = run("extract", images, "--out", tmp_path / "cache", "--model", model, "--workers", 0)
    assert done.exit_code == 0, done.output
    assert "this cache was made with model.sha256" in refused("predict", imported / "runs", tmp_path / "cache")


def test_a_report_says_that_imported_features_have_no_images(imported, tmp_path):
    done = run("report", imported / "runs", "--out", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert "the features were imported, and a cache of imported features names no images" in done.stderr
