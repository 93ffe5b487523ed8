"""Where to compute: a name from the command line to a device that exists."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ulfine_fast.cache.io.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device to compute on.

    Args:
        name: "auto" takes what the environment variable ULFINE_FAST_DEVICE names, else a GPU if there is one; anything
            else is a torch device such as "cpu", "cuda:1" or "mps".

    Raises:
        InputError: no such device, or it is not available.
    """
    name = os.environ.get("ULFINE_FAST_DEVICE", "auto") if name == "auto" else name
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        device = torch.device(name)
        # A name can be well formed and the device still be absent; only using it tells.
        torch.empty(1, device=device)
    # torch raises RuntimeError for a bad name, AssertionError where it was built without the device.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} is not available here ({reason}); use auto or cpu") from error
    return device


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which a GPU is CUDA's current device of this thread; nothing for other devices.

    Triton launches, CUDA graphs and pinned memory use the current device, wherever their tensors are.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of main memory on the device; on a GPU nothing waits for the work queued there.

    A copy from memory that is not pinned would: use this for the small tensors of a batch.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@contextmanager
def float32_products(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """How a GPU computes products and convolutions of float32: exactly, or of inputs rounded to TF32 (10 bits).

    By default PyTorch rounds the inputs of convolutions, and not those of matrix products. The setting is one of the
    process; for other devices, where threads work side by side, it is left alone.
    """
    if device.type != "cuda":
        yield
        return
    parts: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [part.allow_tf32 for part in parts]
    try:
        for part in parts:
            part.allow_tf32 = tf32
        yield
    finally:
        for part, allowed in zip(parts, before, strict=True):
            part.allow_tf32 = allowed
