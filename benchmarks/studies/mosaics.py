"""Images of several classes: mosaics of the demo's garments and scikit-learn's digits, drawn with a long tail.

A mosaic has four places, each empty or with an image of one of 20 classes; its labels are the classes in it. Training
mosaics draw classes with an exponential long tail whose order the seed draws; those of validation and test draw all
classes alike, from images that no training mosaic shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as once
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.data import extracted
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.sources import FolderSource
from ulfine_fast.cache.sources.rows import Row
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.demo import unpack_images

SIZES = {"train": 1000, "val": 300, "test": 600}
IMBALANCE = 50.0
_SIDE, _FILLED, _KEPT = 28, 0.75, 0.6
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Tiles:
    """Small grey images by class.

    Attributes:
        names: of the K classes. images: of each class uint8 (n_k, 28, 28).
    """

    names: list[str]
    images: list[NDArray[np.uint8]]


@once
def tiles() -> Tiles:
    """The demo's ten garments and scikit-learn's ten digits."""
    from sklearn.datasets import load_digits

    folder = FolderSource(unpack_images(cache_home() / "datasets" / "demo"))
    garments: list[list[NDArray[np.uint8]]] = [[] for _ in folder.class_names]
    for row in folder.rows:
        garments[row.label].append(np.asarray(folder.read(row).convert("L").resize((_SIDE, _SIDE)), dtype=np.uint8))
    found = load_digits()
    digits = [[_enlarged(digit) for digit in found.images[found.target == k]] for k in range(len(_DIGITS))]
    return Tiles([*folder.class_names, *_DIGITS], [np.stack(own) for own in [*garments, *digits]])


def _enlarged(digit: NDArray[Any]) -> NDArray[np.uint8]:
    """A digit of 8 x 8 values up to 16 as 28 x 28 grey values."""
    small = Image.fromarray((digit * (255 / 16)).astype(np.uint8))
    return np.asarray(small.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), dtype=np.uint8)


@dataclass(frozen=True)
class Drawn:
    """What the mosaics of a split show: classes (n, 4), -1 for an empty place, and the number of each image."""

    classes: NDArray[np.int64]
    numbers: NDArray[np.int64]


def drawn(seed: int, split: str, per_class: list[int]) -> Drawn:
    """The mosaics of a split.

    Args:
        seed: draws the order of the classes and all else.
        split: one of `SIZES`.
        per_class: how many images there are of each class (K,).
    """
    random = np.random.default_rng([seed, list(SIZES).index(split), 0x305])
    classes, n = len(per_class), SIZES[split]
    order = np.random.default_rng([seed, 0x306]).permutation(classes)  # the same for all splits
    rates = np.ones(classes)
    if split == "train":
        rates[order] = IMBALANCE ** (-np.arange(classes) / (classes - 1))
    shown = random.choice(classes, (n, 4), p=rates / rates.sum())
    shown[random.random((n, 4)) >= _FILLED] = -1
    empty = (shown < 0).all(1)
    shown[empty, 0] = random.choice(classes, empty.sum(), p=rates / rates.sum())
    many = np.asarray(per_class)[shown]
    cut = (_KEPT * many).astype(np.int64)
    low, high = (np.zeros_like(cut), cut) if split == "train" else (cut, many)
    return Drawn(shown, random.integers(low, high))


def truth(seed: int) -> NDArray[np.int8]:
    """Which classes each mosaic shows, 1 or 0, in the order of the cache's rows (n, K)."""
    own, found = tiles(), []
    for split in SIZES:
        shown = drawn(seed, split, [len(one) for one in own.images]).classes
        found.append((shown[:, :, None] == np.arange(len(own.names))).any(1))  # (n, K)
    return np.concatenate(found).astype(np.int8)


class Mosaics:
    """The mosaics of one seed as a source; see :class:`ulfine_fast.cache.sources.ListedSource`.

    A row's label is the first of its classes: the cache wants one, and nothing here reads it.
    """

    kind = "mosaics"

    def __init__(self, seed: int) -> None:
        """Draw them all; a mosaic is put together when it is read."""
        self._seed, self._tiles = seed, tiles()
        self.class_names = self._tiles.names
        counts = [len(one) for one in self._tiles.images]
        self._drawn = {split: drawn(seed, split, counts) for split in SIZES}
        self.rows = [
            Row(f"{split}/{i:05d}", int(shown[shown >= 0][0]), split, str(i), 4 * _SIDE * _SIDE)
            for split, found in self._drawn.items()
            for i, shown in enumerate(found.classes)
        ]

    def read(self, row: Row) -> Image.Image:
        """The mosaic, 56 x 56."""
        found, i = self._drawn[row.split], int(row.location)
        whole = np.zeros((2, _SIDE, 2, _SIDE), dtype=np.uint8)
        for place, (k, number) in enumerate(zip(found.classes[i], found.numbers[i], strict=True)):
            if k >= 0:
                whole[place // 2, :, place % 2] = self._tiles.images[k][number]
        return Image.fromarray(whole.reshape(2 * _SIDE, 2 * _SIDE)).convert("RGB")

    def describe(self) -> dict[str, Any]:
        """What they were drawn by."""
        return {"kind": self.kind, "seed": self._seed, "sizes": SIZES, "imbalance": IMBALANCE}


def mosaics(seed: int) -> FeatureCache:
    """Features of a seed's mosaics, extracted on the first call."""
    return extracted(f"mosaics-{seed}", lambda: Mosaics(seed), views=lambda: ViewRecipe(weak=0, strong=0))
