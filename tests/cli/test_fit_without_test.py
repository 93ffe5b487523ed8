"""`fit`, `eval`, `predict` and `report` on images of which none is for testing."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from tests.cache.samples import write_images, write_tiny_model
from tests.cli.program import refused, run
from ulfine_fast import Run

OPTIONS = ["--method", "linear_probe", "--steps", 10, "--eval-every", 10, "--cv-folds", 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, their cache, a run and a fit of three seeds."""
    folder = tmp_path_factory.mktemp("few")
    images = write_images(folder / "images", {"train/cat": 8, "train/dog": 6, "train/eel": 1, "unlabeled": 5})
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    done = run("extract", images, "--out", folder / "cache", "--model", model, "--workers", 0)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def fitted(folder):
    done = run("fit", folder / "cache", *OPTIONS, "--out", folder / "run")
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def seeds(folder):
    done = run("fit", folder / "cache", *OPTIONS, "--seeds", 3, "--out", folder / "seeds")
    assert done.exit_code == 0, done.output
    return folder / "seeds"


def test_the_printout_says_what_is_estimated_and_what_to_do(fitted, folder):
    assert "estimated by cross-validation on 14 labelled images, each held out 2 times (3 folds)" in fitted
    assert "the classifier trains on every label" in fitted
    lines = fitted.strip().splitlines()
    assert lines[-3] == f"run: {folder / 'run'}"
    assert lines[-2].startswith("too uncertain to tell, label more images of them: eel (unknown), ")
    assert lines[-1] == f"next: `ulfine-fast review {folder / 'run'}` shows which labels to check or add"
    # classes have their intervals, one with a single label has none
    line = next(line for line in lines if line.startswith("accuracy of each class, 95% interval: "))
    assert "cat " in line
    assert "dog " in line
    assert "eel" not in line


def test_the_table_has_estimates_and_no_empty_groups(fitted):
    assert "balanced (cv)" in fitted
    assert "few" not in fitted.split("estimated by")[0]


def test_eval_prints_the_estimate_again(fitted, folder):
    done = run("eval", folder / "run")
    assert done.exit_code == 0, done.output
    assert "estimated by cross-validation on 14 labelled images" in done.output
    saved = json.loads((folder / "run" / "metrics.json").read_text())
    printed = json.loads(run("eval", folder / "run", "--json").output)
    assert printed == {"cross_validation": saved["cross_validation"], "test_rows": 0}


def test_a_test_fraction_is_what_it_was(folder):
    done = run("fit", folder / "cache", *OPTIONS, "--test-fraction", 0.3, "--out", folder / "tested")
    assert done.exit_code == 0, done.output
    assert "cross-validation" not in done.output
    assert len(Run.load(folder / "tested").test_ids) == 4


def test_predict_averages_the_seeds(seeds, folder):
    out = folder / "predictions.csv"
    done = run("predict", seeds, folder / "images", "--out", out)
    assert done.exit_code == 0, done.output
    assert "20 images, mean of 3 seeds" in done.output
    single = []
    for seed in range(3):
        table = folder / f"{seed}.csv"
        assert run("predict", seeds / f"seed-{seed}", folder / "images", "--out", table).exit_code == 0
        single.append(probabilities(table))
    mean = probabilities(out)
    for name, values in mean.items():
        for k, value in values.items():
            assert value == pytest.approx(np.mean([table[name][k] for table in single]), abs=2e-6)


def probabilities(table):
    """By image, the probability of each class."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    endings = ("", "_2", "_3")
    return {row["id"]: {row[f"class{e}"]: float(row[f"probability{e}"]) for e in endings} for row in rows}


def test_runs_of_two_fits_are_not_averaged(seeds, folder):
    other = folder / "mixed"
    for name, method in (("a", "linear_probe"), ("b", "zero_shot")):
        done = run("fit", folder / "cache", "--method", method, "--out", other / name)
        assert done.exit_code == 0, done.output
    assert "is no seed of the same fit as" in refused("predict", other, folder / "images", "--out", folder / "x.csv")
    assert "predict takes a run or an exported classifier" in refused(
        "predict", folder / "images", folder / "images", "--out", folder / "x.csv"
    )


def test_the_summary_has_the_estimate_and_its_interval(seeds):
    metrics = json.loads((seeds / "summary.json").read_text())["metrics"]
    balanced = metrics["cross_validated_balanced_accuracy"]
    assert balanced["n"] == 3
    assert balanced["low"] < balanced["mean"] < balanced["high"]
    assert "balanced_accuracy" not in metrics


def test_the_report_says_estimated_and_compares_image_by_image(fitted, seeds, folder):
    done = run("fit", folder / "cache", "--method", "zero_shot", "--cv-folds", 3, "--out", folder / "zero")
    assert done.exit_code == 0, done.output
    page = folder / "report.html"
    done = run("report", seeds, folder / "zero", "--out", page)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "Estimated by cross-validation on 14 labelled images" in text
    assert "minus the others, image by image" in text
    assert "On the test split" not in text

    # beside a run with a test split the reason is named, and no order is made up
    done = run("fit", folder / "cache", *OPTIONS, "--test-fraction", 0.3, "--out", folder / "tested")
    assert done.exit_code == 0, done.output
    assert run("report", folder / "run", folder / "tested", folder / "zero", "--out", page).exit_code == 0
    assert "cross-validated settings come last" in page.read_text()


def test_realign_refuses_what_has_no_validation_images(fitted, folder):
    sentence = refused("realign", folder / "run", "--out", folder / "realigned")
    assert "trained on every label" in sentence
    assert "--test-fraction 0.2" in sentence


def test_options_that_need_validation_images_say_that_they_did_nothing(folder):
    best = [*OPTIONS, "--select", "best", "--patience", 2, "--out", folder / "best"]
    done = run("fit", folder / "cache", *best)
    assert done.exit_code == 0, done.output
    assert "select best and patience need validation images, and every label trains: the last step is kept" in (
        done.output
    )
    tested = run("fit", folder / "cache", *best, "--test-fraction", 0.3)
    assert tested.exit_code == 0, tested.output
    assert "the last step is kept" not in tested.output
