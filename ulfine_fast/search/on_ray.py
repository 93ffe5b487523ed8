"""Passes of a sweep on Ray: several GPUs of a machine, or several machines, one pass a worker at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ulfine_fast.cache.errors import InputError
from ulfine_fast.search.ledger import Share
from ulfine_fast.search.plan import Plan

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache


@dataclass(frozen=True, slots=True)
class RayWorkers:
    """Where passes run.

    Attributes:
        address: "local" starts Ray on this machine, "auto" joins the cluster this machine is part of, else an address.
        cpus: CPU cores a pass takes. gpus: GPUs it takes; a share such as 0.5 lets two passes have one.
    """

    address: str = "local"
    cpus: float = 1
    gpus: float = 0


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
    ray = _ray()
    ours = _join(ray, workers)
    # sent once, not with every pass
    try:
        given = ray.put(cache if cache.path is None else str(cache.path.resolve()))
        # a machine may die any number of times: every pass is found as it was left
        task = ray.remote(run_remotely).options(num_cpus=workers.cpus, num_gpus=workers.gpus, max_retries=-1)
        pending = [task.remote(plan, given, share) for share in shares]
        while pending:
            done, pending = ray.wait(pending)
            told(_result(ray, done[0]))
    finally:
        if ours:
            ray.shutdown()


def run_remotely(plan: Plan, cache: FeatureCache | str, share: Share) -> int:
    """Run one pass on a worker; returns how many trials it told."""
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.search.passes import run_share
    from ulfine_fast.search.samplers import quiet_optuna

    with quiet_optuna():
        return run_share(plan, FeatureCache.open(cache) if isinstance(cache, str) else cache, share)


def _result(ray: Any, reference: Any) -> int:
    """What a worker told; its refusal as it would have been here."""
    try:
        return int(ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from error
        raise


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError('--ray needs Ray; install it with pip install "ulfine-fast[ray]"') from error
    return ray


def _join(ray: Any, workers: RayWorkers) -> bool:
    """Join Ray; whether it was started for this sweep and ends with it."""
    if ray.is_initialized():
        return False
    address = None if workers.address == "local" else workers.address
    try:
        ray.init(address=address, include_dashboard=None if address else False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot reach Ray at {workers.address!r} ({reason}); start it with `ray start`") from error
    return True
