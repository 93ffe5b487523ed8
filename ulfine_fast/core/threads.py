"""Independent work in threads, one core each."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import TypeVar

import torch

_Item = TypeVar("_Item")


class _End:
    """The last item of an iterator's thread: its error, if any."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def interleaved(works: Sequence[Iterator[_Item]]) -> Iterator[_Item]:
    """Run iterators in a thread each, on one core each, and yield their items as they come.

    PyTorch releases the interpreter while it computes, so threads keep the cores busy, also with products that are too
    small to be split between cores.

    Args:
        works: must not touch each other's data.

    Raises:
        BaseException: the first error of an iterator, once all have ended.
    """
    items: SimpleQueue[_Item | _End] = SimpleQueue()
    stop = threading.Event()
    # the number of cores is a setting of each thread, and the default of new ones; this thread's is restored
    cores = torch.get_num_threads()
    threads = [threading.Thread(target=_drain, args=(work, items, stop), daemon=True) for work in works]
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        error: BaseException | None = None
        while running:
            item = items.get()
            if isinstance(item, _End):
                running -= 1
                error = error or item.error
            else:
                yield item
        if error is not None:
            raise error
    finally:
        # a caller that stops reading stops the threads too: none may go on while their data are read
        stop.set()
        for thread in threads:
            thread.join()
        torch.set_num_threads(cores)


def _drain(work: Iterator[_Item], items: SimpleQueue[_Item | _End], stop: threading.Event) -> None:
    """Put an iterator's items into the queue until it ends."""
    torch.set_num_threads(1)
    error: BaseException | None = None
    try:
        for item in work:
            items.put(item)
            if stop.is_set():
                break
    except BaseException as raised:  # passed on to the reader, which would wait forever otherwise
        error = raised
    items.put(_End(error))
