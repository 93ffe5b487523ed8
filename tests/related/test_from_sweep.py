"""A forecast from a finished sweep: what is written, what a later call fits again, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.conftest import make_clusters
from tests.related.test_growth import PROBE, hard, with_views
from ulfine_fast import FitConfig, InputError, sweep
from ulfine_fast.data.splits import draw_split
from ulfine_fast.related.forecast.forecast import Curve, forecast
from ulfine_fast.related.forecast.from_sweep import forecast_sweep


@pytest.fixture
def searched(tmp_path):
    """Run a sweep of one trial into the test's own folder."""

    def run(cache=None, lr=0.1, **options):
        arguments = {"out": tmp_path / "sweep", "trials": 1, "sampler": "grid", "refit": 0, **options}
        return sweep(cache or hard(), {**PROBE, "n1": 40, "lr": lr}, **arguments)

    return run


def test_the_best_trial_of_a_sweep_is_forecast(searched):
    result = searched(refit_seeds=4, refit=1)
    content = forecast_sweep(result.out, hard(), "labels", 2.0)
    assert content == json.loads((result.out / "forecast.json").read_text())
    assert (content["trial"], content["over"], content["metric"]) == (0, "labels", "balanced_accuracy")
    # as many seeds as the refit, and none of those that the trial was chosen by
    assert content["seeds"] == [1, 2, 3, 4]
    curve = Curve.from_dict(content["curve"])
    assert curve.budgets.tolist() == sorted(curve.budgets)
    again = forecast(curve, 2 * curve.budgets[-1], chance=0.2)
    assert content["refused"] is None
    assert content["forecast"] == again.to_dict()
    assert set(content["forecast"]["figures"]) == {"flp", "last", "power_law", "log_line"}


def test_a_forecast_repeated_fits_nothing_again(searched, monkeypatch):
    out = searched().out
    before = forecast_sweep(out, hard(), "labels", 2.0)
    assert before["seeds"] == [1, 2, 3, 4, 5]
    monkeypatch.setattr("ulfine_fast.related.forecast.growth.fit_many", None)
    assert forecast_sweep(out, hard(), "labels", 2.0) == before
    further = forecast_sweep(out, hard(), "labels", 3.0)
    assert further["curve"] == before["curve"]
    assert further["forecast"]["target"] == pytest.approx(1.5 * before["forecast"]["target"])


def test_a_hopeless_forecast_says_why(searched):
    same = make_clusters(classes=5, train=80, noise=100.0, text=False)
    content = forecast_sweep(searched(same).out, same)
    assert content["forecast"] is None
    assert "above chance" in content["refused"]


def test_runs_that_cannot_be_fitted_are_a_reason_too(searched, monkeypatch):
    def diverged(*args, **options):
        raise InputError("the run diverged; lower lr")

    out = searched().out
    monkeypatch.setattr("ulfine_fast.related.forecast.from_sweep.grow", diverged)
    content = forecast_sweep(out, hard(), "labels", 2.0)
    assert content["refused"] == "the run diverged; lower lr"
    assert content["curve"] is None
    # a refusal is not kept: the next call tries again
    monkeypatch.undo()
    assert forecast_sweep(out, hard(), "labels", 2.0)["refused"] is None


def test_a_trial_that_reads_no_views_gains_nothing_by_them(searched):
    cache = with_views(hard(), 5)
    content = forecast_sweep(searched(cache, lr=0.0).out, cache, "views", 2.0)
    assert "validation loss does not fall for sure with views (exponent" in content["refused"]


def test_the_split_is_that_of_the_sweep(searched, tmp_path):
    cache = hard()
    config = FitConfig(**{**PROBE, "tau": 1.0, "n1": 40, "split_seed": 7})
    split = draw_split(cache.labels, cache.splits, cache.class_names, config)
    result = searched(split=split, refit=1, refit_seeds=3)
    content = forecast_sweep(result.out, cache, "steps", 2.0)
    assert content["curve"] is not None
    with pytest.raises(InputError, match=r"used another split; name its split\.json with --split"):
        forecast_sweep(result.out, cache, split=draw_split(cache.labels, cache.splits, cache.class_names, FitConfig()))
    assert forecast_sweep(result.out, cache, "steps", 2.0, split=split) == content
    drawn = searched(out=tmp_path / "drawn")
    with pytest.raises(InputError, match="drew its splits from its settings; leave out --split"):
        forecast_sweep(drawn.out, cache, split=split)
    alone = searched(split=split, out=tmp_path / "alone")
    with pytest.raises(InputError, match="refit no trial whose run would say which to use; give --split"):
        forecast_sweep(alone.out, cache)


def test_other_folders_and_caches_are_refused(searched, tmp_path):
    result = searched(refit=1, refit_seeds=3)
    with pytest.raises(InputError, match="searched another cache; name that one with --cache"):
        forecast_sweep(result.out, make_clusters())
    with pytest.raises(InputError, match="searched arrays in memory; name a cache with --cache"):
        forecast_sweep(result.out)
    with pytest.raises(InputError, match=r"is not a finished sweep \(FileNotFoundError"):
        forecast_sweep(tmp_path / "nowhere", hard())
    about = json.loads((result.out / "sweep.json").read_text())
    (result.out / "sweep.json").write_text(json.dumps({**about, "format": "other"}))
    with pytest.raises(InputError, match=r"format 'other', version 2; name a folder"):
        forecast_sweep(result.out, hard())


REFUSED = [
    ({"over": "images"}, "over must be one of labels, views, steps, got 'images'"),
    ({"times": 5.0}, "times must be above 1 and at most 4, got 5"),
    ({"times": 1.0}, "times must be above 1"),
    ({"seeds": 2}, "needs runs of at least 3 seeds, got 2"),
    ({"over": "views"}, "needs 4 of each kind, this cache has 2"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_can_be_refused_before_a_run_is(searched, options, words):
    out = searched().out
    with pytest.raises(InputError) as refusal:
        forecast_sweep(out, hard(), **options)
    assert words in str(refusal.value)
    assert not (out / "forecast.json").exists()


def test_a_forecast_is_of_a_metric_of_which_more_is_better(searched):
    out = searched(metrics=["ece"]).out
    with pytest.raises(InputError, match="is of a metric of which more is better, got ece"):
        forecast_sweep(out, hard())


def test_sweep_still_takes_a_forecast_and_warns(searched, tmp_path):
    with pytest.warns(DeprecationWarning, match="use forecast_sweep"):
        result = searched(forecast="labels", forecast_times=2.0, refit=1)
    assert result.forecast == result.to_dict()["forecast"] == json.loads((result.out / "forecast.json").read_text())
    (result.out / "forecast.json").unlink()
    assert forecast_sweep(result.out, hard(), "labels", 2.0) == result.forecast
    without = searched(out=tmp_path / "without")
    assert not (without.out / "forecast.json").exists()
    assert "forecast" not in without.to_dict()


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_sweep_refuses_its_forecast_before_a_folder_is_made(searched, tmp_path, options, words):
    names = {"over": "forecast", "times": "forecast_times", "seeds": "refit_seeds"}
    with pytest.raises(InputError) as refusal:
        searched(**{"forecast": "labels", **{names[name]: value for name, value in options.items()}})
    assert words in str(refusal.value)
    assert not (tmp_path / "sweep").exists()


def test_fewer_seeds_than_the_refit_are_taken_from_its_start(searched):
    result = searched(refit=1, refit_seeds=4)
    content = forecast_sweep(result.out, hard(), "steps", 2.0, seeds=3)
    assert content["seeds"] == [1, 2, 3]
    assert np.shape(content["curve"]["losses"]) == (5, 3)
