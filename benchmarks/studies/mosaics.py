"""Images of several classes: mosaics of the demo's garments and scikit-learn's digits, drawn with a long tail.

A mosaic has four tiles, each empty or with an image of one of 20 classes; its labels are the classes in it. Training
mosaics draw classes with an exponential long tail whose order the seed draws; those of validation and test draw all
classes alike, from images that no training mosaic shows. `benchmarks.studies.multilabel` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as once
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.data import NO_VIEWS, demo_source, extracted
from ulfine_fast.cache.sources import Row
from ulfine_fast.cache.store import FeatureCache

SIZES = {"train": 1000, "val": 300, "test": 600}
IMBALANCE = 50.0
_SIDE = 28  # of a tile in pixels
_FILLED = 0.75  # probability that a tile is not empty
_TRAIN_FRACTION = 0.6  # of a class's images, for training mosaics
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Tiles:
    """Small grey images by class.

    Attributes:
        names: of the K classes.
        images: of each class uint8 (n_k, 28, 28).
    """

    names: list[str]
    images: list[NDArray[np.uint8]]


@once
def tiles() -> Tiles:
    """The demo's ten garments and scikit-learn's ten digits."""
    from sklearn.datasets import load_digits

    source = demo_source()
    garments: list[list[NDArray[np.uint8]]] = [[] for _ in source.class_names]
    for row in source.rows:
        grey = source.read(row).convert("L").resize((_SIDE, _SIDE))
        garments[row.label].append(np.asarray(grey, dtype=np.uint8))
    data = load_digits()
    digits = [[_enlarged(digit) for digit in data.images[data.target == k]] for k in range(len(_DIGITS))]
    return Tiles([*source.class_names, *_DIGITS], [np.stack(images) for images in [*garments, *digits]])


def _enlarged(digit: NDArray[Any]) -> NDArray[np.uint8]:
    """A digit of 8 x 8 values up to 16 as 28 x 28 grey values."""
    small = Image.fromarray((digit * (255 / 16)).astype(np.uint8))
    return np.asarray(small.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), dtype=np.uint8)


@dataclass(frozen=True)
class Drawn:
    """What the mosaics of a split show.

    Attributes:
        classes: of the tiles (n, 4), -1 for an empty one.
        numbers: of the tiles' images among those of their class (n, 4).
    """

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
    classes = len(per_class)
    n = SIZES[split]
    order = np.random.default_rng([seed, 0x306]).permutation(classes)  # the same for all splits
    rates = np.ones(classes)
    if split == "train":
        rates[order] = IMBALANCE ** (-np.arange(classes) / (classes - 1))
    shown = random.choice(classes, (n, 4), p=rates / rates.sum())
    shown[random.random((n, 4)) >= _FILLED] = -1
    empty = (shown < 0).all(1)
    shown[empty, 0] = random.choice(classes, empty.sum(), p=rates / rates.sum())
    # training images first, the others after them
    images = np.asarray(per_class)[shown]  # (n, 4)
    for_training = (_TRAIN_FRACTION * images).astype(np.int64)
    if split == "train":
        return Drawn(shown, random.integers(np.zeros_like(for_training), for_training))
    return Drawn(shown, random.integers(for_training, images))


def truth(seed: int) -> NDArray[np.int8]:
    """Which classes each mosaic shows, 1 or 0, in the order of the cache's rows (n, K)."""
    per_class = [len(images) for images in tiles().images]
    labels = []
    for split in SIZES:
        shown = drawn(seed, split, per_class).classes
        labels.append((shown[:, :, None] == np.arange(len(per_class))).any(1))  # (n, K)
    return np.concatenate(labels).astype(np.int8)


class Mosaics:
    """The mosaics of one seed as a source; see :class:`ulfine_fast.cache.sources.ListedSource`.

    A row's label is the first of its classes: the cache wants one, and nothing here reads it.
    """

    kind = "mosaics"

    def __init__(self, seed: int) -> None:
        """Draw them all; a mosaic is put together when it is read."""
        self._seed = seed
        self._tiles = tiles()
        self.class_names = self._tiles.names
        per_class = [len(images) for images in self._tiles.images]
        self._drawn = {split: drawn(seed, split, per_class) for split in SIZES}
        self.rows = [
            Row(f"{split}/{i:05d}", int(shown[shown >= 0][0]), split, str(i), 4 * _SIDE * _SIDE)
            for split, mosaics_of_split in self._drawn.items()
            for i, shown in enumerate(mosaics_of_split.classes)
        ]

    def read(self, row: Row) -> Image.Image:
        """The mosaic, 56 x 56."""
        shown = self._drawn[row.split]
        i = int(row.location)
        whole = np.zeros((2, _SIDE, 2, _SIDE), dtype=np.uint8)
        for tile, (k, number) in enumerate(zip(shown.classes[i], shown.numbers[i], strict=True)):
            if k >= 0:
                whole[tile // 2, :, tile % 2] = self._tiles.images[k][number]
        return Image.fromarray(whole.reshape(2 * _SIDE, 2 * _SIDE)).convert("RGB")

    def describe(self) -> dict[str, Any]:
        """What they were drawn by."""
        return {"kind": self.kind, "seed": self._seed, "sizes": SIZES, "imbalance": IMBALANCE}


def mosaics(seed: int) -> FeatureCache:
    """Features of a seed's mosaics, extracted on the first call."""
    return extracted(f"mosaics-{seed}", lambda: Mosaics(seed), views=NO_VIEWS)
