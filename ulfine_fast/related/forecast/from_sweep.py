"""A forecast for the best trial of a finished sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import one_of
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import Split, read_split
from ulfine_fast.engine.checkpoint import cache_fingerprint
from ulfine_fast.related.forecast.forecast import FURTHEST, LEAST_SEEDS, LEAST_SIZES, Curve, forecast
from ulfine_fast.related.forecast.growth import BUDGETS, SIZES, grow, view_count
from ulfine_fast.related.forecast.saved import FILE, read_forecast
from ulfine_fast.runs.run import Run
from ulfine_fast.runs.seeds import run_folders
from ulfine_fast.search.leaderboard import write_sealed_json
from ulfine_fast.search.objective import HIGHER_IS_BETTER
from ulfine_fast.search.plan import split_fingerprint
from ulfine_fast.search.saved import SavedSweep, read_sweep

if TYPE_CHECKING:
    from ulfine_fast.related.forecast import Budget

SEEDS = 5
"""Seeds of the runs where the sweep refit nothing."""


def forecast_sweep(
    folder: str | Path,
    cache: FeatureCache | str | Path | None = None,
    over: Budget = "labels",
    times: float = FURTHEST,
    *,
    seeds: int | None = None,
    split: Split | str | Path | None = None,
    device: str = "auto",
    engine: str = "auto",
    progress: bool | None = None,
) -> dict[str, Any]:
    """Forecast what the best trial of a finished sweep would reach with a larger budget.

    Fits the trial with fractions of its budget, with seeds that the search did not use, and writes the curve and the
    forecast, or why there is none, to `forecast.json` in the sweep's folder. A later call about the same runs takes
    the curve from there.

    Args:
        folder: of the sweep.
        cache: its features, or their folder; None for the cache that the refit's runs name.
        over: labels, views or steps.
        times: how many times the trial's own budget, above 1 and at most 4.
        seeds: how many; None for as many as the refit had, or 5.
        split: the one that the sweep was given, or its split.json; None for that of the refit's runs.
        device: see :func:`ulfine_fast.fit_many`.
        engine: see :func:`ulfine_fast.fit_many`.
        progress: draw a progress bar; None draws it where stderr is a terminal.

    Returns:
        The content of `forecast.json`: what was run, under "curve" the :class:`Curve`, under "forecast" the
        :class:`Forecast`, None where "refused" says why there is none.

    Raises:
        InputError: no finished sweep, another cache or split than the sweep's, or see :func:`check_forecast`.
    """
    # refuse what cannot work before a run
    saved = read_sweep(Path(folder))
    if seeds is None:
        seeds = len(saved.summary.best[0]["seeds"]) if saved.summary.best else SEEDS
    if not isinstance(cache, FeatureCache):
        cache = FeatureCache.open(_cache_path(saved) if cache is None else Path(cache))
    if cache_fingerprint(cache)[:16] != saved.summary.cache:
        raise InputError(f"the sweep in {folder} searched another cache; name that one with --cache")
    check_forecast(cache, over, times, seeds, saved.summary.metrics)
    if split is not None and saved.summary.split is None:
        raise InputError(f"the sweep in {folder} drew its splits from its settings; leave out --split")
    if split is None and saved.summary.split is not None:
        split = _refit_run(saved, "--split")
    if isinstance(split, str | Path):
        split = read_split(Path(split), cache.ids)
    if split_fingerprint(split) != saved.summary.split:
        raise InputError(f"the sweep in {folder} used another split; name its split.json with --split")

    # the curve: that of an earlier call about the same runs, or of new runs
    metric = saved.summary.metrics[0]
    fresh = [saved.summary.seed + saved.summary.seeds + i for i in range(seeds)]
    about = {"over": over, "metric": metric, "trial": saved.trial, "seeds": fresh, "sizes": list(SIZES)}
    content: dict[str, Any] = {
        "sweep": saved.summary.owner,
        **about,
        "times": times,
        "curve": None,
        "refused": None,
        "forecast": None,
    }
    try:
        curve = _earlier_curve(saved, about)
        if curve is None:
            configs = [FitConfig.from_dict({**saved.settings, "seed": seed}, saved=True) for seed in fresh]
            curves = grow(cache, configs, over, [metric], split=split, device=device, engine=engine, progress=progress)
            curve = curves[metric]
        content["curve"] = curve.to_dict()

        # the forecast
        target = times * float(curve.budgets[-1])
        content["forecast"] = forecast(curve, target, chance=1 / len(cache.class_names), over=over).to_dict()
    except InputError as error:  # that there is no forecast is a result too
        content["refused"] = str(error)
    return write_sealed_json(saved.folder / FILE, content)


def check_forecast(cache: FeatureCache, over: str, times: float, seeds: int, metrics: Sequence[str]) -> None:
    """Refuse what can be refused before a run.

    Raises:
        InputError: an unknown budget, a factor out of range, too few seeds or views, or a metric that is no accuracy.
    """
    if over not in BUDGETS:
        raise one_of("over", over, BUDGETS)
    if not 1 < times <= FURTHEST:
        raise InputError(f"times must be above 1 and at most {FURTHEST:g}, got {times:g}")
    if seeds < LEAST_SEEDS:
        raise InputError(f"a forecast needs runs of at least {LEAST_SEEDS} seeds, got {seeds}; use more seeds")
    if metrics and metrics[0] not in HIGHER_IS_BETTER:
        raise InputError(f"a forecast is of a metric of which more is better, got {metrics[0]}; sweep for accuracy")
    if over == "views" and view_count(cache) < LEAST_SIZES:
        raise InputError(
            f"a forecast over views needs {LEAST_SIZES} of each kind, this cache has {view_count(cache)}; "
            "extract with more --weak or --strong"
        )


def _cache_path(saved: SavedSweep) -> Path:
    """The cache that the refit's runs name."""
    path = Run.load(_refit_run(saved, "--cache")).cache_path
    if path is None:
        raise InputError(f"the sweep in {saved.folder} searched arrays in memory; name a cache with --cache")
    if not (path / "manifest.json").exists():
        raise InputError(f"{path} is no longer a cache; name the sweep's cache with --cache")
    return path


def _refit_run(saved: SavedSweep, option: str) -> Path:
    """The folder of a run that the sweep refit; `option` is what the user can give instead."""
    if not saved.summary.best:
        raise InputError(f"the sweep in {saved.folder} refit no trial whose run would say which to use; give {option}")
    return run_folders(saved.folder / saved.summary.best[0]["runs"], saved.summary.best[0]["seeds"])[0]


def _earlier_curve(saved: SavedSweep, about: dict[str, Any]) -> Curve | None:
    """The curve of an earlier call about the same runs; None where its file cannot be used."""
    try:
        earlier = read_forecast(saved.folder, saved.summary.owner)
    except (OSError, InputError):
        return None
    if earlier is None or earlier.curve is None or {name: getattr(earlier, name) for name in about} != about:
        return None
    curve = earlier.curve
    rows = [*curve.losses, *curve.figures]
    # ascending budgets, with a loss and a value of each seed
    if curve.budgets != sorted(curve.budgets) or {len(row) for row in rows} != {len(about["seeds"])}:
        return None
    if not len(curve.budgets) == len(curve.losses) == len(curve.figures):
        return None
    return Curve.from_dict(msgspec.to_builtins(curve))
