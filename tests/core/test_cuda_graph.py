from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from ulfine_fast.core.fused import cuda_graph
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


@pytest.fixture
def recorder(monkeypatch):
    """What a recording asks of torch.cuda, on a machine without it; recording fails."""
    asked = []

    @contextmanager
    def entered(name, *values):
        asked.append((name, *values))
        try:
            yield
        finally:
            asked.append(("left", name))

    class Recording:
        def __init__(self, graph, stream):
            asked.append(("stream", stream))

        def __enter__(self):
            pass

        def __exit__(self, *error):
            raise RuntimeError("not here")

    cuda_graph._stream.cache_clear()
    for name, value in {
        "device": partial(entered, "device"),
        "CUDAGraph": object,
        "graph": Recording,
        "Stream": lambda device: f"stream of {device}",
        "current_stream": lambda device: f"work of {device}",
        "set_stream": lambda stream: asked.append(("back on", stream)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    yield asked
    cuda_graph._stream.cache_clear()


def test_a_recording_is_on_the_device_of_its_tensors_and_leaves_their_stream_as_it_was(recorder):
    step = Captured()
    with pytest.warns(UserWarning, match="could not be recorded: not here"):
        step._record(lambda value: None, (torch.zeros(1),))
    assert recorder == [
        ("device", torch.device("cpu")),
        ("stream", "stream of cpu"),
        ("left", "device"),
        ("back on", "work of cpu"),
    ]
    assert step.failed


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
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="could not be recorded"):
        step(asks, torch.full((1,), 3.0, device="cuda"))
    for value in (4, 5):
        step(asks, torch.full((1,), float(value), device="cuda"))
    assert total.tolist() == [15.0]
    assert torch.cuda.current_stream() == stream
