"""`ulfine-fast adapt`: from a run and a cache to a table and figures."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from tests.cache.samples import write_images, write_tiny_model
from tests.cli.test_bad_input import refused, run
from ulfine_fast.cache.store import FeatureCache


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run that knows two classes, and a stream of those and a third."""
    folder = tmp_path_factory.mktemp("adapt")
    model = write_tiny_model(folder / "model")
    known = {"train/cat": 8, "train/dog": 6, "test/cat": 2, "test/dog": 2}
    for name, counts in (("seen", known), ("stream", {"train/cat": 1, "train/dog": 5, "train/eel": 6, "test/cat": 3})):
        images = write_images(folder / f"{name}-images", counts, seed=len(counts))
        done = run("extract", images, "-o", folder / name, "--model", model, "--features", "last-block")
        assert done.exit_code == 0, done.output
    done = run("fit", folder / "seen", "--out", folder / "run", "--method", "zero_shot")
    assert done.exit_code == 0, done.output
    return folder


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_table_in_the_form_of_predict(fitted, tmp_path):
    done = run("adapt", fitted / "run", fitted / "stream", "--by", "none", "--out", tmp_path / "own.csv", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told == json.loads((tmp_path / "own.json").read_text())
    assert (told["by"], told["images"], told["exact"]) == ("none", 15, True)
    assert told["accuracy"] == told["accuracy_before"]
    found = rows_of(tmp_path / "own.csv")
    assert [row["id"] for row in found] == FeatureCache.open(fitted / "stream").ids
    done = run("predict", fitted / "run", fitted / "stream-images" / "train" / "eel", "--out", tmp_path / "same.csv")
    assert done.exit_code == 0, done.output
    for theirs in rows_of(tmp_path / "same.csv"):
        ours = next(row for row in found if row["id"] == f"train/eel/{theirs['id']}")
        assert ours.keys() == theirs.keys()
        assert ours["class"] == theirs["class"]
        assert float(ours["probability"]) == pytest.approx(float(theirs["probability"]), abs=2e-3)


def test_an_open_set_in_another_order(fitted, tmp_path):
    out = tmp_path / "new" / "open.csv"
    done = run("adapt", fitted / "run", fitted / "stream", "--open-set", "--shuffle", 3, "--lr", 0.01, "--out", out)
    assert done.exit_code == 0, done.output
    assert "15 images" in done.output
    assert "auroc" in done.output
    told, found = json.loads(out.with_suffix(".json").read_text()), rows_of(out)
    assert 0 <= told["auroc"] <= 1
    ids = FeatureCache.open(fitted / "stream").ids
    assert [row["id"] for row in found] == [ids[row] for row in np.random.default_rng(3).permutation(15)]
    assert all(float(row["score"]) < 0 for row in found)
    again = run("adapt", fitted / "run", fitted / "stream", "--lr", 0.01, "--out", tmp_path / "closed.csv")
    assert again.exit_code == 0, again.output
    assert "score" not in rows_of(tmp_path / "closed.csv")[0]


def test_mistakes_are_said(fitted, tmp_path):
    given = ("adapt", fitted / "run", fitted / "stream")
    assert "cliptta, tent, none, got 'rotta'" in refused(*given, "--by", "rotta")
    assert "batch must be at least 1" in refused(*given, "--batch-size", 0)
    assert "must end in .csv or .parquet" in refused(*given, "--by", "none", "--out", tmp_path / "out.xlsx")
    assert str(tmp_path) in refused("adapt", tmp_path, fitted / "stream")
    assert str(tmp_path) in refused("adapt", fitted / "run", tmp_path)
