"""`fit` without a test split: every label trains, and cross-validation estimates."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import make_clusters
from ulfine_fast import FeatureCache, FitConfig, Run, fit, fit_many
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.data.folds import draw_folds
from ulfine_fast.data.splits import Split
from ulfine_fast.runs.evaluate import evaluate

QUICK = {"method": "linear_probe", "steps": 20, "eval_every": 10, "lr": 0.3}
COUNTS = (12, 9, 3, 1)


def few_labels(counts=COUNTS, unlabeled=40, val=0, noise=1.2):
    """Clusters of which so many images of each class have a label; none is for testing."""
    cache = make_clusters(classes=len(counts), train=40, test=5, noise=noise)
    labels = cache.labels
    train = np.flatnonzero(cache.splits == "train")
    rows = [train[labels[train] == k] for k in range(len(counts))]
    known = np.concatenate([own[:count] for own, count in zip(rows, counts, strict=True)])
    held = np.concatenate([own[count : count + val] for own, count in zip(rows, counts, strict=True)])
    rest = np.setdiff1d(train, np.concatenate([known, held]))[:unlabeled]
    order = np.concatenate([known, rest, held])
    trained = np.concatenate([known, rest])
    return FeatureCache.from_arrays(
        cache.plain[order],
        np.where(np.isin(order, rest), -1, labels[order]),
        class_names=cache.class_names,
        text_features=cache.prototypes[:, None],
        weak=cache.views("weak")[trained],
        strong=cache.views("strong")[trained],
        splits=["train"] * len(known) + ["unlabeled"] * len(rest) + ["val"] * len(held),
    )


@pytest.fixture(scope="module")
def cache():
    return few_labels()


@pytest.fixture(scope="module")
def run(cache):
    return fit(cache, FitConfig(**QUICK), progress=False)


def all_labels(cache):
    none = np.empty(0, dtype=np.int64)
    labeled = np.flatnonzero(cache.labels >= 0)
    return Split(labeled, np.flatnonzero(cache.labels < 0), none, none, np.arange(len(COUNTS)))


def test_every_label_trains(cache, run):
    assert len(run.split["labeled"]) == sum(COUNTS)
    assert run.split["val"] == run.split["test"] == []
    assert run.metrics["class_counts"] == list(COUNTS)
    whole = fit(cache, FitConfig(**QUICK), split=all_labels(cache), progress=False)
    torch.testing.assert_close(run.tensors["linear"], whole.tensors["linear"])


def test_the_estimate_is_that_of_fits_one_by_one(cache, run):
    config = FitConfig(**QUICK)
    split = all_labels(cache)
    folds = draw_folds(cache.labels, split, len(COUNTS), config)
    right = np.full(folds.numbers.shape, np.nan)
    for number, own in enumerate(folds.splits):
        fitted = fit(cache, config, split=replace(own, test=split.test), progress=False)
        repeat, fold = divmod(number, folds.count)
        right[repeat, folds.numbers[repeat] == fold] = fitted.predict(cache.plain[own.test]) == cache.labels[own.test]
    estimate = run.metrics["cross_validation"]
    held_out = ~np.isnan(right[0])
    labels = cache.labels[split.labeled]
    assert labels[~held_out].tolist() == [3]
    np.testing.assert_allclose(run.held_out.correct, right[:, held_out].mean(0))
    recalls = [right[:, labels == k].mean() for k in range(3)]
    assert estimate["per_class_accuracy"] == [*map(pytest.approx, recalls), None]
    assert estimate["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    low, high = estimate["balanced_accuracy_interval"]
    assert low < estimate["balanced_accuracy"] < high
    assert run.held_out.ids == [cache.ids[row] for row in split.labeled[held_out]]


def test_no_metric_is_called_one_of_a_test_split(run):
    assert not {"accuracy", "balanced_accuracy", "per_class_accuracy", "ece"} & run.metrics.keys()
    assert run.metrics["val"] == {}
    assert run.metrics["test_rows"] == 0


def test_the_temperature_is_fitted_on_held_out_images(run):
    assert run.metrics["temperature"] != 1
    assert run.metrics["cross_validation"]["ece_temperature_scaled"] < run.metrics["cross_validation"]["ece"]
    few = fit(few_labels((4, 4, 3, 1)), FitConfig(**QUICK), progress=False)
    assert few.metrics["temperature"] == 1
    plus = fit(few_labels(), FitConfig(cv_folds=3, cv_repeats=1), progress=False)
    assert plus.metrics["temperature"] == 1


def test_seeds_and_folds_are_trials_of_one_call(cache, run):
    other = FitConfig(**QUICK, seed=1)
    first, second = fit_many(cache, [FitConfig(**QUICK), other], progress=False)
    assert first.metrics["cross_validation"] == run.metrics["cross_validation"]
    assert (first.config.seed, second.config.seed) == (0, 1)
    assert second.metrics["cross_validation"]["rows"] == 24


@pytest.mark.parametrize("options", [{"test_fraction": 0.2}, {"n1": 3, "gamma_l": 3.0}])
def test_a_test_fraction_and_the_protocol_hold_images_out(options):
    cache = few_labels((12, 12, 12, 12))
    held = fit(cache, FitConfig(**QUICK, **options), progress=False)
    assert "cross_validation" not in held.metrics
    assert held.metrics["test_rows"] > 0
    assert held.held_out is None


def test_without_a_test_fraction_the_protocol_takes_a_fifth():
    cache = few_labels((20, 20, 20, 20))
    splits = [
        fit(cache, FitConfig(**QUICK, n1=8, gamma_l=2, **more), progress=False).split
        for more in ({}, {"test_fraction": 0.2})
    ]
    assert splits[0] == splits[1]


def test_a_cache_with_a_test_split_stays_as_it_is():
    held = fit(make_clusters(), FitConfig(**QUICK), progress=False)
    assert "cross_validation" not in held.metrics
    assert held.metrics["test_rows"] == 60
    assert len(held.split["val"]) == 24


def test_validation_images_of_the_cache_still_select_and_calibrate():
    cache = few_labels((12, 12, 12, 12), val=6)
    fitted = fit(cache, FitConfig(**QUICK, select="best"), progress=False)
    assert len(fitted.split["val"]) == 24
    assert len(fitted.split["labeled"]) == 48
    assert fitted.metrics["val"]["balanced_accuracy"] > 0
    assert fitted.metrics["temperature"] != 1
    assert fitted.metrics["cross_validation"]["rows"] == 48


def test_best_heads_and_patience_take_the_last_step_without_validation(cache, run):
    fitted = fit(cache, FitConfig(**QUICK, select="best", patience=1), progress=False)
    assert fitted.status == "done"
    torch.testing.assert_close(fitted.tensors["linear"], run.tensors["linear"])


def test_one_label_a_class_gives_no_estimate():
    fitted = fit(few_labels((1, 1, 1, 1)), FitConfig(**QUICK), progress=False)
    estimate = fitted.metrics["cross_validation"]
    assert (estimate["rows"], estimate["per_class_accuracy"]) == (0, [None] * 4)
    assert fitted.held_out is None


def test_no_folds_are_no_estimate(cache, run):
    fitted = fit(cache, FitConfig(**QUICK, cv_folds=0), progress=False)
    assert "cross_validation" not in fitted.metrics
    torch.testing.assert_close(fitted.tensors["linear"], run.tensors["linear"])
    with pytest.raises(InputError, match="cv_folds must be 0, for no estimate, or at least 2, got 1"):
        FitConfig(cv_folds=1)


def test_a_watch_sees_the_trials_that_were_asked_for(cache):
    seen = set()

    def watch(step, rows):
        seen.update(rows)
        return [1] if step == 10 else []

    runs = fit_many(cache, [FitConfig(**QUICK), FitConfig(**QUICK, seed=1)], watch=watch, progress=False)
    assert seen == {0, 1}
    assert [run.status for run in runs] == ["done", "pruned"]


def test_a_search_holds_validation_images_out(cache):
    runs = fit_many(cache, [FitConfig(**QUICK)], read_test=False, progress=False)
    assert runs[0].metrics["val"]
    assert "cross_validation" not in runs[0].metrics


def test_a_fit_that_diverged_has_no_estimate(cache):
    wild = {**QUICK, "lr": 1e38, "weight_decay": 1e3}
    fitted = fit(cache, FitConfig(**wild), progress=False)
    assert fitted.status == "failed"
    assert "cross_validation" not in fitted.metrics


def test_what_was_held_out_is_saved_and_read(run, tmp_path):
    read = Run.load(run.save(tmp_path / "run"))
    assert read.metrics == json.loads(json.dumps(run.metrics))
    assert read.held_out.ids == run.held_out.ids
    np.testing.assert_allclose(read.held_out.correct, run.held_out.correct)
    np.testing.assert_allclose(read.held_out.probabilities, run.held_out.probabilities)
    assert len(read.test_ids) == 0
    assert evaluate(read) == {"cross_validation": read.metrics["cross_validation"], "test_rows": 0}
