from __future__ import annotations

import threading

import pytest
import torch

from ulfine_fast.cache.pipeline.threads import cores, map_on_cores, one_core


def test_there_is_a_core():
    assert cores() >= 1


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_the_order_of_the_items(threads):
    assert list(map_on_cores(lambda item: item * item, range(20), threads)) == [item * item for item in range(20)]


def test_several_work_at_once_each_on_one_core():
    before = torch.get_num_threads()
    meeting = threading.Barrier(2, timeout=60)

    def work(_):
        meeting.wait()
        return threading.get_ident(), torch.get_num_threads()

    results = list(map_on_cores(work, range(4), 2))
    assert len({ident for ident, _ in results}) == 2
    assert {number for _, number in results} == {1}
    assert torch.get_num_threads() == before


def test_items_are_drawn_only_a_few_ahead():
    drawn = []

    def items():
        for item in range(100):
            drawn.append(item)
            yield item

    results = map_on_cores(lambda item: item, items(), 2)
    assert next(results) == 0
    assert len(drawn) <= 4
    results.close()
    assert len(drawn) <= 5


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_is_raised_at_its_items_turn(threads):
    def work(item):
        if item == 3:
            raise ValueError("no")
        return item

    results = map_on_cores(work, range(10), threads)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="no"):
        next(results)


def test_stopping_early_leaves_no_thread():
    alive, before = threading.active_count(), torch.get_num_threads()
    results = map_on_cores(lambda item: item, range(1000), 3)
    assert next(results) == 0
    results.close()
    assert (threading.active_count(), torch.get_num_threads()) == (alive, before)


def test_the_number_of_cores_is_restored():
    before = torch.get_num_threads()
    with one_core():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
