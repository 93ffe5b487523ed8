"""Forecasts of curves whose future is known, against numpy's own fits, and where they are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.related.forecast.forecast import Curve, above_chance, forecast, predictions

BUDGETS = np.array([50.0, 70.0, 100.0, 140.0, 200.0])


def made(seeds=5, noise=0.0, budgets=BUDGETS, exponent=-0.4):
    """A curve for which FLP is right: loss 8 C^b, value 0.9 - 0.2 loss; noise of each seed on the loss."""
    random = np.random.default_rng(3)
    losses = 8 * budgets[:, None] ** exponent * np.exp(noise * random.normal(size=(len(budgets), seeds)))
    return Curve(budgets, losses, 0.9 - 0.2 * losses)


def with_loss(**values):
    """A metric that rises whatever the loss does."""
    return Curve(BUDGETS, made(**values).losses, np.linspace(0.5, 0.6, 5)[:, None].repeat(5, 1))


def test_the_law_is_recovered():
    result = forecast(made(), 800, chance=0.1)
    assert result.target == 800
    assert result.exponent.value == pytest.approx(-0.4)
    assert result.loss.value == pytest.approx(8 * 800**-0.4)
    assert result.values["flp"].value == pytest.approx(0.9 - 0.2 * 8 * 800**-0.4)
    # without noise all resampled seeds agree
    assert result.values["flp"].low == pytest.approx(result.values["flp"].high)


def test_every_forecaster_is_exact_for_its_own_law():
    errors = 0.9 * BUDGETS[:, None] ** -0.2
    lines = 0.1 + 0.1 * np.log(BUDGETS)[:, None]
    used = np.ones(5, dtype=bool)
    losses = made(1).losses
    by_power = predictions(Curve(BUDGETS, losses, 1 - errors), 800, used)
    by_line = predictions(Curve(BUDGETS, losses, lines), 800, used)
    assert by_power["power_law"] == pytest.approx(1 - 0.9 * 800**-0.2)
    assert by_line["log_line"] == pytest.approx(0.1 + 0.1 * np.log(800))
    assert by_line["last"] == lines[-1]
    assert by_power["log_line"] != pytest.approx(by_power["power_law"], abs=0.01)


def test_the_fits_are_numpys():
    random = np.random.default_rng(0)
    losses = np.sort(random.uniform(0.5, 2, (5, 1)), axis=0)[::-1]
    values = random.uniform(0.3, 0.7, (5, 1))
    used = np.array([False, True, True, True, True])
    predicted = predictions(Curve(BUDGETS, losses, values), 300, used)
    size, far = np.log(BUDGETS), np.log(300)
    slope, start = np.polyfit(size, np.log(losses[:, 0]), 1)
    loss = np.exp(start + slope * far)
    assert predicted["exponent"] == pytest.approx(slope)
    assert predicted["loss"] == pytest.approx(loss)
    # only the line from loss to metric leaves points out
    expected = np.polyval(np.polyfit(losses[used, 0], values[used, 0], 1), loss)
    assert predicted["flp"] == pytest.approx(np.clip(expected, 0, 1))
    error = np.polyval(np.polyfit(size, np.log(1 - values[:, 0]), 1), far)
    assert predicted["power_law"] == pytest.approx(1 - np.exp(error))
    assert predicted["log_line"] == pytest.approx(np.polyval(np.polyfit(size, values[:, 0], 1), far))


def test_a_fraction_stays_between_0_and_1():
    steep = Curve(BUDGETS, made(3).losses, np.linspace(0.3, 0.99, 5)[:, None].repeat(3, 1))
    assert forecast(steep, 800, chance=0.1).values["log_line"].value == 1.0


def test_the_interval_is_that_of_resampled_seeds():
    curve, target = made(4, noise=0.1), 400.0
    result = forecast(curve, target, chance=0.1, seed=7)
    drawn = np.random.default_rng(7).integers(4, size=(2000, 4))
    slow = []
    for seeds in drawn:
        losses = curve.losses[:, seeds].mean(1)
        values = curve.values[:, seeds].mean(1)
        loss = np.exp(np.polyval(np.polyfit(np.log(BUDGETS), np.log(losses), 1), np.log(target)))
        slow.append(np.polyval(np.polyfit(losses, values, 1), loss))
    one = result.values["flp"]
    assert (one.low, one.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))
    assert one.low < one.value < one.high
    assert result == forecast(curve, target, chance=0.1, seed=7)


def test_points_at_chance_are_left_out_of_the_line():
    budgets = np.array([20.0, 30.0, *BUDGETS])
    curve = made(budgets=budgets)
    values = curve.values.copy()
    values[:2] = 0.1  # before anything is learnt the metric does not follow the loss
    late = Curve(budgets, curve.losses, values)
    assert above_chance(late, 0.1).tolist() == [False, False, *[True] * 5]
    result = forecast(late, 800, chance=0.1)
    assert result.values["flp"].value == pytest.approx(0.9 - 0.2 * 8 * 800**-0.4)


@pytest.mark.parametrize(
    ("curve", "target", "words"),
    [
        (made(2), 400, "at least 3 seeds, got 2; use more seeds"),
        (made(budgets=BUDGETS[:3]), 200, "at least 4 sizes, got 3; start from more labels"),
        (made(), 820, "820 labels is 4.1 times the largest size run (200)"),
        (made(), 200, "ask for more than 1 and at most 4 times"),
        (with_loss(exponent=0.1), 400, "does not fall for sure with labels (exponent 0.100"),
        (with_loss(exponent=0.0), 400, "does not fall for sure with labels (exponent 0.000"),
        (with_loss(noise=0.8, exponent=-0.02), 400, "does not fall for sure"),
        (Curve(BUDGETS, made().losses, 0.7 + 0.2 * made().losses), 400, "does not rise as validation loss falls"),
        (Curve(BUDGETS, made().losses, np.full((5, 5), 0.12)), 400, "0 of 5 sizes are 5 points above chance (10.0%)"),
        (Curve(BUDGETS, made().losses, made().values - 0.48), 400, "3 of 5 sizes are 5 points above chance"),
    ],
)
def test_what_a_curve_does_not_allow_is_refused(curve, target, words):
    with pytest.raises(InputError) as refusal:
        forecast(curve, target, chance=0.1, over="labels")
    assert words in str(refusal.value)


def test_a_curve_without_the_metric_is_refused():
    values = made().values.copy()
    values[0, 0] = np.nan
    with pytest.raises(InputError, match="lacks this metric on validation"):
        Curve(BUDGETS, made().losses, values)


def test_curve_and_forecast_are_json():
    curve = made(noise=0.05)
    again = Curve.from_dict(json.loads(json.dumps(curve.to_dict())))
    np.testing.assert_array_equal(again.losses, curve.losses)
    content = json.loads(json.dumps(forecast(curve, 300, chance=0.1).to_dict()))
    assert forecast(again, 300, chance=0.1).to_dict() == content
