"""A step recorded once as a CUDA graph and replayed: one launch instead of a hundred."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

# libraries make their plans and workspaces on the first calls, which cannot be recorded
_WARM_UP = 3
CALLS_UNTIL_RECORDED = _WARM_UP + 1


class Captured:
    """A function of tensors of fixed shapes that works in place and reads no value from the device.

    The first calls run as they are; the next is recorded, and all others are replays with their arguments copied into
    the recorded ones. Where recording fails, calls run as they are, with a warning.

    The function is an argument of each call and is not kept: a method of the object that owns this one would close a
    reference cycle, and the step's buffers and the graph's memory would stay on the device until Python collects it.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.failed = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()

    def __call__(self, function: Callable[..., None], *inputs: Tensor) -> None:
        """Call, record or replay.

        Args:
            function: the same in all calls; returns nothing.
            inputs: its arguments, in all calls of the same shapes.
        """
        self.calls += 1
        if self.graph is None and self.calls > _WARM_UP and not self.failed and inputs[0].is_cuda:
            self._record(function, inputs)
        if self.graph is None:
            function(*inputs)
            return
        for recorded, current in zip(self.inputs, inputs, strict=True):
            recorded.copy_(current)
        self.graph.replay()

    def _record(self, function: Callable[..., None], inputs: tuple[Tensor, ...]) -> None:
        """Record the function; recording computes nothing."""
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        device = inputs[0].device
        before = torch.cuda.current_stream(device)
        try:
            with torch.cuda.device(device):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=_stream(device)):
                    function(*self.inputs)
        except RuntimeError as error:
            self.failed = True
            # PyTorch stays on the recording's stream where ending it raises
            torch.cuda.set_stream(before)
            warnings.warn(f"steps run without a CUDA graph, as they could not be recorded: {error}", stacklevel=2)
        else:
            self.graph = graph


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that recordings on a device share, as a library keeps a workspace for each stream.

    The one that PyTorch takes by default is on the device of the first recording.
    """
    return torch.cuda.Stream(device)
