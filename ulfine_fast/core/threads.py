"""Independent work on the cores of a processor, each core at a work of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import TypeVar

import torch

_Item = TypeVar("_Item")


class _End:
    """A work has come to its end, with an error or without."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def interleaved(works: Sequence[Iterator[_Item]]) -> Iterator[_Item]:
    """Run iterators in threads of their own, each on one core, and yield what they yield as it comes.

    PyTorch lets go of the interpreter while it computes, so threads keep the cores busy; a product too small to be cut
    in pieces for them still has one to itself.

    Args:
        works: must not touch each other's data.

    Raises:
        BaseException: whatever a work raised, once all have come to their end.
    """
    found: SimpleQueue[_Item | _End] = SimpleQueue()
    stop = threading.Event()
    # the number of cores is a setting of each thread, and the default of threads to come: theirs is set, ours restored
    cores = torch.get_num_threads()
    threads = [threading.Thread(target=_drain, args=(work, found, stop), daemon=True) for work in works]
    try:
        for thread in threads:
            thread.start()
        yield from _collect(found, len(threads))
    finally:
        # whoever stops listening stops the works too; none may go on while their data are read
        stop.set()
        for thread in threads:
            thread.join()
        torch.set_num_threads(cores)


def _drain(work: Iterator[_Item], found: SimpleQueue[_Item | _End], stop: threading.Event) -> None:
    """Put a work's items into the queue until it ends."""
    torch.set_num_threads(1)
    error: BaseException | None = None
    try:
        for item in work:
            found.put(item)
            if stop.is_set():
                break
    except BaseException as raised:  # handed to whoever waits, who would wait forever otherwise
        error = raised
    found.put(_End(error))


def _collect(found: SimpleQueue[_Item | _End], running: int) -> Iterator[_Item]:
    """Items until all works have ended; then the first error."""
    error: BaseException | None = None
    while running:
        item = found.get()
        if isinstance(item, _End):
            running, error = running - 1, error or item.error
        else:
            yield item
    if error is not None:
        raise error
