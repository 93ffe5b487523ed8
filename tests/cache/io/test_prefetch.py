from __future__ import annotations

import itertools
import threading

import pytest

from ulfine_fast.cache.io.prefetch import prefetch


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_endless_items_are_drawn_only_a_few_ahead(threads):
    drawn = []

    def items():
        for item in itertools.count():
            drawn.append(item)
            yield item

    results = prefetch(lambda item: item * item, items(), threads=threads, in_hand=4)
    assert [next(results) for _ in range(10)] == [item * item for item in range(10)]
    results.close()
    assert len(drawn) <= 10 + 4


def test_a_thread_is_initialised_before_its_first_item():
    here = threading.local()

    def initialise():
        here.ready = True

    assert all(prefetch(lambda _: here.ready, range(6), threads=2, in_hand=2, initializer=initialise))


def test_finished_results_that_are_never_taken_are_discarded():
    made, discarded = [], []

    def work(item):
        made.append(item)
        return item

    results = prefetch(work, itertools.count(), threads=1, in_hand=3, discard=discarded.append)
    assert next(results) == 0
    results.close()
    # an item that had not begun is cancelled, and there is nothing to discard of it
    assert discarded == made[1:]


def test_an_error_is_raised_at_its_items_turn_and_the_rest_is_dropped():
    def work(item):
        if item >= 2:
            raise ValueError(f"no {item}")
        return item

    results = prefetch(work, range(9), threads=2, in_hand=4, discard=lambda _: pytest.fail("only errors are left"))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="no 2"):
        next(results)
