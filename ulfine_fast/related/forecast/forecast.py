"""Extrapolation from smaller to larger budgets: validation loss first, then the metric; and three baselines.

SOURCE: FLP, arXiv 2410.08527, reconstructed: log L = a + b log C over the budget C, then P = w0 + w1 L on the points
that are five points above chance.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import InputError

Floats = NDArray[np.float64]

LEAST_SIZES = 4
LEAST_SEEDS = 3
FURTHEST = 4.0
"""How many times the largest budget that was run a forecast may be for."""

FORECASTERS = {
    "flp": "by way of the loss",
    "last": "the last value carried on",
    "power_law": "a power law of the error",
    "log_line": "a line over the logarithm",
}
"""The forecasters in words."""

ABOVE_CHANCE = 0.05
_RESAMPLES = 2000
_LEAST_ERROR = 1e-3  # an error of zero has no logarithm


@dataclass(frozen=True)
class Curve:
    """Runs at S budgets with R seeds each.

    Attributes:
        budgets: ascending (S,), such as labelled images or steps.
        losses: validation loss (S, R), above zero.
        values: the metric on validation (S, R), in [0, 1].

    Raises:
        InputError: a loss or value that is not finite.
    """

    budgets: Floats
    losses: Floats
    values: Floats

    def __post_init__(self) -> None:
        if not (np.isfinite(self.losses).all() and np.isfinite(self.values).all()):
            raise InputError("a run lacks this metric on validation; raise val_fraction or choose balanced_accuracy")

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "budgets": self.budgets.tolist(),
            "losses": self.losses.tolist(),
            "figures": self.values.tolist(),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Curve:
        """The inverse of :meth:`to_dict`."""
        return cls(
            budgets=np.asarray(content["budgets"], dtype=np.float64),
            losses=np.asarray(content["losses"], dtype=np.float64),
            values=np.asarray(content["figures"], dtype=np.float64),
        )


@dataclass(frozen=True)
class Estimate:
    """A value from the means over seeds, and the middle 95% of its values over resampled seeds."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Forecast:
    """What is expected at a budget.

    Attributes:
        target: the budget.
        exponent: b of the loss's power law, below zero.
        loss: validation loss expected.
        values: the metric expected, by "flp" and by each baseline: "last", "power_law", "log_line".
    """

    target: float
    exponent: Estimate
    loss: Estimate
    values: dict[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "target": self.target,
            "exponent": asdict(self.exponent),
            "loss": asdict(self.loss),
            "figures": {name: asdict(estimate) for name, estimate in self.values.items()},
        }


def forecast(curve: Curve, target: float, *, chance: float, over: str = "budget", seed: int = 0) -> Forecast:
    """Forecast the mean of a metric over seeds at a larger budget.

    Args:
        curve: at least 4 budgets with at least 3 seeds.
        target: the budget of the forecast, above the largest one of the curve and at most 4 times it.
        chance: what guessing would reach, 1 / K.
        over: name of the budget, for messages.
        seed: of the resampling.

    Raises:
        InputError: the curve does not allow a forecast; one sentence says why.
    """
    # too few or too small runs
    sizes, seeds = curve.losses.shape
    if seeds < LEAST_SEEDS:
        raise InputError(f"a forecast needs runs of at least {LEAST_SEEDS} seeds, got {seeds}; use more seeds")
    if sizes < LEAST_SIZES:
        raise InputError(f"a forecast needs at least {LEAST_SIZES} sizes, got {sizes}; start from more {over}")
    largest = float(curve.budgets[-1])
    # the product of a factor and a mean count may exceed the limit by a rounding error
    if not largest < target <= FURTHEST * largest * (1 + 1e-9):
        raise InputError(
            f"{target:g} {over} is {target / largest:.3g} times the largest size run ({largest:g}); "
            f"ask for more than 1 and at most {FURTHEST:g} times"
        )
    used = above_chance(curve, chance)
    if used.sum() < LEAST_SIZES:
        raise InputError(
            f"{used.sum()} of {len(used)} sizes are {100 * ABOVE_CHANCE:g} points above chance ({100 * chance:.1f}%), "
            f"and a forecast needs {LEAST_SIZES}; start from more {over}"
        )

    # means over all seeds in the first column, then over seeds drawn with replacement, the same at all budgets
    drawn = np.random.default_rng(seed).integers(seeds, size=(_RESAMPLES, seeds))
    chosen = np.concatenate([np.arange(seeds)[None], drawn])  # (1 + B, R)
    means = Curve(curve.budgets, curve.losses[:, chosen].mean(2), curve.values[:, chosen].mean(2))
    estimates = {}
    for name, column in predictions(means, target, used).items():
        low, high = np.quantile(column[1:], (0.025, 0.975))
        estimates[name] = Estimate(float(column[0]), float(low), float(high))

    # a loss that does not fall in all resampled seeds, or a metric that does not follow it
    exponent = estimates.pop("exponent")
    loss = estimates.pop("loss")
    slope = estimates.pop("slope")
    # rounding leaves an exponent of about 1e-17 where nothing changes
    if exponent.high > -1e-6:
        raise InputError(
            f"validation loss does not fall for sure with {over} (exponent {exponent.value:.3f}, 95% interval "
            f"{exponent.low:.3f} to {exponent.high:.3f}); add seeds, or expect no gain from more {over}"
        )
    if slope.value >= 0:
        raise InputError(f"the metric does not rise as validation loss falls with {over}; choose another metric")
    return Forecast(target=float(target), exponent=exponent, loss=loss, values=estimates)


def above_chance(curve: Curve, chance: float) -> NDArray[np.bool_]:
    """Budgets at which the metric's mean is five points above chance (S,)."""
    return np.asarray(curve.values.mean(1) >= chance + ABOVE_CHANCE)


def predictions(curve: Curve, target: float, used: NDArray[np.bool_]) -> dict[str, Floats]:
    """Forecasts from each column of a curve separately, without a check that they make sense.

    Args:
        curve: R columns, each of a seed or of means over seeds.
        target: the budget of the forecast.
        used: budgets that the line from loss to metric is fitted on (S,).

    Returns:
        By name (R,): "flp"; "last", the last value carried on; "power_law", of the error over the budget; "log_line",
        the metric linear in the budget's logarithm; and of FLP: "loss", "exponent" and "slope" (w1).
    """
    log_budgets = np.log(curve.budgets)[:, None]
    log_target = float(np.log(target))
    # FLP: a power law of the loss, then a line from loss to metric
    loss_intercept, exponent = _fit_line(log_budgets, np.log(curve.losses))
    loss = np.exp(loss_intercept + exponent * log_target)  # (R,)
    intercept, slope = _fit_line(curve.losses[used], curve.values[used])
    # baselines
    error_intercept, error_exponent = _fit_line(log_budgets, np.log(np.maximum(1 - curve.values, _LEAST_ERROR)))
    value_intercept, value_slope = _fit_line(log_budgets, curve.values)
    values = {
        "flp": intercept + slope * loss,
        "last": curve.values[-1],
        "power_law": 1 - np.exp(error_intercept + error_exponent * log_target),
        "log_line": value_intercept + value_slope * log_target,
    }
    clipped = {name: np.clip(column, 0, 1) for name, column in values.items()}
    return {**clipped, "loss": loss, "exponent": exponent, "slope": slope}


def _fit_line(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Intercept and slope (R,) of least squares through x (S, 1 or R) and y (S, R); flat where x does not vary."""
    x_mean = x.mean(0)
    y_mean = y.mean(0)
    spread = ((x - x_mean) ** 2).sum(0)
    slope = np.divide(((x - x_mean) * (y - y_mean)).sum(0), spread, out=np.zeros_like(y_mean), where=spread > 0)
    return y_mean - slope * x_mean, slope
