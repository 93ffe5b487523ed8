"""The connection to Ray: one machine's cores and GPUs, or those of many."""

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
        cpus: CPU cores that a task takes.
        gpus: GPUs that a task takes; with a fraction such as 0.5 two tasks use one together.
    """

    address: str = "local"
    cpus: float = 1
    gpus: float = 0


@contextmanager
def joined(workers: RayWorkers) -> Iterator[Any]:
    """The module `ray`, connected to a cluster; a cluster started here ends with the context.

    Raises:
        InputError: Ray is not installed, or its cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError('--ray needs Ray; install it with pip install "ulfine-fast[ray]"') from error
    started = not ray.is_initialized()
    if started:
        address = None if workers.address == "local" else workers.address
        try:
            ray.init(address=address, include_dashboard=None if address else False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"cannot reach Ray at {workers.address!r} ({reason}); start it with `ray start`"
            ) from error
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def result_of(ray: Any, reference: Any) -> Any:
    """What a task returned; an InputError of its worker is raised as if the work had run here."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from error
        raise
