"""`sweep`: hundreds of settings tried in batched passes, ranked on validation, the best refit and tested once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.data.splits import Split
from ulfine_fast.engine.checkpoint import cache_fingerprint
from ulfine_fast.related.forecast.growth import check_forecast, forecast_best
from ulfine_fast.search.leaderboard import Place, write_best
from ulfine_fast.search.on_ray import RayWorkers, run_on_ray
from ulfine_fast.search.plan import Plan, check_numbers, check_place, check_search, default_batch, wanted_trials
from ulfine_fast.search.result import (
    DATABASE,
    SweepResult,
    collect,
    earlier_refits,
    sweep_folder,
    write_summary,
)
from ulfine_fast.search.samplers import quiet_optuna
from ulfine_fast.search.space import Space, default_space, parse_space, read_space
from ulfine_fast.search.study import Ledger, Share
from ulfine_fast.search.trial_batches import CHECKPOINTS, plan_shares, run_share

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache


def sweep(
    cache: FeatureCache,
    space: Space | Mapping[str, Any] | str | Path | None = None,
    *,
    out: str | Path,
    trials: int = 512,
    settings: Mapping[str, Any] | None = None,
    metrics: Sequence[str] = ("balanced_accuracy",),
    seeds: int = 1,
    seed: int = 0,
    sampler: str = "tpe",
    batch: int | None = None,
    pruning: str = "none",
    refit: int = 1,
    refit_seeds: int = 5,
    storage: str | None = None,
    study: str | None = None,
    split: Split | None = None,
    device: str = "auto",
    engine: str = "auto",
    ray: RayWorkers | None = None,
    progress: bool | None = None,
    forecast: str | None = None,
    forecast_times: float = 4.0,
) -> SweepResult:
    """Search for settings on validation, refit the best with fresh seeds and read the test split once.

    Called again with the same folder it goes on where it was: finished trials are never run again, a pass under way
    continues from its last evaluation, and a larger `trials` adds to what is there.

    Args:
        cache: features.
        space: what may be tried: a :class:`Space`, entries by field, or a TOML file; None takes the one that ships for
            the method of `settings` (ulfine by default).
        out: folder of the results.
        trials: how many in all, at least 1.
        settings: further values that hold for every trial.
        metrics: validation figures; several make a search for trials that no other beats in all of them.
        seeds: runs that a trial is averaged over, in the same pass.
        seed: the first of them, and the search's own.
        sampler: tpe, random, grid, cmaes or qmc.
        batch: trials asked and told together; None for 64 where the sampler learns or Ray is used, else all.
        pruning: none, halving or hyperband.
        refit: how many of the best are refit; 0 leaves the test split unread.
        refit_seeds: seeds of each refit, from `seed + seeds` on.
        storage: URL of the study's database; None for a SQLite file in `out`.
        study: its name there; None for "sweep" in a file of its own, else the folder's.
        split: use this split for every trial.
        device: see :func:`ulfine_fast.fit_many`.
        engine: likewise.
        ray: run passes on Ray.
        progress: draw a progress bar; None draws it where stderr is a terminal.
        forecast: labels, views or steps: also say what the best trial would reach with more of them, from runs with
            fewer, of the refit's seeds; see :mod:`ulfine_fast.related.forecast.forecast`.
        forecast_times: how many times as many, above 1 and at most 4.

    Raises:
        InputError: settings that mean nothing, a folder or study of another sweep, or no trial that finished.
    """
    # everything that can be refused is, before a folder is made
    check_numbers(trials, seeds, batch, refit, refit_seeds)
    check_place(device, engine)
    if forecast is not None:
        check_forecast(cache, forecast, forecast_times, refit_seeds, metrics)
    known = _space(space, settings)
    wanted = check_search(known, sampler, tuple(metrics), pruning)
    folder, total = Path(out), wanted_trials(known, sampler, trials)
    plan = Plan(
        space=known,
        metrics=wanted,
        sampler=sampler,
        pruning=pruning,
        trials=total,
        batch=batch or default_batch(sampler, total, seeds, cache, ray is not None),
        seeds=seeds,
        seed=seed,
        out=folder.resolve(),
        owner=sweep_folder(folder),
        storage=storage or f"sqlite:///{folder.resolve() / DATABASE}",
        # in a database of its own the name is always the same, so that the folder may be moved
        study=study or (folder.resolve().name if storage else "sweep"),
        cache=cache_fingerprint(cache)[:16],
        split=split,
        device=device,
        engine=engine,
    )
    result = _run(plan, cache, ray, refit, refit_seeds, progress)
    if forecast is not None:
        fresh = [seed + seeds + i for i in range(refit_seeds)]
        first = result.leaderboard[0]
        result.forecast = forecast_best(first, plan, cache, fresh, forecast, forecast_times, progress)
    return result


def _space(space: Space | Mapping[str, Any] | str | Path | None, settings: Mapping[str, Any] | None) -> Space:
    if isinstance(space, Space):
        if settings:
            raise InputError("settings belong into a Space that is given as one; give its entries as a dictionary")
        return space
    if space is None:
        return default_space((settings or {}).get("method", "ulfine"), settings)
    return parse_space(space, settings) if isinstance(space, Mapping) else read_space(Path(space), settings)


def _run(
    plan: Plan, cache: FeatureCache, ray: RayWorkers | None, refit: int, refit_seeds: int, progress: bool | None
) -> SweepResult:
    """Run what is missing, then write the results and refit."""
    from filelock import FileLock, Timeout

    try:
        # two processes would take each other's trials under way for those of a dead one
        with FileLock(plan.out / ".lock", timeout=0), quiet_optuna():
            ledger = Ledger.open(plan)
            shares = plan_shares(ledger, plan)
            _run_shares(plan, cache, ledger, shares, ray, progress)
            result = collect(ledger, plan)
            _refit(result, plan, cache, refit, refit_seeds)
            _tidy(plan.out)
            return result
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("interrupted; the same command goes on from here") from stop
    except Timeout as error:
        raise InputError(f"another sweep is at work in {plan.out}; wait for it or name another folder") from error


def _tidy(out: Path) -> None:
    """Take away the folder of checkpoints once none is left in it."""
    with contextlib.suppress(OSError):
        (out / CHECKPOINTS).rmdir()


def _run_shares(
    plan: Plan,
    cache: FeatureCache,
    ledger: Ledger,
    shares: Sequence[Share],
    ray: RayWorkers | None,
    progress: bool | None,
) -> None:
    """Run the passes, here one after another or on Ray's workers."""
    trials = sum(share.size for share in shares)
    if not shares:
        return
    with progress_bar(progress) as bar:
        if ray is not None:
            task = bar.add_task("sweep", total=trials, unit="trials", note=f"{len(shares)} passes")
            run_on_ray(ray, plan, cache, shares, lambda told: bar.advance(task, told))
            return
        steps = plan.seeds * _steps(plan.space)
        task = bar.add_task("sweep", total=trials * steps, unit="trial-steps", note=f"{trials} trials")
        done = 0
        for share in shares:
            run_share(plan, cache, share, ledger, _advance(bar, task))
            # pruned trials and closed forms take fewer steps than were reckoned with
            done += share.size * steps
            bar.update(task, completed=done)


def _advance(bar: Any, task: Any) -> Callable[[int], None]:
    return lambda steps: bar.advance(task, steps)


def _steps(space: Space) -> int:
    """The most steps a trial may take."""
    entry = space.searched.get("steps")
    if isinstance(entry, tuple):
        return max(int(value) for value in entry)
    return int(entry.high) if entry is not None else space.config(_any_params(space), 0).steps


def _any_params(space: Space) -> dict[str, Any]:
    return {name: entry[0] if isinstance(entry, tuple) else entry.low for name, entry in space.searched.items()}


def _refit(result: SweepResult, plan: Plan, cache: FeatureCache, count: int, seeds: int) -> None:
    """Refit the best with seeds that the search did not use and read the test split, unless that has been done."""
    places = result.leaderboard[:count]
    write_best(plan.out, result.leaderboard, count)
    fresh = [plan.seed + plan.seeds + i for i in range(seeds)]
    found, reads = earlier_refits(plan.out)
    if [(one["trial"], one["seeds"]) for one in found] == [(place.trial, fresh) for place in places]:
        result.best = found
    else:
        result.best = _refit_anew(places, fresh, plan, cache)
        reads += 1
    write_summary(result, plan, reads)


def _refit_anew(places: Sequence[Place], seeds: list[int], plan: Plan, cache: FeatureCache) -> list[dict[str, Any]]:
    """Fit and save the runs of the best; what is known of each."""
    from ulfine_fast.engine.fit import fit_many
    from ulfine_fast.runs.seeds import save_runs

    runs = fit_many(
        cache,
        [plan.space.config(place.params, seed) for place in places for seed in seeds],
        split=plan.split,
        device=plan.device,
        engine=plan.engine,
        progress=False,
        # named after its trials: a refit that died may be of others than those which are best by now
        checkpoint=plan.out / CHECKPOINTS / "-".join(["refit", *(str(place.trial) for place in places)]),
    )
    groups = [runs[i : i + len(seeds)] for i in range(0, len(runs), len(seeds))]
    tests = [save_runs(group, plan.out / f"best-{place.rank}") for place, group in zip(places, groups, strict=True)]
    return [_refit_row(place, seeds, test) for place, test in zip(places, tests, strict=True)]


def _refit_row(place: Place, seeds: list[int], test: dict[str, Any]) -> dict[str, Any]:
    name = f"best-{place.rank}"
    return {
        "rank": place.rank,
        "trial": place.trial,
        "seeds": seeds,
        "settings": f"{name}.toml",
        "runs": name,
        "test": test,
    }
