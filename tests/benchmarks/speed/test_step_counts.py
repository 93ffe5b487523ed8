"""Launches, bytes and multiply-adds of a fused step."""

from __future__ import annotations

import torch

from benchmarks.speed import step_counts
from benchmarks.speed.floor import Shape

TINY = Shape("tiny", 24, 7, 4, 9, 6)


def test_multiply_adds_are_those_of_the_floor_and_launches_are_those_of_one_trial():
    one, three = step_counts.count(TINY, 1), step_counts.count(TINY, 3)
    # beside the floor's: the shift through down and back, and sums of rows that are written as products
    extra = one.multiply_adds - TINY.multiply_adds
    assert 0 < extra < 0.1 * TINY.multiply_adds
    assert three.multiply_adds == 3 * one.multiply_adds
    assert three.launches == one.launches
    assert one.launches["kernel"] == 8
    for kind, moved in one.bytes.items():
        assert abs(three.bytes[kind] - 3 * moved) < 0.05 * 3 * moved, kind
    assert sum(one.bytes.values()) > TINY.bytes


def test_an_operation_counts_what_it_reads_and_writes():
    counts = step_counts.Counts()
    left, right, out = torch.ones(2, 3, 4), torch.ones(2, 4, 5), torch.empty(2, 3, 5)
    with step_counts._Counter(counts):
        torch.bmm(left, right, out=out)
        out.view(-1)[3:].zero_()
        out.add_(torch.ones(()).expand(2, 3, 5))
    assert counts.multiply_adds == 120
    assert counts.bytes["product"] == 4 * (24 + 40 + 30)
    assert counts.launches["product"] == 1
    # ones is filled, a part of `out` is written, and then it is read and written with one value
    assert counts.bytes["other"] == 4 * (1 + 27 + 61)
    assert counts.launches["other"] == 3
