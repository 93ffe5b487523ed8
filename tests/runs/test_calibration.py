"""Held-out labels of a run: what they are, saved and read again, and what rejects and excludes by them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.cache.samples import write_images, write_tiny_model
from tests.cli.program import refused
from tests.cli.program import run as command
from tests.conftest import make_clusters
from ulfine_fast import FitConfig, InputError, Run, fit, fit_many
from ulfine_fast.data.folds import draw_folds
from ulfine_fast.data.splits import draw_split
from ulfine_fast.metrics.classification import softmax
from ulfine_fast.metrics.rejection import least_rows, rejection_threshold, set_thresholds
from ulfine_fast.ops.clustering import cosines
from ulfine_fast.ops.mixture import Metric
from ulfine_fast.runs.calibration import Calibration, class_sets, mean_calibration, reject

SPLIT = {"n1": 40, "gamma_l": 4, "gamma_u": 4, "steps": 20, "eval_every": 20, "val_fraction": 0.3}


@pytest.fixture(scope="module")
def runs(clusters):
    plus, probe = fit_many(clusters, [FitConfig(method=name, **SPLIT) for name in ("ulfine_plus", "linear_probe")])
    return {"ulfine_plus": plus, "linear_probe": probe}


def rows_of(cache, ids):
    return np.array([cache.ids.index(name) for name in ids])


# -- what is held out


@pytest.mark.parametrize("method", ["ulfine_plus", "linear_probe"])
def test_validation_images_are_seen_as_the_run_sees_them(runs, clusters, method):
    run = runs[method]
    own = run.calibration
    val = ~own.in_fold
    assert [name for name, kept in zip(own.ids, val, strict=True) if kept] == run.split["val"]
    rows = rows_of(clusters, run.split["val"])
    np.testing.assert_array_equal(own.labels[val], clusters.labels[rows])
    probabilities = run.predict_proba(clusters.plain[rows])
    np.testing.assert_allclose(own.probabilities[val], probabilities[np.arange(len(rows)), own.labels[val]], atol=1e-5)
    np.testing.assert_allclose(own.scores[val], run.scores(clusters.plain[rows]), atol=1e-4)


def test_folds_see_every_labelled_image_of_a_class_with_two(runs, clusters):
    own = runs["ulfine_plus"].calibration
    assert [name for name, kept in zip(own.ids, own.in_fold, strict=True) if kept] == runs["ulfine_plus"].split[
        "labeled"
    ]
    assert not runs["linear_probe"].calibration.in_fold.any()
    # what the run itself says of images it has learned from is more certain than what fits without them say
    rows = rows_of(clusters, runs["ulfine_plus"].split["labeled"])
    labels = clusters.labels[rows]
    learned = runs["ulfine_plus"].predict_proba(clusters.plain[rows])[np.arange(len(rows)), labels]
    folds = own.probabilities[own.in_fold]
    assert folds.mean() < learned.mean()
    assert np.corrcoef(folds, learned)[0, 1] > 0.3


def test_the_only_image_of_a_class_is_in_no_fold():
    cache = make_clusters(train=40)
    config = FitConfig(method="ulfine_plus", n1=20, gamma_l=20, gamma_u=20)
    run = fit(cache, config)
    alone = np.flatnonzero(np.array(run.metrics["class_counts"]) == 1)
    assert len(alone) == 1
    assert not (run.calibration.labels[run.calibration.in_fold] == alone).any()
    # nothing speaks of it, and it stays in every set
    assert run.predict_sets(cache.plain)[:, alone].all()


def test_trials_of_different_size_have_their_own_rows(clusters):
    configs = [FitConfig(method="ulfine_plus", **{**SPLIT, "n1": n1}, seed=seed) for n1, seed in ((40, 0), (24, 1))]
    for together, config in zip(fit_many(clusters, configs), configs, strict=True):
        alone = fit(clusters, config).calibration
        assert together.calibration.ids == alone.ids
        np.testing.assert_array_equal(together.calibration.labels, alone.labels)
        np.testing.assert_allclose(together.calibration.scores, alone.scores, atol=1e-4)
        np.testing.assert_allclose(together.calibration.probabilities, alone.probabilities, atol=1e-4)


def test_labels_of_folds_are_those_that_training_sees(clusters):
    config = FitConfig(method="ulfine_plus", **SPLIT, label_noise=0.5)
    own = fit(clusters, config).calibration
    clean = clusters.labels[rows_of(clusters, own.ids)]
    assert (own.labels == clean)[~own.in_fold].all()
    assert 0.3 < (own.labels == clean)[own.in_fold].mean() < 0.7


@pytest.mark.parametrize("method", ["ulfine_plus", "linear_probe"])
def test_cross_validation_sees_every_label_without_it(method):
    cache = make_clusters(train=12, test=0)
    run = fit(cache, FitConfig(method=method, labeled_fraction=0.5, cv_folds=3, cv_repeats=2, steps=20, eval_every=20))
    own = run.calibration
    assert sorted(own.ids) == sorted(run.split["labeled"])
    assert own.in_fold.all()
    rows = rows_of(cache, own.ids)
    np.testing.assert_array_equal(own.labels, cache.labels[rows])
    # the first repeat, by hand
    split = draw_split(cache.labels, cache.splits, cache.class_names, run.config, hold_out=False)
    folds = draw_folds(cache.labels, split, 4, run.config)
    expected = {}
    for fold in folds.splits[: folds.count]:
        one = fit(cache, run.config, split=fold)
        features = cache.plain[fold.test]
        logits = one.logits(features) / run.metrics["temperature"]
        probabilities = softmax(logits)[np.arange(len(fold.test)), cache.labels[fold.test]]
        for row, probability, score in zip(fold.test, probabilities, one.scores(features), strict=True):
            expected[cache.ids[row]] = probability, score
    np.testing.assert_allclose(own.probabilities, [expected[name][0] for name in own.ids], atol=1e-3)
    np.testing.assert_allclose(own.scores, [expected[name][1] for name in own.ids], atol=1e-3)


def test_the_mean_of_seeds_is_calibrated_where_they_hold_the_same_labels_out():
    one, other = scattered([6, 6]), scattered([6, 6])
    # the same images in another order
    turned = Calibration(
        other.ids[::-1], other.labels[::-1], other.in_fold[::-1], other.probabilities[::-1], other.scores[::-1] + 2
    )
    mean = mean_calibration([one, turned])
    at = {name: row for row, name in enumerate(mean.ids)}
    assert [mean.scores[at[name]] for name in one.ids] == (one.scores + 1).tolist()
    assert [mean.labels[at[name]] for name in one.ids] == one.labels.tolist()
    np.testing.assert_allclose([mean.probabilities[at[name]] for name in one.ids], one.probabilities)
    assert mean_calibration([one]) is one
    with pytest.raises(InputError, match=r"these 2 runs held different labels out, .*; name one of the runs"):
        mean_calibration([one, scattered([6, 7])])


# -- scores


def test_scores_are_the_energy_of_the_logits(runs, clusters):
    probe, plus = runs["linear_probe"], runs["ulfine_plus"]
    logits = probe.logits(clusters.plain).astype(np.float64)
    np.testing.assert_allclose(probe.scores(clusters.plain), np.log(np.exp(logits).sum(1)), rtol=1e-5)
    # log-probabilities have none, and the candidates of ulfine_plus have
    np.testing.assert_allclose(np.exp(plus.logits(clusters.plain)).sum(1), 1, atol=1e-4)
    head = plus.head(torch.float64)
    mixed = 0
    unit = head.rows(torch.from_numpy(np.asarray(clusters.plain, np.float64)))
    tensors, values = head.tensors, head.trials.values
    linear = unit @ tensors["linear"][0].T
    whitened = (unit - tensors["mean"][0]) @ tensors["map"][0]
    whitened = whitened / whitened.norm(dim=1, keepdim=True)
    similarity = cosines(whitened.unsqueeze(0), tensors["centers"], Metric(tensors["factors"]))[0]  # (n, S, K)
    for s, (weight, temperature) in enumerate(zip(tensors["weights"][0], tensors["temperature"][0], strict=True)):
        own = linear if s == 0 else values["sharpness_end"] * similarity[:, s - 1] + values["probe_weight"] * linear
        mixed = mixed + weight * torch.exp(own / temperature).sum(1)
    np.testing.assert_allclose(plus.scores(clusters.plain), np.log(mixed.numpy()), rtol=1e-4)
    assert plus.scores(clusters.plain).std() > 0.1


def test_images_unlike_all_classes_are_rejected(clusters):
    run = fit(clusters, FitConfig(method="ulfine_plus", n1=60, gamma_l=1, gamma_u=1, m1=0))
    # away from every class
    away = -np.stack([clusters.plain[clusters.labels == k].mean(0) for k in range(4)]).mean(0, keepdims=True)
    assert run.reject(away, 0.1).all()
    test = rows_of(clusters, run.test_ids)
    assert run.reject(clusters.plain[test], 0.1).mean() < 0.25
    assert run.reject(clusters.plain[test], 0.05).sum() <= run.reject(clusters.plain[test], 0.2).sum()


def test_the_run_rejects_and_excludes_by_its_held_out_rows(runs, clusters):
    run = runs["ulfine_plus"]
    own = run.calibration
    threshold = rejection_threshold(own.scores, own.labels, 0.2)
    np.testing.assert_array_equal(run.reject(clusters.plain, 0.2), run.scores(clusters.plain) < np.float32(threshold))
    thresholds = set_thresholds(own.probabilities, own.labels, 4, 0.7).threshold
    np.testing.assert_array_equal(
        run.predict_sets(clusters.plain, 0.7), run.predict_proba(clusters.plain) >= thresholds.astype(np.float32)
    )


@pytest.mark.parametrize("value", [0, 1, -0.1, 5, float("nan")])
def test_rates_and_coverages_outside_are_refused(runs, clusters, value):
    with pytest.raises(
        InputError, match=r"the rate of false rejection must be above 0 and below 1, such as 0\.05, got"
    ):
        runs["linear_probe"].reject(clusters.plain, value)
    with pytest.raises(InputError, match=r"the coverage of sets must be above 0 and below 1, such as 0\.9, got"):
        runs["linear_probe"].predict_sets(clusters.plain, value)


def test_a_run_that_held_nothing_out_says_how_to(clusters):
    run = fit(clusters, FitConfig(method="zero_shot", n1=20, val_fraction=0.0))
    with pytest.raises(InputError, match=r"held no labels out.* val_fraction above 0, or with method ulfine_plus"):
        run.reject(clusters.plain)


# -- what it says


def scattered(counts):
    """Rows with scores 0, 1, 2, ... and probabilities between 0.5 and 1."""
    labels = np.repeat(np.arange(len(counts)), counts)
    n = len(labels)
    return Calibration(
        [f"{i}.png" for i in range(n)],
        labels,
        np.zeros(n, np.bool_),
        np.linspace(0.5, 1, n).astype(np.float32),
        np.arange(n, dtype=np.float32),
    )


def test_what_it_says_of_rejection():
    few, many = scattered([6, 6]), scattered([60, 60])
    said = reject(few, np.array([-5.0, 50.0]), 0.05)
    assert not said.rejected.any()
    assert said.lines() == ["no image is rejected: a rate of 0.05 needs 19 held-out labels, got 12"]
    assert said.summary() == {"rate": 0.05, "threshold": None, "held_out": 12, "rejected": 0}
    said = reject(many, np.array([-5.0, 50.0]), 0.05)
    assert said.rejected.tolist() == [True, False]
    assert said.lines() == [
        "1 of 2 images are rejected as none of the classes, at a rate of false rejection of 0.05 by 120 held-out labels"
    ]
    # floor(0.05 * 121) = 6: the sixth smallest
    assert said.summary() == {"rate": 0.05, "threshold": 5.0, "held_out": 120, "rejected": 1}


def test_what_it_says_of_sets():
    names = ["ant", "bee", "cat", "dog"]
    probabilities = np.array([[0.9, 0.05, 0.05, 0.0], [0.1, 0.1, 0.0, 0.8]])
    said = class_sets(scattered([20, 5, 6, 0]), probabilities, 0.9)
    # bee and cat have eleven rows together, dog has none
    assert said.summary(names) == {
        "coverage": 0.9,
        "held_out": 31,
        "mean_size": 1.5,
        "empty": 0,
        "shared_threshold": ["bee", "cat"],
        "in_every_set": ["dog"],
    }
    assert said.lines(names) == [
        "sets at coverage 0.9, 1.5 classes on average; 0 are empty",
        f"fewer than {least_rows(1 - 0.9)} held-out labels: the coverage holds for these classes together, not for "
        "each: bee, cat",
        "too few held-out labels to leave it out of any set: dog",
    ]
    assert class_sets(scattered([20, 5, 6, 0]), probabilities[:0], 0.9).summary(names)["mean_size"] is None


# -- the run folder


def test_the_rows_come_back_from_the_run_folder(runs, clusters, tmp_path):
    run = runs["ulfine_plus"]
    folder = run.save(tmp_path / "run")
    table = pq.read_table(folder / "calibration.parquet")
    assert table.column_names == ["id", "part", "label", "probability", "score"]
    assert table.schema.metadata[b"score"] == b"energy"
    assert table["part"].to_pylist() == ["fold" if fold else "val" for fold in run.calibration.in_fold]
    assert "calibration.parquet" in json.loads((folder / "config.json").read_text())["digests"]
    again = Run.load(folder)
    assert again.calibration.ids == run.calibration.ids
    for name in ("labels", "in_fold", "probabilities", "scores"):
        np.testing.assert_array_equal(getattr(again.calibration, name), getattr(run.calibration, name))
    np.testing.assert_array_equal(again.reject(clusters.plain), run.reject(clusters.plain))
    np.testing.assert_array_equal(again.predict_sets(clusters.plain), run.predict_sets(clusters.plain))


def test_a_run_saved_before_says_to_fit_again(runs, clusters, tmp_path):
    old = replace(runs["linear_probe"], calibration=None)
    folder = old.save(tmp_path / "run")
    assert not (folder / "calibration.parquet").exists()
    again = Run.load(folder)
    for call in (again.reject, again.predict_sets):
        with pytest.raises(InputError, match=r"saved without scores of held-out labels, .*; fit it again"):
            call(clusters.plain)
    # such a run replaces one with rows whole
    runs["linear_probe"].save(folder)
    old.save(folder)
    assert Run.load(folder).calibration is None


def changed(table, name, value, position=3):
    values = table[name].to_pylist()
    values[position] = value
    at = table.column_names.index(name)
    return table.set_column(at, name, pa.array(values, table.schema.field(name).type))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda table: changed(table, "label", 4), r"names a class outside 0\.\.3"),
        (lambda table: changed(table, "label", -1), r"names a class outside 0\.\.3"),
        (lambda table: changed(table, "score", None), "an empty cell or a score that is no number"),
        (lambda table: changed(table, "score", float("nan")), "an empty cell or a score that is no number"),
        (lambda table: table.drop_columns(["score"]), "cannot be read"),
        (lambda table: table.replace_schema_metadata({"score": "depth"}), "holds the score 'depth', this program"),
        (lambda table: table.replace_schema_metadata(None), "holds the score '', this program"),
    ],
)
def test_a_file_of_another_program_is_one_sentence(runs, tmp_path, damage, sentence):
    folder = runs["linear_probe"].save(tmp_path / "run")
    file = folder / "calibration.parquet"
    pq.write_table(damage(pq.read_table(file)), file)
    with pytest.raises(InputError, match=r"calibration\.parquet has changed since the run was saved"):
        Run.load(folder)
    # of version 1, which has no digests
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("digest", "digests")}
    (folder / "config.json").write_text(json.dumps({**config, "version": 1}))
    with pytest.raises(InputError, match=sentence):
        Run.load(folder)


def test_a_missing_file_is_named(runs, tmp_path):
    folder = runs["linear_probe"].save(tmp_path / "run")
    (folder / "calibration.parquet").unlink()
    with pytest.raises(InputError, match=r"calibration\.parquet is missing in"):
        Run.load(folder)


# -- the command


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images and a run on them, through the commands."""
    folder = tmp_path_factory.mktemp("world")
    images = write_images(folder / "images", {"train/cat": 24, "train/dog": 16, "test/cat": 3, "test/dog": 2})
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    for arguments in (
        ["extract", images, "--out", folder / "cache", "--model", model, "--workers", 0],
        ["fit", folder / "cache", "--out", folder / "run", "--method", "ulfine_plus"],
    ):
        done = command(*arguments)
        assert done.exit_code == 0, done.output
    return images / "test", folder / "run"


def test_the_command_marks_images_and_lists_classes(world, tmp_path):
    images, folder = world
    done = command("predict", folder, images, "--out", tmp_path / "out.csv", "--reject", 0.1, "--sets", 0.8)
    assert done.exit_code == 0, done.output
    assert "at a rate of false rejection of 0.1 by 40 held-out labels" in done.stdout
    assert "sets at coverage 0.8" in done.stdout
    done = command(
        "predict", folder, images, "--out", tmp_path / "out.parquet", "--reject", 0.1, "--sets", 0.8, "--json"
    )
    said = json.loads(done.stdout)
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert said["images"] == 5
    assert said["reject"]["rejected"] == sum(table["rejected"])
    assert said["sets"]["mean_size"] == pytest.approx(np.mean([len(names) for names in table["set"]]))
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["rejected"] == "True" for row in rows] == table["rejected"]
    assert [json.loads(row["set"]) for row in rows] == table["set"]
    run = Run.load(folder)
    threshold = run.calibration.rejection_threshold(0.1)
    assert table["rejected"] == [score < threshold for score in table["score"]]
    # as before where neither is asked for
    command("predict", folder, images, "--out", tmp_path / "plain.parquet")
    assert not {"score", "rejected", "set"} & set(pq.read_table(tmp_path / "plain.parquet").column_names)


def test_the_command_refuses_in_one_sentence(world, tmp_path):
    images, folder = world
    out = ("--out", tmp_path / "out.csv")
    assert "below 1, such as 0.05, got 5" in refused("predict", folder, images, *out, "--reject", 5)
    assert "below 1, such as 0.9, got 90" in refused("predict", folder, images, *out, "--sets", 90)
    assert "leave out five crops" in refused("predict", folder, images, *out, "--sets", 0.9, "--five-crops")
    old = replace(Run.load(folder), calibration=None).save(tmp_path / "old")
    assert "fit it again" in refused("predict", old, images, *out, "--reject", 0.05)
    assert not (tmp_path / "out.csv").exists()


def test_a_realigned_run_is_calibrated_on_its_own_validation(clusters):
    from ulfine_fast.related.head_realignment.realign import realign

    run = fit(clusters, FitConfig(method="linear_probe", **SPLIT))
    (moved,) = realign([run], clusters, by="adjust", progress=False)
    rows = rows_of(clusters, run.split["val"])
    own = moved.calibration
    assert own.ids == run.split["val"]
    np.testing.assert_allclose(own.scores, moved.scores(clusters.plain[rows]), atol=1e-5)
    np.testing.assert_allclose(
        own.probabilities, moved.predict_proba(clusters.plain[rows])[np.arange(len(rows)), own.labels], atol=1e-5
    )
    assert abs(own.scores - run.calibration.scores).max() > 0.1
    energies = torch.logsumexp(torch.from_numpy(moved.logits(clusters.plain[rows])), dim=1)
    np.testing.assert_allclose(own.scores, energies, atol=1e-4)
