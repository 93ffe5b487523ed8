"""A cache's features on the device: float16 as stored, gathered and widened a mini-batch at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ulfine_fast.ops.prototypes import normalize

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache


@dataclass(frozen=True)
class DeviceFeatures:
    """Features of all rows.

    Attributes:
        plain: evaluation view (n, D).
        easy: plain and weak views of the rows that have views (m, 1 + Vw, D).
        strong: strong views of the same rows (m, Vs, D); Vs may be 0.
        position: where each row stands among the rows with views, -1 for none, int64 (n,).
    """

    plain: Tensor
    easy: Tensor
    strong: Tensor
    position: Tensor

    @classmethod
    def load(cls, cache: FeatureCache, device: torch.device) -> DeviceFeatures:
        """Move a cache's features to the device, once."""
        plain = torch.from_numpy(np.asarray(cache.plain)).to(device)
        rows = torch.from_numpy(np.asarray(cache.view_rows)).to(device)
        position = torch.full((len(plain),), -1, dtype=torch.int64, device=device)
        position[rows] = torch.arange(len(rows), device=device)
        weak, strong = (torch.from_numpy(np.asarray(cache.views(kind))).to(device) for kind in ("weak", "strong"))
        return cls(plain, torch.cat([plain[rows].unsqueeze(1), weak], dim=1), strong, position)

    def rows(self, index: Tensor) -> Tensor:
        """Plain features of rows: (...,) -> float32 unit rows (..., D)."""
        return normalize(self.plain[index].float())

    def easy_views(self, index: Tensor, view: Tensor) -> Tensor:
        """Plain or weak views (T, B, D) of rows (T, B); `view` counts from 0, the plain one."""
        return normalize(self.easy[self.position[index], view].float())

    def strong_views(self, index: Tensor, view: Tensor) -> Tensor:
        """Strong views (T, B, D) of rows (T, B); the plain view where the cache has no strong ones."""
        if not self.strong.shape[1]:
            return self.rows(index)
        return normalize(self.strong[self.position[index], view].float())

    def all_views(self, index: Tensor) -> Tensor:
        """Plain, weak and strong views (T, B, V, D) of rows (T, B) that have views."""
        position = self.position[index]
        return normalize(torch.cat([self.easy[position], self.strong[position]], dim=2).float())
