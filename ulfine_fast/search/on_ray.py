"""Trial batches of a sweep on Ray: several GPUs of a machine, or several machines, one batch a worker at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ulfine_fast.cache.io.ray_cluster import RayWorkers, joined, result_of
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.search.samplers import quiet_optuna
from ulfine_fast.search.storage import storage_failures
from ulfine_fast.search.study import SweepStudy
from ulfine_fast.search.trial_batches import run_batch

if TYPE_CHECKING:
    from ulfine_fast.search.plan import Plan
    from ulfine_fast.search.records import StudyBatch


def run_on_ray(
    workers: RayWorkers,
    plan: Plan,
    cache: FeatureCache,
    batches: Sequence[StudyBatch],
    finished: Callable[[int], None],
) -> None:
    """Run every batch on some worker.

    A worker that dies, or whose machine does, loses only its batch: Ray gives that batch to another worker, which finds
    the trials in the study and continues from the last evaluation saved in the sweep's folder, where it can see it.

    Args:
        workers: where to run.
        plan: the sweep's; its folder, storage and the cache must be reachable from every machine.
        cache: its features, opened again by path on each worker, or sent where they are in memory.
        batches: what to run.
        finished: called with the number of trials of each batch that is done.

    Raises:
        InputError: Ray is not installed, its cluster cannot be reached, or a worker refused its input.
    """
    with joined(workers) as ray:
        # sent once, not with every batch
        features = ray.put(cache if cache.path is None else str(cache.path.resolve()))
        # a machine may die any number of times: every batch continues as it was left
        task = ray.remote(run_remotely).options(num_cpus=workers.cpus, num_gpus=workers.gpus, max_retries=-1)
        pending = [task.remote(plan, features, batch) for batch in batches]
        while pending:
            done, pending = ray.wait(pending)
            finished(int(result_of(ray, done[0])))


def run_remotely(plan: Plan, cache: FeatureCache | str, batch: StudyBatch) -> int:
    """Run one batch on a worker; returns how many trials it recorded."""
    with quiet_optuna(), storage_failures(plan.storage), contextlib.closing(SweepStudy.open(plan)) as study:
        return run_batch(plan, FeatureCache.open(cache) if isinstance(cache, str) else cache, batch, study)
