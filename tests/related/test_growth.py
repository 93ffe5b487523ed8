"""Runs at growing budgets: nested, told apart from validation; a sweep that forecasts, goes on, and refuses."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy.special import log_softmax

from tests.conftest import make_clusters
from ulfine_fast import FeatureCache, FitConfig, InputError, fit_many
from ulfine_fast.data.splits import draw_split, labeled_counts
from ulfine_fast.metrics.classification import class_groups
from ulfine_fast.related.forecast.forecast import Curve, forecast
from ulfine_fast.related.forecast.growth import SIZES, fewer_labels, fewer_views, grow, mean_loss

PROBE = {"method": "linear_probe", "steps": 60, "eval_every": 60, "val_fraction": 0.3, "tau": [1.0]}


def hard(**values):
    """Clusters that take labels to tell apart."""
    return make_clusters(classes=5, train=80, noise=1.5, text=False, **values)


def with_views(cache, count):
    """The cache with so many weak views, all but the first of them noise."""
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
    fixed = {**PROBE, "lr": 0.1, "tau": 1.0, **values}
    return [FitConfig(**fixed, seed=seed) for seed in range(3)]


def test_fewer_labels_are_nested_and_leave_the_rest_alone():
    cache, config = hard(), FitConfig(n1=40, gamma_l=10.0)
    split = draw_split(cache.labels, cache.splits, cache.class_names, config)
    whole = labeled_counts(cache.labels, split, 5)
    before: set[int] = set()
    for size in SIZES:
        less = fewer_labels(cache, split, size, seed=0)
        assert before <= set(less.labeled) <= set(split.labeled)
        before = set(less.labeled)
        wanted = np.maximum(1, np.round(size * whole))
        np.testing.assert_array_equal(labeled_counts(cache.labels, less, 5), wanted)
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
    classes = [np.mean([one for one, k in zip(each, labels, strict=True) if k == wanted]) for wanted in range(3)]
    assert mean_loss(logits, labels, balanced=True) == pytest.approx(np.mean(classes))


def test_a_curve_is_of_fits_of_its_own_at_each_size():
    cache, wanted = hard(), configs(n1=40)
    curve = grow(cache, wanted, "steps", ["accuracy"], sizes=(0.5, 1.0))["accuracy"]
    assert curve.budgets.tolist() == [30, 60]
    for place, steps in enumerate((30, 60)):
        runs = fit_many(cache, [replace(one, steps=steps) for one in wanted], progress=False)
        assert curve.figures[place].tolist() == [run.metrics["val"]["accuracy"] for run in runs]


def test_a_group_stays_the_group_of_all_labels():
    cache, wanted = hard(), configs(n1=40, gamma_l=4.0)
    curve = grow(cache, wanted, "labels", ["few", "few_shot"], sizes=(0.25, 1.0))
    run_of = fit_many(cache, wanted, progress=False)
    splits = [draw_split(cache.labels, cache.splits, cache.class_names, one) for one in wanted]
    less = [fewer_labels(cache, split, 0.25, one.data_seed) for split, one in zip(splits, wanted, strict=True)]
    small = fit_many(cache, wanted, split=less, progress=False)
    for runs, place in ((small, 0), (run_of, 1)):
        for r, (run, split) in enumerate(zip(runs, splits, strict=True)):
            few = class_groups(labeled_counts(cache.labels, split, 5))["few_shot"]
            recall = np.array(run.metrics["val"]["per_class_accuracy"])
            assert curve["few_shot"].figures[place, r] == pytest.approx(recall[few].mean())
            assert len(few) < 5


def test_views_are_counted():
    curve = grow(with_views(hard(), 5), configs(n1=20, steps=5), "views")["balanced_accuracy"]
    # five sizes, of which a quarter and a third of five views are one and two
    assert curve.budgets.tolist() == [1, 2, 4, 5]


def searched(search, cache=None, **options):
    given = {"trials": 1, "sampler": "grid", "seeds": 1, "forecast": "labels", "forecast_times": 2.0, **options}
    settings = {**PROBE, "n1": 40, "lr": given.pop("lr", 0.1)}
    return search(settings, cache or hard(), **given)


def test_a_sweep_forecasts_its_best_trial(search):
    result = searched(search, refit_seeds=4)
    told = json.loads((result.out / "forecast.json").read_text())
    assert told == result.forecast == result.to_dict()["forecast"]
    assert (told["trial"], told["over"], told["metric"]) == (0, "labels", "balanced_accuracy")
    assert told["seeds"] == [1, 2, 3, 4]
    curve = Curve.from_dict(told["curve"])
    assert curve.budgets.tolist() == sorted(curve.budgets)
    again = forecast(curve, 2 * curve.budgets[-1], chance=0.2)
    assert told["refused"] is None
    assert told["forecast"] == asdict(again)
    assert set(told["forecast"]["figures"]) == {"flp", "last", "power_law", "log_line"}


def test_a_sweep_asked_again_fits_nothing_again(search, monkeypatch):
    before = searched(search)
    monkeypatch.setattr("ulfine_fast.engine.fit.fit_many", None)
    assert searched(search).forecast == before.forecast
    further = searched(search, forecast_times=3.0).forecast
    assert further["curve"] == before.forecast["curve"]
    assert further["forecast"]["target"] == pytest.approx(1.5 * before.forecast["forecast"]["target"])


def test_without_a_forecast_nothing_is_written(search):
    result = searched(search, forecast=None)
    assert not (result.out / "forecast.json").exists()
    assert "forecast" not in result.to_dict()
    later = searched(search)
    assert later.forecast["forecast"] is not None
    assert (later.out / "sweep.json").exists()


def test_a_hopeless_forecast_is_told_and_the_sweep_stands(search):
    same = make_clusters(classes=5, train=80, noise=100.0, text=False)
    result = searched(search, same)
    assert result.forecast["forecast"] is None
    assert "above chance" in result.forecast["refused"]
    assert len(result.leaderboard) == 1


def test_runs_that_cannot_be_had_are_told_too(search, monkeypatch):
    def diverged(*given, **how):
        raise InputError("the run diverged; lower lr")

    monkeypatch.setattr("ulfine_fast.related.forecast.growth.grow", diverged)
    result = searched(search)
    assert result.forecast["refused"] == "the run diverged; lower lr"
    assert result.forecast["curve"] is None
    # a refusal is not kept: the next call tries again
    monkeypatch.undo()
    assert searched(search).forecast["refused"] is None


def test_what_reads_no_views_gains_nothing_by_them(search):
    cache = with_views(hard(), 5)
    result = searched(search, cache, forecast="views", lr=0.0)
    assert "validation loss does not fall for sure with views (exponent" in result.forecast["refused"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"forecast": "images"}, "forecast must be one of labels, views, steps, got 'images'"),
        ({"forecast_times": 5.0}, "forecast-times must be above 1 and at most 4, got 5"),
        ({"forecast_times": 1.0}, "forecast-times must be above 1"),
        ({"refit_seeds": 2}, "needs runs of at least 3 seeds, got 2"),
        ({"metrics": ["ece"]}, "is of a figure of which more is better, got ece"),
        ({"forecast": "views"}, "needs 4 of each kind, this cache has 2"),
    ],
)
def test_refused_before_a_folder_is_made(search, tmp_path, options, words):
    with pytest.raises(InputError) as told:
        searched(search, **options)
    assert words in str(told.value)
    assert not (tmp_path / "sweep").exists()


def test_crops_are_no_views_to_forecast_over():
    with pytest.raises(InputError, match="projected features alone, not crop_epochs = 3"):
        grow(with_views(hard(), 5), configs(crop_epochs=3), "views")
    with pytest.raises(InputError, match="no validation images"):
        grow(hard(), configs(val_fraction=0.0), "labels")
