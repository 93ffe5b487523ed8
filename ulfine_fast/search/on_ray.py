"""Passes of a sweep on Ray: several GPUs of a machine, or several machines, one pass a worker at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ulfine_fast.cache.io.ray_cluster import RayWorkers, joined, result_of
from ulfine_fast.search.plan import Plan
from ulfine_fast.search.study import Share

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache


def run_on_ray(
    workers: RayWorkers, plan: Plan, cache: FeatureCache, shares: Sequence[Share], told: Callable[[int], None]
) -> None:
    """Run every pass on some worker.

    A worker that dies, or whose machine does, loses only its pass: Ray gives that pass to another worker, which finds
    the trials in the study and goes on from the last evaluation saved in the sweep's folder, where it can see it.

    Args:
        workers: where.
        plan: the sweep's; its folder, storage and the cache must be within reach of every machine.
        cache: its features, opened again by path on each worker, or sent where they are in memory.
        shares: the passes.
        told: called with the number of trials of each pass that is done.

    Raises:
        InputError: Ray is not installed or its cluster cannot be reached, or what a worker refused.
    """
    with joined(workers) as ray:
        # sent once, not with every pass
        given = ray.put(cache if cache.path is None else str(cache.path.resolve()))
        # a machine may die any number of times: every pass is found as it was left
        task = ray.remote(run_remotely).options(num_cpus=workers.cpus, num_gpus=workers.gpus, max_retries=-1)
        pending = [task.remote(plan, given, share) for share in shares]
        while pending:
            done, pending = ray.wait(pending)
            told(int(result_of(ray, done[0])))


def run_remotely(plan: Plan, cache: FeatureCache | str, share: Share) -> int:
    """Run one pass on a worker; returns how many trials it told."""
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.search.samplers import quiet_optuna
    from ulfine_fast.search.trial_batches import run_share

    with quiet_optuna():
        return run_share(plan, FeatureCache.open(cache) if isinstance(cache, str) else cache, share)
