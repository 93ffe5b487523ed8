"""Memory that steps reuse, and one buffer for all parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Buffers:
    """Buffers by name, allocated when first asked for and reused after that.

    Blocks of trials that run one after another share them, so that a step's activations stay in the processor's cache.

    Attributes:
        like: a tensor of their type and device.
    """

    like: Tensor
    _slabs: dict[str, Tensor] = field(default_factory=dict)
    _views: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)

    def lend(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of this shape: zeros at first, later what was last written under this name."""
        if (name, shape) not in self._views:
            size = math.prod(shape)
            self._views[name, shape] = self._slab(name, size, dtype)[:size].view(shape)
        return self._views[name, shape]

    def _slab(self, name: str, size: int, dtype: torch.dtype | None) -> Tensor:
        """Memory of at least this size; tensors lent before it grew keep what they have."""
        if name not in self._slabs or self._slabs[name].numel() < size:
            self._slabs[name] = torch.zeros(size, dtype=dtype or self.like.dtype, device=self.like.device)
        return self._slabs[name]


def flatten(tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Copy tensors (T, ...) into one buffer (T, P).

    Args:
        tensors: by name, all with the same leading T.

    Returns:
        The buffer, and views of it by the old names in the old shapes and order.
    """
    flat = torch.cat([tensor.detach().flatten(1) for tensor in tensors.values()], dim=1)  # (T, P)
    return flat, unflatten(flat, tensors)


def unflatten(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of a buffer (T, P) with the names, order and shapes of `like`, whose T may be another."""
    views, start = {}, 0
    for name, tensor in like.items():
        shape = tensor.shape[1:]
        views[name] = flat[:, start : start + math.prod(shape)].unflatten(1, shape)
        start += math.prod(shape)
    return views
