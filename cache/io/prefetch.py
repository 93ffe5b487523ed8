"""The one prefetcher: work done in threads a few items ahead of the one who takes the results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def prefetch(
    work: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    threads: int,
    in_hand: int,
    initializer: Callable[[], None] | None = None,
    discard: Callable[[_Result], None] | None = None,
) -> Generator[_Result, None, None]:
    """`map` in threads, a few items ahead, with the results in the order of the items.

    Args:
        work: what to do with an item; called from several threads together.
        items: drawn from the caller's thread; may be endless.
        threads: how many; 0 does the work in the caller's thread when its result is asked for.
        in_hand: items that are drawn and whose results are not yet taken, at most; at least 1.
        initializer: called once in each thread, before its first item.
        discard: called with each finished result that is never taken, because the caller stops early.

    Yields:
        The results; the first error of `work` is raised at its item's turn.
    """
    if threads == 0:
        yield from map(work, items)
        return
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(threads, initializer=initializer) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= in_hand:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # A caller that stops early, or is interrupted, waits for the running items and for nothing more.
            running = [future for future in waiting if not future.cancel()]
            for future in running:
                if discard is not None and future.exception() is None:
                    discard(future.result())
