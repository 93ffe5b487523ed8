from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks.studies import lift_head, through_encoder
from benchmarks.studies.lift_head import CROPS, Pace, World
from tests.benchmarks.program import run_command
from tests.cache.samples import write_images, write_tiny_model
from tests.conftest import make_clusters
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache

VALUES = {"n1": 24, "m1": 0, "gamma_l": 3.0, "gamma_u": 3.0}


@pytest.fixture(scope="module")
def world():
    """Four classes whose texts know them well; training images have four crops that show less and less."""
    made = make_clusters(classes=4, dim=16, train=30, test=10, noise=1.5, text_noise=0.3)
    random = np.random.default_rng(0)
    crops = made.plain[made.view_rows][:, None] + random.normal(0, 0.1, (len(made.view_rows), CROPS, 16))
    cache = FeatureCache.from_arrays(
        made.plain,
        made.labels,
        class_names=made.class_names,
        text_features=made.text_features,
        weak=crops.astype(np.float32),
        splits=made.splits.tolist(),
        ids=made.ids,
    )
    areas = np.broadcast_to(np.float32([0.9, 0.6, 0.3, 0.1]), (len(crops), CROPS)).copy()
    cache._loaded = dataclasses.replace(cache._arrays, areas=areas)
    test = cache.plain[cache.splits == "test"]
    return World(cache, np.stack([test + random.normal(0, 0.1, test.shape) for _ in range(5)]).astype(np.float32))


def command(*arguments):
    return run_command(lift_head.lift_head, *arguments)


def test_every_comparison_is_printed(world, monkeypatch, tmp_path):
    monkeypatch.setattr(World, "open", lambda name: world)
    path = tmp_path / "rows.json"
    options = ("--n1", 24, "--gamma", 3, "--seeds", "0,1", "--paces", "0.02x1,0.5x3", "--encoder", "none")
    done = command(*options, "--json", path)
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text())
    # two paces of three starts, three ways to look at test images, four to train; two seeds
    assert len(rows) == 2 + 2 * (3 + 3 + 4) * 2
    for test in ("zero-shot", "starts", "test crops", "train crops"):
        assert f"demo: {test}" in done.output
    same = [row for row in rows if row["arm"] in ("text", "whole", "by the schedule") and row["pace"] == "0.5 x 3"]
    by_seed = {seed: {row["balanced_accuracy"] for row in same if row["seed"] == seed} for seed in (0, 1)}
    assert all(len(accuracies) == 1 for accuracies in by_seed.values())  # three names for one run
    lines = lift_head.table(rows, "starts")
    assert [line[:2] for line in lines[:2]] == [["0.02 x 1", "text"], ["0.02 x 1", "random"]]
    text, random = (
        np.array([r["balanced_accuracy"] for r in rows if (r["pace"], r["arm"]) == ("0.02 x 1", arm)])
        for arm in ("text", "random")
    )
    assert lines[1][6].startswith(f"{100 * np.mean(random - text):+.1f} ±")


def test_good_texts_pay_in_few_small_steps_and_are_forgotten_in_many_large_ones(world):
    rows = list(lift_head.starts(world, [Pace(0.001, 1), Pace(2.0, 40)], [0, 1, 2], VALUES))
    means = {
        (pace, arm): np.mean([r["balanced_accuracy"] for r in rows if (r["pace"], r["arm"]) == (pace, arm)])
        for pace, arm in {(r["pace"], r["arm"]) for r in rows}
    }
    assert means["0.001 x 1", "text"] > means["0.001 x 1", "random"] + 0.5
    assert abs(means["2 x 40", "text"] - means["2 x 40", "random"]) < 0.2
    light, heavy = rows[0], next(row for row in rows if row["pace"] == "2 x 40")
    # no class has more than a hundred images
    assert light["drift_many"] is None
    assert light["drift_few"] < 0.001 < 0.3 < heavy["drift_few"]


def test_drift_is_one_minus_the_cosine(world):
    (run,) = lift_head.fitted(world.cache, Pace(0.02, 1), [0], VALUES)
    run = copy.copy(run)
    run.tensors = {"linear": torch.tensor([[2.0, 0], [0, 3], [-1, 0], [3, 4]])}
    run.metrics = {"class_counts": [101, 100, 20, 19]}
    start = np.float32([[1, 0], [1, 0], [1, 0], [1, 0]])
    assert lift_head.drift(run, start) == pytest.approx({"drift_many": 0, "drift_medium": 1.5, "drift_few": 0.4})


def test_five_crops_are_averaged_as_logits(world):
    pace = Pace(0.1, 2)
    rows = list(lift_head.predicted_crops(world, [pace], [0], VALUES))
    (run,) = lift_head.fitted(world.cache, pace, [0], VALUES)
    labels = world.cache.labels[world.test]
    logits = {"middle crop": run.logits(world.test_crops[4]), "whole": run.logits(world.cache.plain[world.test])}
    logits["five crops"] = sum(run.logits(crop) for crop in world.test_crops)
    for row in rows:
        recall = [(logits[row["arm"]].argmax(1) == labels)[labels == k].mean() for k in range(4)]
        assert row["balanced_accuracy"] == pytest.approx(np.mean(recall))


def test_epochs_are_counted_in_labelled_images(world):
    config = lift_head.config_of(world.cache, Pace(0.3, 7), 0, {**VALUES, "tau": 0.0})
    assert (config.lr, config.crop_epochs, config.tau, config.method) == (0.3, 7, 0.0, "lift_head")
    # fewer than 128 images: a mini-batch an epoch
    assert config.steps == 7


def test_trusted_images_become_texts_and_nothing_else(world):
    cache = lift_head.trusted_start(world.cache, 5)
    assert ((cache.labels != world.cache.labels).sum(), (cache.labels == -1).sum()) == (20, 20)
    own = np.flatnonzero((world.cache.splits == "train") & (world.cache.labels == 2))[:5]
    rows = world.cache.plain[own].astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(cache.prototypes[2], unit.mean(0) / np.linalg.norm(unit.mean(0)), rtol=1e-5)
    (run,) = lift_head.fitted(cache, Pace(0.02, 1), [0], VALUES)
    used = set(run.split["labeled"]) | set(run.split["val"]) | set(run.test_ids)
    assert not used & {cache.ids[row] for row in np.flatnonzero(cache.labels == -1)}
    with pytest.raises(InputError, match="--trusted 30 takes as many images of each class, one has 30"):
        lift_head.trusted_start(world.cache, 30)


@pytest.mark.parametrize("text", ["", "0.02", "0.02x0", "0x5", "ax5", "0.1x2.5"])
def test_bad_paces_are_refused(text):
    done = command("--paces", text)
    assert done.exit_code == 2
    assert "learning rates and epochs such as" in done.output


def test_unknown_data_are_refused():
    done = command("--data", "imagenet")
    assert done.exit_code == 2
    assert "--data are demo, fashion_mnist, got 'imagenet'" in done.output


def test_both_ways_give_the_same_logits(monkeypatch, tmp_path):
    counts = {f"{split}/{name}": count for split, count in (("train", 8), ("test", 3)) for name in ("cat", "dog")}
    images = write_images(tmp_path / "images", counts)
    model = write_tiny_model(tmp_path / "model", layers=2)
    monkeypatch.setattr(through_encoder, "model_name", lambda name: model)
    (row,) = through_encoder.both_ways("tiny", [3], images)
    assert row["difference"] < 0.05 < 0.5 < row["moved"]
