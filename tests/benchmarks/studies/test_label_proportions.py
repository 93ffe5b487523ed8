from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.studies import label_proportions as bench
from tests.benchmarks.program import run_command
from tests.conftest import make_clusters
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import draw_split
from ulfine_fast.engine.fit import fit
from ulfine_fast.related.label_proportions.bags import Bags

VALUES = {"steps": 20, "eval_every": 5, "batch_labeled": 32, "lr": 0.1}


@pytest.fixture(scope="module")
def world():
    """A cache, its split, and the split in bags of 4."""
    cache = make_clusters(text_noise=1.5)
    split = draw_split(cache.labels, cache.splits, cache.class_names, FitConfig())
    return cache, split, bench.in_bags(cache, split, 4, 0)


def test_wrong_proportions_are_those_of_another_bag(world):
    cache, split, bagged = world
    wrong, right = (
        Bags.from_list(own.extra["bags"], cache.row_of) for own in (bench.with_wrong_proportions(bagged), bagged)
    )
    assert [rows.tolist() for rows in wrong.members] == [rows.tolist() for rows in right.members]
    np.testing.assert_array_equal(wrong.proportions, np.roll(right.proportions, 1, axis=0))
    assert right.rows.tolist() == split.labeled.tolist()


def test_guesses_know_more_with_the_proportions_of_small_bags(world):
    cache, split, bagged = world
    run = fit(cache, FitConfig(method="zero_shot"), split=split, device="cpu", progress=False)
    metrics = bench.guesses(cache, run, bagged)
    assert metrics["guessed"] == pytest.approx(
        (run.predict(cache.plain[split.labeled]) == cache.labels[split.labeled]).mean()
    )
    assert metrics["transported"] > metrics["guessed"]
    # integer counts of four images, some of them 0, are the slowest to reach
    assert metrics["missed"] < 0.01
    of_single_images = bench.guesses(cache, run, bench.in_bags(cache, split, 1, 0))
    assert of_single_images["transported"] == 1


def test_every_arm_is_there_and_the_first_is_what_others_are_compared_with(world):
    rows = bench.measure(world[0], [4], [0, 1], VALUES)
    assert [row["arm"] for row in rows[::2]] == ["zero-shot", "labels", *bench._ARMS]
    lines = bench.table(rows, "bag", "stage one", ["balanced_accuracy", "transported"])
    assert lines[0][:2] == ["-", "zero-shot"]
    assert lines[0][3] == "-"
    assert "(" not in lines[2][2]
    both = next(line for line in lines if line[1] == "both stages")
    accuracy = {row["arm"]: [] for row in rows}
    for row in rows:
        accuracy[row["arm"]].append(row["balanced_accuracy"])
    gap = 100 * np.mean(np.subtract(accuracy["both stages"], accuracy["stage one"]))
    assert f"({gap:+.1f} ±" in both[2]


def test_the_command_prints_both_tables(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "open_features", lambda name: make_clusters(train=250))
    options = ["--sizes", "4", "--seeds", "0-1", "--steps", "10", "--batch", "16", "--shapes", "uniform"]
    done = run_command(bench.label_proportions, *options, "--json", str(tmp_path / "rows.json"))
    assert done.exit_code == 0, done.output
    assert "both stages" in done.stdout
    assert "sinkhorn" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    rows = rows if isinstance(rows, list) else rows["rows"]
    assert {row.get("shape") for row in rows} == {None, "uniform"}
