"""`sweep`: hundreds of settings tried in trial batches, ranked on validation, the best refit and tested once."""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import write_error
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import Split
from ulfine_fast.engine.checkpoint import cache_fingerprint
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.runs.seeds import save_runs
from ulfine_fast.search.choices import Pruning, Sampler
from ulfine_fast.search.held_out import check_held_out_images
from ulfine_fast.search.leaderboard import write_best
from ulfine_fast.search.on_ray import RayWorkers, run_on_ray
from ulfine_fast.search.plan import Plan, check_options, check_search, default_batch, trial_count
from ulfine_fast.search.records import StudyBatch
from ulfine_fast.search.result import SweepResult, collect, sweep_folder, write_summary
from ulfine_fast.search.samplers import quiet_optuna
from ulfine_fast.search.saved import Summary, earlier_summary
from ulfine_fast.search.space import Space, default_space, parse_space, read_space
from ulfine_fast.search.storage import database_url, storage_failures
from ulfine_fast.search.study import SweepStudy
from ulfine_fast.search.trial_batches import CHECKPOINTS, missing_batches, run_batch

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
    sampler: Sampler = "tpe",
    batch: int | None = None,
    pruning: Pruning = "none",
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

    Called again with the same folder it continues: finished trials are never run again, a batch that was interrupted
    continues from its last evaluation, and a larger `trials` adds to what is there.

    Args:
        cache: features.
        space: what may be tried: a :class:`Space`, entries by setting, or a TOML file; None takes the one that ships
            for the method of `settings` (by default that of :class:`FitConfig`).
        out: folder of the results.
        trials: how many in all, at least 1.
        settings: further values that hold for every trial.
        metrics: validation metrics; several search for trials that no other beats in all of them.
        seeds: runs that a trial is averaged over, in the same batch.
        seed: the first of them, and the search's own.
        sampler: tpe, random, grid, cmaes or qmc.
        batch: trials proposed and trained together; None for 64 where the sampler learns or Ray is used, else all.
        pruning: none, halving or hyperband.
        refit: how many of the best are refit; 0 leaves the test split unread.
        refit_seeds: seeds of each refit, from `seed + seeds` on.
        storage: URL of the study's database; None for a SQLite file in `out`.
        study: its name in that database; None for "sweep" in a file of its own, else the folder's name.
        split: use this split for every trial.
        device: see :func:`ulfine_fast.fit_many`.
        engine: see :func:`ulfine_fast.fit_many`.
        ray: run trial batches on Ray.
        progress: draw a progress bar; None draws it where stderr is a terminal.
        forecast: deprecated; call :func:`ulfine_fast.related.forecast.from_sweep.forecast_sweep` with the folder.
        forecast_times: deprecated, as `forecast`.

    Raises:
        InputError: options out of range, a folder or study of another sweep, or no trial that is complete.
    """
    # refuse what cannot work before a folder is made
    check_options(
        trials=trials,
        seeds=seeds,
        batch=batch,
        refit=refit,
        refit_seeds=refit_seeds,
        device=device,
        engine=engine,
    )
    if forecast is not None:
        warnings.warn("sweep(forecast=...) is deprecated; use forecast_sweep", DeprecationWarning, stacklevel=2)
        # by name and only for this release: search does not depend on related systems
        from_sweep = importlib.import_module("ulfine_fast.related.forecast.from_sweep")
        from_sweep.check_forecast(cache, forecast, forecast_times, refit_seeds, metrics)
    searched = _read_space(space, settings)
    checked_metrics = check_search(searched, sampler, tuple(metrics), pruning)

    folder = Path(out)
    total = trial_count(searched, sampler, trials)
    plan = Plan(
        space=searched,
        metrics=checked_metrics,
        sampler=sampler,
        pruning=pruning,
        trials=total,
        batch=batch or default_batch(sampler, total, seeds, cache, ray is not None),
        seeds=seeds,
        seed=seed,
        out=folder.resolve(),
        owner=sweep_folder(folder),
        storage=storage or database_url(folder.resolve()),
        # in a database of its own the name is always the same, so that the folder may be moved
        study=study or (folder.resolve().name if storage else "sweep"),
        cache=cache_fingerprint(cache)[:16],
        split=split,
        device=device,
        engine=engine,
    )

    try:
        with _locked(plan.out), quiet_optuna(), storage_failures(plan.storage):
            # what is there, checked before hours are spent
            earlier = earlier_summary(plan.out)
            with contextlib.closing(SweepStudy.open(plan)) as opened:
                opened.refuse_changes(earlier)
                left_out = check_held_out_images(plan, cache)

                # the trials, then the refits
                _run_batches(plan, cache, opened, missing_batches(opened, plan), ray, progress)
                result = collect(opened, plan)
                result.warnings = [*result.warnings, *left_out]
                _refit(result, plan, cache, refit, refit_seeds, earlier, progress)
            # the folder of checkpoints goes once none is left in it
            with contextlib.suppress(OSError):
                (plan.out / CHECKPOINTS).rmdir()
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("interrupted; the same command goes on from here") from stop

    if forecast is not None:
        result.forecast = from_sweep.forecast_sweep(
            plan.out,
            cache,
            over=forecast,
            times=forecast_times,
            seeds=refit_seeds,
            split=split,
            device=device,
            engine=engine,
            progress=progress,
        )
    return result


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder for one sweep: two would each take the trials that the other trains for those of a dead one.

    Raises:
        InputError: another sweep is at work there, or the lock cannot be written.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another sweep is at work in {folder}; wait for it or name another folder") from error
    except OSError as error:
        raise write_error(folder / ".lock", error) from error
    try:
        yield
    finally:
        lock.release()


def _read_space(space: Space | Mapping[str, Any] | str | Path | None, settings: Mapping[str, Any] | None) -> Space:
    """The space, its method named, so that what is saved of it means the same whatever the default is."""
    if isinstance(space, Space):
        if settings:
            raise InputError("settings cannot be added to a Space; give its entries as a dictionary instead")
    elif space is None:
        space = default_space((settings or {}).get("method", FitConfig.method), settings)
    else:
        space = parse_space(space, settings) if isinstance(space, Mapping) else read_space(Path(space), settings)
    if "method" in space.fixed or "method" in space.searched:
        return space
    return replace(space, fixed={**space.fixed, "method": FitConfig.method})


def _run_batches(
    plan: Plan,
    cache: FeatureCache,
    study: SweepStudy,
    batches: Sequence[StudyBatch],
    ray: RayWorkers | None,
    progress: bool | None,
) -> None:
    """Run the batches, here one after another or on Ray's workers."""
    if not batches:
        return
    trials = sum(batch.size for batch in batches)
    with progress_bar(progress) as bar:
        if ray is not None:
            task = bar.add_task("sweep", total=trials, unit="trials", note=f"{len(batches)} trial batches")
            run_on_ray(ray, plan, cache, batches, functools.partial(bar.advance, task))
            return
        trial_steps = plan.seeds * _most_steps(plan.space)
        task = bar.add_task("sweep", total=trials * trial_steps, unit="trial-steps", note=f"{trials} trials")
        done = 0
        for batch in batches:
            run_batch(plan, cache, batch, study, functools.partial(bar.advance, task))
            # pruned trials and closed-form methods take fewer steps than were counted
            done += batch.size * trial_steps
            bar.update(task, completed=done)


def _most_steps(space: Space) -> int:
    """The most steps that a trial of the space may take."""
    steps = space.searched.get("steps")
    if isinstance(steps, tuple):
        return max(int(value) for value in steps)
    if steps is not None:
        return int(steps.high)
    params = {name: entry[0] if isinstance(entry, tuple) else entry.low for name, entry in space.searched.items()}
    return space.config(params, 0).steps


def _refit(
    result: SweepResult,
    plan: Plan,
    cache: FeatureCache,
    count: int,
    seeds: int,
    earlier: Summary | None,
    progress: bool | None,
) -> None:
    """Refit the best with seeds that the search did not use and read the test split, unless that has been done."""
    best = result.leaderboard[:count]
    fresh = [plan.seed + plan.seeds + i for i in range(seeds)]

    # nothing to fit, or the same trials and seeds as in an earlier call
    refits: list[dict[str, Any]] = [] if earlier is None else [{**refit} for refit in earlier.best]
    test_reads = 0 if earlier is None else earlier.test_reads
    same = [(refit["trial"], refit["seeds"]) for refit in refits] == [(trial.trial, fresh) for trial in best]
    if same or not best:
        result.best = refits if same else []
        write_best(plan.out, result.leaderboard, count)
        write_summary(result, plan, test_reads)
        return

    # the earlier refits stay until the new ones are there
    if earlier is not None:
        result.best = refits
        write_summary(result, plan, test_reads)

    # fit all of them together
    runs = fit_many(
        cache,
        [plan.space.config(trial.params, seed) for trial in best for seed in fresh],
        split=plan.split,
        device=plan.device,
        engine=plan.engine,
        progress=progress,
        # as in the search, validation images are held out
        cross_validate=False,
        # named after its trials: an interrupted refit may be of others than those that are best now
        checkpoint=plan.out / CHECKPOINTS / "-".join(["refit", *(str(trial.trial) for trial in best)]),
    )

    # save the runs of each trial in a folder of its own
    result.best = []
    write_best(plan.out, result.leaderboard, count)
    for i, trial in enumerate(best):
        name = f"best-{trial.rank}"
        result.best.append(
            {
                "rank": trial.rank,
                "trial": trial.trial,
                "seeds": fresh,
                "settings": f"{name}.toml",
                "runs": name,
                "test": save_runs(runs[i * seeds : (i + 1) * seeds], plan.out / name),
            }
        )
    write_summary(result, plan, test_reads + 1)
