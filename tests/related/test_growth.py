"""Runs with growing budgets: smaller ones within larger ones, evaluated on validation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import log_softmax

from tests.conftest import make_clusters
from ulfine_fast import FeatureCache, FitConfig, InputError, fit_many
from ulfine_fast.data.splits import draw_split, labeled_counts
from ulfine_fast.metrics.classification import class_groups
from ulfine_fast.related.forecast.growth import SIZES, fewer_labels, fewer_views, grow, mean_loss

PROBE = {"method": "linear_probe", "steps": 60, "eval_every": 60, "val_fraction": 0.3, "tau": [1.0]}


def hard(**values):
    """Clusters that need labels to be separated."""
    return make_clusters(classes=5, train=80, noise=1.5, text=False, **values)


def with_views(cache, count):
    """The cache with that many weak views, all noise except the first."""
    random = np.random.default_rng(0)
    weak = np.repeat(cache.views("weak")[:, :1], count, axis=1)
    return FeatureCache.from_arrays(
        cache.plain,
        cache.labels,
        weak=weak + 0.1 * random.normal(size=weak.shape),
        strong=cache.views("strong"),
        splits=cache.splits.tolist(),
    )


def configs(**values):
    values = {**PROBE, "lr": 0.1, "tau": 1.0, **values}
    return [FitConfig(**values, seed=seed) for seed in range(3)]


def test_fewer_labels_are_nested_and_leave_the_rest_alone():
    cache, config = hard(), FitConfig(n1=40, gamma_l=10.0)
    split = draw_split(cache.labels, cache.splits, cache.class_names, config)
    whole = labeled_counts(cache.labels, split, 5)
    before: set[int] = set()
    for size in SIZES:
        less = fewer_labels(cache, split, size, seed=0)
        assert before <= set(less.labeled) <= set(split.labeled)
        before = set(less.labeled)
        expected = np.maximum(1, np.round(size * whole))
        np.testing.assert_array_equal(labeled_counts(cache.labels, less, 5), expected)
        for role in ("unlabeled", "val", "test"):
            np.testing.assert_array_equal(getattr(less, role), getattr(split, role))
    assert before == set(split.labeled)


def test_fewer_views_are_the_first_ones():
    cache = with_views(hard(), 4)
    less = fewer_views(cache, 2)
    assert less.views("weak").shape[1] == less.views("strong").shape[1] == 2
    np.testing.assert_array_equal(less.views("weak"), cache.views("weak")[:, :2])
    np.testing.assert_array_equal(less.plain, cache.plain)


def test_the_loss_is_that_of_a_loop():
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(30, 4)), random.integers(0, 3, 30)
    each = [-log_softmax(row)[k] for row, k in zip(logits, labels, strict=True)]
    assert mean_loss(logits, labels, balanced=False) == pytest.approx(np.mean(each))
    classes = [np.mean([one for one, k in zip(each, labels, strict=True) if k == label]) for label in range(3)]
    assert mean_loss(logits, labels, balanced=True) == pytest.approx(np.mean(classes))


def test_a_curve_is_of_fits_of_its_own_at_each_size():
    cache, trial = hard(), configs(n1=40)
    curve = grow(cache, trial, "steps", ["accuracy"], sizes=(0.5, 1.0))["accuracy"]
    assert curve.budgets.tolist() == [30, 60]
    for index, steps in enumerate((30, 60)):
        runs = fit_many(cache, [replace(one, steps=steps) for one in trial], progress=False)
        assert curve.values[index].tolist() == [run.metrics["val"]["accuracy"] for run in runs]


def test_a_group_stays_the_group_of_all_labels():
    cache, trial = hard(), configs(n1=40, gamma_l=4.0)
    curve = grow(cache, trial, "labels", ["few", "few_shot"], sizes=(0.25, 1.0))
    whole = fit_many(cache, trial, progress=False)
    splits = [draw_split(cache.labels, cache.splits, cache.class_names, one) for one in trial]
    less = [fewer_labels(cache, split, 0.25, one.data_seed) for split, one in zip(splits, trial, strict=True)]
    small = fit_many(cache, trial, split=less, progress=False)
    for runs, index in ((small, 0), (whole, 1)):
        for r, (run, split) in enumerate(zip(runs, splits, strict=True)):
            few = class_groups(labeled_counts(cache.labels, split, 5))["few_shot"]
            recall = np.array(run.metrics["val"]["per_class_accuracy"])
            assert curve["few_shot"].values[index, r] == pytest.approx(recall[few].mean())
            assert len(few) < 5


def test_views_are_counted():
    curve = grow(with_views(hard(), 5), configs(n1=20, steps=5), "views")["balanced_accuracy"]
    # five sizes, of which a quarter and a third of five views are one and two
    assert curve.budgets.tolist() == [1, 2, 4, 5]


def test_crops_are_no_views_to_forecast_over():
    with pytest.raises(InputError, match="projected features alone, not crop_epochs = 3"):
        grow(with_views(hard(), 5), configs(crop_epochs=3), "views")
    with pytest.raises(InputError, match="no validation images"):
        grow(hard(), configs(val_fraction=0.0), "labels")
