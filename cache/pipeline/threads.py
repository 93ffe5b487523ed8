"""Work on the cores of a processor: each core at an image batch of its own, results in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_AHEAD = 2  # items in hand beyond those under way, so that no core waits for the one who collects


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


def in_order(work: Callable[[_Item], _Result], items: Iterable[_Item], threads: int) -> Generator[_Result, None, None]:
    """`map` over threads that each compute on one core; a few items ahead, never all of them.

    Decoding, resizing and PyTorch let go of the interpreter, so threads keep the cores busy, and nothing has to travel
    between processes. A core that does all of a batch is never waited for inside an operation, and the cores divide
    themselves between decoding and encoding as the images need it.

    Args:
        work: what to do with an item; called from several threads at once.
        items: drawn from the caller's thread, at most `threads` + 2 ahead of what was yielded.
        threads: how many; 0 does the work in the caller's thread.

    Yields:
        Results in the order of the items; the first error of `work` is raised in its place.
    """
    # The number of cores is a setting of each thread, and the default of threads to come: ours is put back.
    with one_core():
        if threads == 0:
            yield from map(work, items)
            return
        waiting: deque[Future[_Result]] = deque()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for item in items:
                    waiting.append(pool.submit(work, item))
                    if len(waiting) >= threads + _AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                # Who stops listening, or is interrupted, waits for what is under way and for nothing more.
                for future in waiting:
                    future.cancel()
