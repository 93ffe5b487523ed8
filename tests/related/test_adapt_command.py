"""`ulfine-fast adapt`: from a run and a cache to a table and metrics."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from tests.cache.samples import write_images, write_tiny_model
from tests.cli.program import refused, run, usage_error
from ulfine_fast.cache.store import FeatureCache


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run that knows two classes, and a stream of those and a third."""
    folder = tmp_path_factory.mktemp("adapt")
    model = write_tiny_model(folder / "model")
    known = {"train/cat": 8, "train/dog": 6, "test/cat": 2, "test/dog": 2}
    for name, counts in (("known", known), ("stream", {"train/cat": 1, "train/dog": 5, "train/eel": 6, "test/cat": 3})):
        images = write_images(folder / f"{name}-images", counts, seed=len(counts))
        done = run("extract", images, "-o", folder / name, "--model", model, "--features", "last-block")
        assert done.exit_code == 0, done.output
    done = run("fit", folder / "known", "--out", folder / "run", "--method", "zero_shot")
    assert done.exit_code == 0, done.output
    return folder


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_table_in_the_form_of_predict(fitted, tmp_path):
    done = run("adapt", fitted / "run", fitted / "stream", "--by", "none", "--out", tmp_path / "own.csv", "--json")
    assert done.exit_code == 0, done.output
    metrics = json.loads(done.stdout)
    assert metrics == json.loads((tmp_path / "own.json").read_text())
    assert (metrics["by"], metrics["images"], metrics["exact"]) == ("none", 15, True)
    assert metrics["accuracy"] == metrics["accuracy_before"]
    rows = rows_of(tmp_path / "own.csv")
    assert [row["id"] for row in rows] == FeatureCache.open(fitted / "stream").ids
    done = run("predict", fitted / "run", fitted / "stream-images" / "train" / "eel", "--out", tmp_path / "same.csv")
    assert done.exit_code == 0, done.output
    for predicted in rows_of(tmp_path / "same.csv"):
        adapted = next(row for row in rows if row["id"] == f"train/eel/{predicted['id']}")
        assert adapted.keys() == predicted.keys()
        assert adapted["class"] == predicted["class"]
        assert float(adapted["probability"]) == pytest.approx(float(predicted["probability"]), abs=2e-3)


def test_an_open_set_in_another_order(fitted, tmp_path):
    out = tmp_path / "new" / "open.csv"
    done = run("adapt", fitted / "run", fitted / "stream", "--open-set", "--shuffle", 3, "--lr", 0.01, "--out", out)
    assert done.exit_code == 0, done.output
    assert "15 images" in done.output
    assert "auroc" in done.output
    metrics, rows = json.loads(out.with_suffix(".json").read_text()), rows_of(out)
    assert 0 <= metrics["auroc"] <= 1
    ids = FeatureCache.open(fitted / "stream").ids
    assert [row["id"] for row in rows] == [ids[row] for row in np.random.default_rng(3).permutation(15)]
    assert all(float(row["score"]) < 0 for row in rows)
    again = run("adapt", fitted / "run", fitted / "stream", "--lr", 0.01, "--out", tmp_path / "closed.csv")
    assert again.exit_code == 0, again.output
    assert "score" not in rows_of(tmp_path / "closed.csv")[0]


def test_bad_input_is_one_sentence(fitted, tmp_path):
    command = ("adapt", fitted / "run", fitted / "stream")
    assert "'rotta' is not one of 'cliptta', 'tent', 'none'" in usage_error(*command, "--by", "rotta")
    assert "batch must be at least 1" in refused(*command, "--batch-size", 0)
    assert "must end in .csv or .parquet" in refused(*command, "--by", "none", "--out", tmp_path / "out.xlsx")
    # before the run is even read
    assert "must end in .csv or .parquet" in refused("adapt", tmp_path, tmp_path, "--out", tmp_path / "out.xlsx")
    assert str(tmp_path) in refused("adapt", tmp_path, fitted / "stream")
    assert str(tmp_path) in refused("adapt", fitted / "run", tmp_path)
