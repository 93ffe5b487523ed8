"""Bags: groups of training images with known class proportions, and without labels of single images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Bags:
    """G bags.

    Attributes:
        names: of each bag (G,).
        members: rows of the cache in each bag, at least one; no row is in two bags.
        proportions: class proportions of each bag, each in [0, 1], summing to 1 (G, K).
    """

    names: tuple[str, ...]
    members: tuple[Rows, ...]
    proportions: NDArray[np.float64]

    @property
    def width(self) -> int:
        """Images in the largest bag."""
        return max(len(rows) for rows in self.members)

    @property
    def rows(self) -> Rows:
        """Rows of all bags, ascending."""
        return np.sort(np.concatenate(self.members))

    def to_list(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """The bags as JSON values, with image ids instead of rows."""
        return [
            {"bag": name, "ids": [ids[row] for row in rows], "shares": proportions.tolist()}
            for name, rows, proportions in zip(self.names, self.members, self.proportions, strict=True)
        ]

    @classmethod
    def from_list(cls, bags: Sequence[Mapping[str, Any]], row_of: Callable[..., Rows]) -> Bags:
        """The inverse of :meth:`to_list`.

        Args:
            bags: JSON values.
            row_of: looks up the rows of image ids, such as `FeatureCache.row_of`.

        Raises:
            InputError: an image that the cache lacks.
        """
        fix = "use the cache that the split was made on"
        members = tuple(row_of(bag["ids"], source=f"bag {bag['bag']!r} of the split", fix=fix) for bag in bags)
        return cls(tuple(bag["bag"] for bag in bags), members, np.array([bag["shares"] for bag in bags]))


def draw_bags(rows: Rows, labels: Rows, size: int, classes: int, seed: int) -> Bags:
    """Put labelled images into bags at random, and keep each bag's proportions instead of their labels.

    Args:
        rows: of the images (L,).
        labels: their classes (L,).
        size: images in a bag, at least 1; the last bag has the rest.
        classes: K.
        seed: the same seed draws the same order, whatever the size.
    """
    order = np.random.default_rng([seed, 0xBA65]).permutation(len(rows))
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    proportions = np.stack([np.bincount(labels[part], minlength=classes) / len(part) for part in parts])
    return Bags(tuple(str(number) for number in range(len(parts))), tuple(rows[part] for part in parts), proportions)


@dataclass(frozen=True)
class PaddedBags:
    """Bags of T trials on the device: at most G of at most m images.

    Attributes:
        index: rows of the cache (T, G, m); padding repeats an image of the bag.
        present: bool (T, G, m), False for padding.
        proportions: float32 (T, G, K); of bags that are padding, those of the first class.
        count: how many bags are real (T,).
    """

    index: Tensor
    present: Tensor
    proportions: Tensor
    count: Tensor

    @classmethod
    def pad(cls, bags: Sequence[Bags], device: torch.device) -> PaddedBags:
        """Pad to the most bags and the largest; bags that are padding are never drawn."""
        most = max(len(trial.names) for trial in bags)
        width = max(trial.width for trial in bags)
        index = np.zeros((len(bags), most, width), dtype=np.int64)
        present = np.zeros(index.shape, dtype=bool)
        proportions = np.eye(bags[0].proportions.shape[1])[np.zeros((len(bags), most), dtype=np.int64)]
        for t, trial in enumerate(bags):
            proportions[t, : len(trial.names)] = trial.proportions
            for g, rows in enumerate(trial.members):
                index[t, g] = np.resize(rows, width)
                present[t, g, : len(rows)] = True
        count = torch.tensor([len(trial.names) for trial in bags], device=device)
        return cls(
            index=torch.from_numpy(index).to(device),
            present=torch.from_numpy(present).to(device),
            proportions=torch.from_numpy(proportions).float().to(device),
            count=count,
        )
