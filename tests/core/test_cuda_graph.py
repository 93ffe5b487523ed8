from __future__ import annotations

import pytest
import torch

from ulfine_fast.core.fused.cuda_graph import Captured

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def counted(total):
    def add(value):
        total.add_(value)

    return add


def test_on_a_processor_every_call_is_a_call():
    total = torch.zeros(2)
    step, add = Captured(), counted(total)
    for value in range(6):
        step(add, torch.full((2,), float(value)))
    assert total.tolist() == [15.0, 15.0]
    assert step.graph is None


@gpu
def test_on_a_gpu_replays_give_what_calls_give():
    total = torch.zeros(2, device="cuda")
    step, add = Captured(), counted(total)
    for value in range(6):
        step(add, torch.full((2,), float(value), device="cuda"))
    assert total.tolist() == [15.0, 15.0]
    assert step.graph is not None


@gpu
def test_what_cannot_be_recorded_goes_on_with_a_warning():
    total = torch.zeros(1, device="cuda")

    def asks(value):
        if float(value) >= 0:  # a look at the device, which a recording cannot hold
            total.add_(value)

    step = Captured()
    for value in range(3):
        step(asks, torch.full((1,), float(value), device="cuda"))
    with pytest.warns(UserWarning, match="could not be recorded"):
        step(asks, torch.full((1,), 3.0, device="cuda"))
    for value in (4, 5):
        step(asks, torch.full((1,), float(value), device="cuda"))
    assert total.tolist() == [15.0]
