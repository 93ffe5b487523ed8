"""How much memory is free, and how much some work takes at its peak."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# a larger trial batch is not faster, and leaves less for other programs
_MOST_ON_PROCESSOR = 8 << 30
_FRACTION = 0.5


def budget(device: torch.device) -> int:
    """Bytes that one trial batch may take on the device: half of what is free now, on a processor at most 8 GiB."""
    if device.type == "cuda":
        # memory that earlier work has freed is kept by the allocator
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((torch.cuda.mem_get_info(device)[0] + kept) * _FRACTION)
    return min(int(free_memory() * _FRACTION), _MOST_ON_PROCESSOR)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that are free without swapping, within the limit of a container.

    Args:
        root: folder of the system files proc/meminfo and sys/fs/cgroup/memory.*.
    """
    free = [_of_system(root)]
    group = root / "sys/fs/cgroup"
    # a group without a limit has "max", which is no number
    with contextlib.suppress(OSError, ValueError):
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(free))


def _of_system(root: Path) -> int:
    with contextlib.suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):  # Windows has no such call
        return 4 << 30


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes of new tensors that were alive at one time on the device while `work` ran."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors() as live:
        work()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that operations return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # most operations return one tensor, and tree_leaves is slower than they are
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            # a sparse tensor has no storage: its parts were counted when they were made
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        # views and in-place results share a storage, which counts once
        if storage._cdata in self.seen:
            return
        self.seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size
