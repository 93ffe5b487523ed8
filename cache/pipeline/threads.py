"""Threads that compute on one core each, so that results do not depend on the machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from ulfine_fast.cache.io.prefetch import prefetch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_AHEAD = 2  # items beyond one a thread, so that no core waits for the caller to take a result


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_core() -> Iterator[None]:
    """Torch computes on the calling thread alone, so that sums run in one order whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def map_on_cores(
    work: Callable[[_Item], _Result], items: Iterable[_Item], threads: int
) -> Generator[_Result, None, None]:
    """`map` over threads that compute on one core each; a few items ahead, results in the order of the items.

    Decoding, resizing and PyTorch release the interpreter's lock, so threads keep the cores busy, and nothing has to
    travel between processes. A thread that does all of a batch never waits inside an operation, and the threads divide
    themselves between decoding and encoding as the images need it.

    Args:
        work: what to do with an item; called from several threads together.
        items: drawn from the caller's thread, at most `threads` + 2 ahead of what was yielded.
        threads: how many; 0 does the work in the caller's thread.

    Yields:
        Results in the order of the items; the first error of `work` is raised at its item's turn.
    """
    # The number of cores is a setting of each thread, and the default of later threads: the caller's is restored.
    with one_core():
        one_each = partial(torch.set_num_threads, 1)
        yield from prefetch(work, items, threads=threads, in_hand=threads + _AHEAD, initializer=one_each)
