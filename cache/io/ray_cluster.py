"""Joining Ray: one machine's cores and GPUs, or those of many."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ulfine_fast.cache.io.errors import InputError


@dataclass(frozen=True, slots=True)
class RayWorkers:
    """Where work runs.

    Attributes:
        address: "local" starts Ray on this machine, "auto" joins the cluster this machine is part of, else an address.
        cpus: CPU cores that a piece of work takes.
        gpus: GPUs it takes; a share such as 0.5 lets two pieces have one.
    """

    address: str = "local"
    cpus: float = 1
    gpus: float = 0


@contextmanager
def joined(workers: RayWorkers) -> Iterator[Any]:
    """The module `ray`, connected; what was started for this ends with it.

    Raises:
        InputError: Ray is not installed, or its cluster cannot be reached.
    """
    ray = _ray()
    ours = _join(ray, workers)
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def result_of(ray: Any, reference: Any) -> Any:
    """What a worker returned; its refusal as it would have been here."""
    try:
        return ray.get(reference)
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
    """Join Ray; whether it was started for this and ends with it."""
    if ray.is_initialized():
        return False
    address = None if workers.address == "local" else workers.address
    try:
        ray.init(address=address, include_dashboard=None if address else False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot reach Ray at {workers.address!r} ({reason}); start it with `ray start`") from error
    return True
