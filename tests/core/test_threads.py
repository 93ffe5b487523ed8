from __future__ import annotations

import threading

import pytest
import torch

from ulfine_fast.core.threads import interleaved


def test_everything_that_is_yielded_comes_out():
    works = [iter(range(start, 30, 3)) for start in range(3)]
    assert sorted(interleaved(works)) == list(range(30))


def test_each_work_has_a_thread_and_a_core_of_its_own():
    before = torch.get_num_threads()
    meeting = threading.Barrier(2, timeout=60)

    def work():
        meeting.wait()  # both are running at once
        yield threading.get_ident(), torch.get_num_threads()

    result = list(interleaved([work(), work()]))
    assert len({ident for ident, _ in result}) == 2
    assert {cores for _, cores in result} == {1}
    assert torch.get_num_threads() == before


def test_an_error_comes_out_once_all_have_ended():
    def fails():
        yield 1
        raise ValueError("no")

    ended = []

    def works():
        yield 2
        ended.append(True)

    with pytest.raises(ValueError, match="no"):
        list(interleaved([fails(), works()]))
    assert ended == [True]


def test_a_caller_that_stops_reading_stops_the_threads():
    alive = threading.active_count()

    def endless():
        while True:
            yield 0

    items = interleaved([endless(), endless()])
    assert next(items) == 0
    items.close()
    assert threading.active_count() == alive
