from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.data import digits
from benchmarks.studies import forecast as bench
from tests.benchmarks.program import run_command
from tests.conftest import make_clusters
from ulfine_fast.related.forecast.forecast import Curve, predictions

BUDGETS = np.array([20.0, 28.0, 40.0, 57.0, 80.0, 320.0])


def world(seeds=3, metric=lambda loss: 0.9 - 0.2 * loss):
    """FLP is right, to a little noise of each seed."""
    noise = 1 + 0.01 * np.random.default_rng(0).normal(size=(1, seeds))
    losses = 8 * BUDGETS[:, None] ** -0.4 * noise
    return Curve(BUDGETS, losses, metric(losses))


def test_the_held_out_point_is_not_looked_at():
    curve = world()
    row = bench.evaluate(curve, "labels", 10)
    values, losses = curve.values.copy(), curve.losses.copy()
    values[-1], losses[-1] = 0.123, 9.0
    other = bench.evaluate(Curve(BUDGETS, losses, values), "labels", 10)
    for name in ("of_mean", "by_seed", "refused", "budgets", "target"):
        assert row[name] == other[name]
    assert row["truth"] == curve.values[-1].tolist()
    seen = Curve(BUDGETS[:-1], curve.losses[:-1], curve.values[:-1])
    assert row["by_seed"]["log_line"] == predictions(seen, 320.0, np.ones(5, bool))["log_line"].tolist()


def test_the_right_law_has_the_smallest_error():
    row = {**bench.evaluate(world(), "labels", 10), "over": "labels"}
    assert row["refused"] is None
    assert row["inside"]["flp"]
    assert not row["inside"]["last"]
    assert bench.error_of_mean(row, "flp") == pytest.approx(0, abs=1e-3)
    assert bench.errors(row, "flp") == pytest.approx([0, 0, 0], abs=1e-9)
    truth = np.array(row["truth"])
    assert bench.errors(row, "last") == pytest.approx(1 - np.array(row["by_seed"]["last"]) / truth)
    lines = bench.summary([row])
    assert [line[:3] for line in lines[:2]] == [["labels", "FLP", "1"], ["labels", "last value", "1"]]
    assert lines[0][5:] == ["1", "1 of 1"]
    assert lines[1][4:] == ["-", "0", "0 of 1"]
    assert {line[0] for line in lines} == {"labels", "not refused"}


def test_refusals_are_shown_beside_the_errors():
    flat = Curve(BUDGETS, np.ones((6, 3)), world().values)
    low = Curve(BUDGETS, world().losses, np.full((6, 3), 0.1))
    rows = [
        {**bench.evaluate(c, "labels", 10), **dict.fromkeys(("data", "method", "over", "metric"), "x")}
        for c in (flat, low)
    ]
    first, second = bench.table(rows)
    assert first[4] == "refused: loss does not fall"
    assert second[4] == "refused: at chance"
    # without points above chance FLP has no line, the others have
    assert second[6] == "-"
    assert second[7] == "0.0 ±0.0"
    assert bench.reason("the run diverged") == "the run diverged"


@pytest.mark.parametrize("cache", [make_clusters(), digits((1, 1))])
def test_validation_counts_classes_the_same_and_has_no_views(cache):
    held = bench.with_validation(cache)
    counts = np.bincount(held.labels[held.splits == "val"])
    assert counts.max() - counts.min() <= 0.3 * counts.max()
    assert len(held.view_rows) == (held.splits == "train").sum()
    row = held.view_rows[7]
    before = list(cache.view_rows).index(row)
    np.testing.assert_array_equal(held.views("weak")[7], cache.views("weak")[before])


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "open_features", lambda name: make_clusters(classes=5, noise=1.5))
    arguments = ["--data", "demo", "--over", "steps,views", "--seeds", "0-2", "--n1", "30"]
    done = run_command(bench.forecasts, *arguments, "--json", str(tmp_path / "rows.json"))
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["share"], row["metric"]) for row in rows] == [
        (fraction, metric) for fraction in bench.FRACTIONS for metric in bench.METRICS
    ]
    assert rows[0]["budgets"][-1] == 125
    assert rows[0]["target"] == 500
    assert "demo: 2 strong views are too few" in done.stdout
    assert "125 to 500 steps" in done.stdout
    assert run_command(bench.forecasts, "--over", "luck").exit_code != 0
