"""`ulfine-fast multilabel`: from a folder of images and a table to a run."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.cache.samples import write_images, write_tiny_model
from tests.cli.program import refused, run, usage_error
from tests.conftest import make_clusters
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import FitConfig
from ulfine_fast.engine.fit import fit
from ulfine_fast.related.multilabel.run import MultiLabelRun

QUICK = ("--steps", 4, "--batch", 8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Images in one folder, whose classes are in a table."""
    folder = tmp_path_factory.mktemp("multilabel")
    model = write_tiny_model(folder / "model")
    source = write_images(folder / "images", {"all": 24})
    done = run("extract", source, "--out", folder / "cache", "--model", model, "--workers", 0)
    assert done.exit_code == 0, done.output
    return folder / "cache"


@pytest.fixture
def labels(cache, tmp_path):
    random, path = np.random.default_rng(0), tmp_path / "labels.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "cat", "sofa", "rain"])
        writer.writerows([one, *random.choice(["1", "0", ""], 3)] for one in FeatureCache.open(cache).ids)
    return path


def test_a_run_from_a_folder_and_a_table(cache, labels, tmp_path):
    done = run("multilabel", cache, labels, "--out", tmp_path / "run", *QUICK, "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)["comic"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert printed["map"]["mean"] == metrics["map"]
    assert metrics["rows"] == {"train": 19, "val": 0, "test": 5}
    with (tmp_path / "run" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    opened = FeatureCache.open(cache)
    assert [row["id"] for row in rows] == opened.ids
    assert {row["split"] for row in rows} == {"train", "test"}
    written = np.array([[float(row[name]) for name in ("cat", "sofa", "rain")] for row in rows])
    computed = MultiLabelRun.load(tmp_path / "run").probabilities(opened.plain)
    np.testing.assert_allclose(written, computed, atol=1e-6)
    assert (tmp_path / "run" / "restored.csv").read_text().startswith("id,class,probability")


def test_several_seeds_and_parquet(cache, labels, tmp_path):
    command = ("multilabel", cache, labels, "--out", tmp_path / "runs", *QUICK, "--method", "bce")
    done = run(*command, "--seeds", 2, "--table", "parquet")
    assert done.exit_code == 0, done.output
    assert "bce, mean average precision in percent: map" in done.output
    table = pq.read_table(tmp_path / "runs" / "seed-1" / "predictions.parquet")
    assert table.column_names == ["id", "split", "cat", "sofa", "rain"]
    summary = json.loads((tmp_path / "runs" / "summary.json").read_text())
    assert summary["seeds"] == [0, 1]
    assert summary["metrics"]["map"]["n"] == 2
    assert run(*command, "--seeds", 2).exit_code == 0  # a run may be replaced
    assert not (tmp_path / "runs" / "seed-1" / "predictions.parquet").exists()


def test_mistakes_are_refused(cache, labels, tmp_path):
    out = ("--out", tmp_path / "run")
    assert "no such" in refused("multilabel", cache, tmp_path / "none.csv", *out).lower()
    assert "none.cache" in refused("multilabel", tmp_path / "none.cache", labels, *out)
    for option, value in (("--table", "xlsx"), ("--method", "ulfine")):
        done = run("multilabel", cache, labels, *out, option, value)
        assert done.exit_code == 2
        assert f"Invalid value for '{option}'" in done.stderr
        assert f"'{value}' is not one of" in done.stderr
    assert "Invalid value for '--seeds'" in usage_error("multilabel", cache, labels, *out, "--seeds", 0)
    text = labels.read_text()
    for old, new, sentence in (
        ("id,cat", "name,cat", "must have the column id"),
        ("all/000.png", "all/999.png", "'all/999.png', which this cache lacks"),
        ("rain\n", "rain\nall/000.png,maybe,1,1\n", "'maybe' for class 'cat'"),
    ):
        labels.write_text(text.replace(old, new).replace(old.replace("\n", "\r\n"), new))
        assert sentence in refused("multilabel", cache, labels, *out)
    corrections = tmp_path / "corrections.csv"
    corrections.write_text("id,label\nall/000.png,cat\n")
    assert "'cat' for class 'label'" in refused("multilabel", cache, corrections, *out)
    assert not (tmp_path / "run").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    assert "is no multi-label run" in refused("multilabel", cache, labels, "--out", tmp_path / "notes")


def test_commands_for_one_label_an_image_refuse_its_run(cache, labels, tmp_path):
    assert run("multilabel", cache, labels, "--out", tmp_path / "run", *QUICK).exit_code == 0
    out = tmp_path / "out"
    for command, others in {"eval": (), "report": ("--out", out), "export": (out,), "predict": (cache,)}.items():
        assert "ulfine-fast-multilabel-run" in refused(command, tmp_path / "run", *others)
    fitted = fit(make_clusters(), FitConfig(method="zero_shot", n1=5), progress=False).save(tmp_path / "fitted")
    with pytest.raises(InputError, match="is a ulfine-fast-run, not one that `ulfine-fast multilabel` wrote"):
        MultiLabelRun.load(fitted)
    assert "is no multi-label run" in refused("multilabel", cache, labels, "--out", fitted)
