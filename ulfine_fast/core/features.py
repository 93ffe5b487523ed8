"""A cache's features on the device: float16 as stored, gathered and converted a mini-batch at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ulfine_fast.ops import kernels
from ulfine_fast.ops.prototypes import normalize

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

# caches up to this size are kept as float32 on a processor
_WIDENED_BYTES = 1 << 29
# rows copied to a device together
_ROWS = 1 << 14


@dataclass(frozen=True)
class DeviceFeatures:
    """Features of all rows.

    Attributes:
        plain: evaluation view (n, D).
        views: plain, weak and strong views, in this order, of the rows that have views (m, V, D).
        unit: whether all rows are float32 and of length one already; otherwise they are as stored.
        tokens: whether rows are the last block's tokens, D = 2 W wide and of any length, instead of features.
        easy: how many of the views are plain or weak; the other V - easy are strong, and may be none.
        position: index of each row among the rows with views, -1 for none, int64 (n,).
        areas: fraction of the image that the plain (1) and weak views show (m, easy), 0 where it is not known; None for
            features that do not come from a cache.
    """

    plain: Tensor
    views: Tensor
    easy: int
    position: Tensor
    unit: bool = False
    tokens: bool = False
    areas: Tensor | None = None

    @classmethod
    def load(cls, cache: FeatureCache, device: torch.device, *, tokens: bool = False) -> DeviceFeatures:
        """Move a cache's features to the device; or its tokens, the two of a view side by side."""
        plain = torch.from_numpy(np.asarray(cache.tokens("plain") if tokens else cache.plain)).flatten(1).to(device)
        rows = torch.from_numpy(np.asarray(cache.view_rows)).to(device)
        position = torch.full((len(plain),), -1, dtype=torch.int64, device=device)
        position[rows] = torch.arange(len(rows), device=device)
        views_of = cache.tokens if tokens else cache.views
        weak, strong = (torch.from_numpy(np.asarray(views_of(kind))).flatten(2) for kind in ("weak", "strong"))
        # one copy on the device: each kind goes to its columns, a block of rows at a time
        count = 1 + weak.shape[1] + strong.shape[1]
        kind = torch.promote_types(plain.dtype, torch.promote_types(weak.dtype, strong.dtype))
        views = torch.empty(len(rows), count, plain.shape[1], dtype=kind, device=device)  # (m, V, D)
        for start in range(0, len(rows), _ROWS):
            stop = start + _ROWS
            views[start:stop, 0] = plain[rows[start:stop]]
            views[start:stop, 1 : 1 + weak.shape[1]] = weak[start:stop].to(device)
            views[start:stop, 1 + weak.shape[1] :] = strong[start:stop].to(device)
        # a processor converts slowly, and a small cache fits in memory as float32; a GPU converts while it gathers
        unit = not tokens and device.type == "cpu" and 4 * (plain.numel() + views.numel()) <= _WIDENED_BYTES
        if unit:
            plain, views = normalize(plain.float()), normalize(views.float())
        areas = F.pad(torch.from_numpy(np.asarray(cache.view_areas("weak"))).to(device), (1, 0), value=1.0)
        return cls(plain, views, 1 + weak.shape[1], position, unit, tokens, areas)

    @property
    def strong(self) -> int:
        """How many strong views each row has."""
        return self.views.shape[1] - self.easy

    def rows(self, index: Tensor) -> Tensor:
        """Plain features of rows: (...,) -> float32 unit rows (..., D)."""
        return self._unit(self.plain[index])

    def slots(self, index: Tensor, view: Tensor) -> Tensor:
        """Index of views of rows, both (...,), when the views of all rows are counted, for :meth:`at`."""
        return self.position[index] * self.views.shape[1] + view

    def at(self, slots: Tensor) -> Tensor:
        """Views by their slots: (...,) -> float32 unit rows (..., D)."""
        return self._unit(self.views.flatten(0, 1)[slots])

    def at_into(self, slots: Tensor, out: Tensor) -> None:
        """As :meth:`at`, for slots (T, n), written to `out` (T, n, D)."""
        store = self.views.flatten(0, 1)
        if kernels.usable(out):
            kernels.gather_rows(store, slots, out)
            return
        if not self.unit:
            out.copy_(self.at(slots))
            return
        # a trial's rows are contiguous in `out`, those of all trials need not be
        for chosen, rows in zip(slots.unbind(0), out.unbind(0), strict=True):
            torch.index_select(store, 0, chosen, out=rows)

    def all_views(self, index: Tensor) -> Tensor:
        """Plain, weak and strong views (T, B, V, D) of rows (T, B) that have views."""
        return self._unit(self.views[self.position[index]])

    def _unit(self, rows: Tensor) -> Tensor:
        if self.unit:
            return rows
        return rows.float() if self.tokens else normalize(rows.float())
