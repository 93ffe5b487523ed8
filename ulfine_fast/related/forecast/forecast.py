"""What a larger budget would bring, told from smaller runs: validation loss, then the figure; and three baselines.

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

LEAST_SIZES, LEAST_SEEDS = 4, 3
FURTHEST = 4.0
"""How many times the largest budget that was run may be asked for."""

FORECASTERS = {
    "flp": "by way of the loss",
    "last": "the last value carried on",
    "power_law": "a power law of the error",
    "log_line": "a line over the logarithm",
}
"""In words, for whoever reads a forecast."""

ABOVE_CHANCE = 0.05
_RESAMPLES = 2000
_LEAST_ERROR = 1e-3  # an error of zero has no logarithm


@dataclass(frozen=True)
class Curve:
    """Runs at S budgets with R seeds each.

    Attributes:
        budgets: ascending (S,), such as labelled images or steps.
        losses: validation loss (S, R), above zero.
        figures: validation accuracy of some kind (S, R), in [0, 1].

    Raises:
        InputError: a loss or figure that is none.
    """

    budgets: Floats
    losses: Floats
    figures: Floats

    def __post_init__(self) -> None:
        if not (np.isfinite(self.losses).all() and np.isfinite(self.figures).all()):
            raise InputError("a run has no such figure on validation; raise val_fraction or choose balanced_accuracy")

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {name: values.tolist() for name, values in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Curve:
        """The inverse of :meth:`to_dict`."""
        return cls(*(np.asarray(values[name], dtype=np.float64) for name in ("budgets", "losses", "figures")))


@dataclass(frozen=True)
class Estimate:
    """A value from the means over seeds, and the middle 95% of its values over resampled seeds."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Forecast:
    """What is expected at a budget; `dataclasses.asdict` makes JSON's types of it.

    Attributes:
        target: the budget.
        exponent: b of the loss's power law, below zero.
        loss: validation loss expected.
        figures: the figure expected, by "flp" and by each baseline: "last", "power_law", "log_line".
    """

    target: float
    exponent: Estimate
    loss: Estimate
    figures: dict[str, Estimate]


def forecast(curve: Curve, target: float, *, chance: float, over: str = "budget", seed: int = 0) -> Forecast:
    """Forecast the mean figure over seeds at a larger budget.

    Args:
        curve: at least 4 budgets with at least 3 seeds.
        target: the budget asked for, above the largest one and at most 4 times it.
        chance: what guessing would reach, 1 / K.
        over: name of the budget, for messages.
        seed: of the resampling.

    Raises:
        InputError: the curve does not allow it; one sentence says why.
    """
    _refuse_few(curve, over)
    _refuse_far(curve, target, over)
    used = above_chance(curve, chance)
    if used.sum() < LEAST_SIZES:
        raise InputError(
            f"{used.sum()} of {len(used)} sizes are {100 * ABOVE_CHANCE:g} points above chance ({100 * chance:.1f}%), "
            f"and a forecast needs {LEAST_SIZES}; start from more {over}"
        )
    found = predictions(_resampled(curve, seed), target, used)
    told = {name: _estimate(values) for name, values in found.items()}
    _refuse_trendless(told["exponent"], told.pop("slope"), over)
    return Forecast(float(target), told.pop("exponent"), told.pop("loss"), told)


def above_chance(curve: Curve, chance: float) -> NDArray[np.bool_]:
    """Budgets whose mean figure is five points above chance (S,)."""
    return np.asarray(curve.figures.mean(1) >= chance + ABOVE_CHANCE)


def predictions(curve: Curve, target: float, used: NDArray[np.bool_]) -> dict[str, Floats]:
    """Forecasts from each column of a curve by itself, without a word on whether they make sense.

    Args:
        curve: R columns, of seeds or of means over some.
        target: the budget asked for.
        used: budgets that the line from loss to figure is fitted on (S,).

    Returns:
        By name (R,): "flp"; "last", the last value carried on; "power_law", of the error over the budget; "log_line",
        the figure linear in the budget's logarithm; and of FLP: "loss", "exponent" and "slope" (w1).
    """
    size, far = np.log(curve.budgets)[:, None], float(np.log(target))
    power, exponent = _line(size, np.log(curve.losses))
    loss = np.exp(power + exponent * far)  # (R,)
    start, slope = _line(curve.losses[used], curve.figures[used])
    error, fall = _line(size, np.log(np.maximum(1 - curve.figures, _LEAST_ERROR)))
    level, rise = _line(size, curve.figures)
    figures = {
        "flp": start + slope * loss,
        "last": curve.figures[-1],
        "power_law": 1 - np.exp(error + fall * far),
        "log_line": level + rise * far,
    }
    shares = {name: np.clip(values, 0, 1) for name, values in figures.items()}
    return {**shares, "loss": loss, "exponent": exponent, "slope": slope}


def _line(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Intercept and slope (R,) of least squares through x (S, 1 or R) and y (S, R); flat where x does not vary."""
    middle, height = x.mean(0), y.mean(0)
    spread = ((x - middle) ** 2).sum(0)
    slope = np.divide(((x - middle) * (y - height)).sum(0), spread, out=np.zeros_like(height), where=spread > 0)
    return height - slope * middle, slope


def _resampled(curve: Curve, seed: int) -> Curve:
    """Means over seeds: of all in the first column, then of seeds drawn with replacement, the same at all budgets."""
    seeds = curve.losses.shape[1]
    drawn = np.random.default_rng(seed).integers(seeds, size=(_RESAMPLES, seeds))
    chosen = np.concatenate([np.arange(seeds)[None], drawn])  # (1 + B, R)
    return Curve(curve.budgets, curve.losses[:, chosen].mean(2), curve.figures[:, chosen].mean(2))


def _estimate(values: Floats) -> Estimate:
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return Estimate(float(values[0]), float(low), float(high))


def _refuse_few(curve: Curve, over: str) -> None:
    sizes, seeds = curve.losses.shape
    if seeds < LEAST_SEEDS:
        raise InputError(f"a forecast needs runs of at least {LEAST_SEEDS} seeds, got {seeds}; raise --refit-seeds")
    if sizes < LEAST_SIZES:
        raise InputError(f"a forecast needs at least {LEAST_SIZES} sizes, got {sizes}; start from more {over}")


def _refuse_far(curve: Curve, target: float, over: str) -> None:
    largest = float(curve.budgets[-1])
    # the product of a factor and a mean count may land a rounding error beyond
    if not largest < target <= FURTHEST * largest * (1 + 1e-9):
        raise InputError(
            f"{target:g} {over} is {target / largest:.3g} times the largest size run ({largest:g}); "
            f"ask for more than 1 and at most {FURTHEST:g} times"
        )


def _refuse_trendless(exponent: Estimate, slope: Estimate, over: str) -> None:
    """Refuse a loss of which resampled seeds do not agree that it falls, and a figure that does not follow it."""
    # rounding leaves an exponent of some 1e-17 where nothing changes
    if exponent.high > -1e-6:
        raise InputError(
            f"validation loss does not fall for sure with {over} (exponent {exponent.value:.3f}, 95% interval "
            f"{exponent.low:.3f} to {exponent.high:.3f}); add seeds, or take it that more will not help"
        )
    if slope.value >= 0:
        raise InputError(f"the figure does not rise as validation loss falls with {over}; choose another --metric")
