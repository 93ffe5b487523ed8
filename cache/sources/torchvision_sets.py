"""Data sets that torchvision knows by name."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.io.names import one_of
from ulfine_fast.cache.sources.image import UnreadableImage, load_image
from ulfine_fast.cache.sources.labels import name_classes
from ulfine_fast.cache.sources.rows import UNKNOWN, Row, sorted_rows

NAMES = ("cifar10", "cifar100", "fashion_mnist", "food101", "stl10", "svhn")
# Where Debian's package dataset-fashion-mnist puts the files.
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_DIGITS = [str(digit) for digit in range(10)]
_FILES = "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


class _Split:
    """One split: labels (n,) with pixels (n, H, W) or (n, H, W, 3) uint8, or with image files."""

    def __init__(self, labels: Any, pixels: np.ndarray | None = None, files: list[Path] | None = None) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.pixels = pixels
        self.files = files

    def rows(self, name: str) -> Iterator[Row]:
        """Rows of all images in the split `name`."""
        for index, label in enumerate(self.labels.tolist()):
            # Five digits, so that the order by id is the data set's own.
            image_id = f"{name}/{index:05d}"
            if self.files is not None:
                yield Row(image_id, label, name, str(self.files[index]), self.files[index].stat().st_size)
            else:
                assert self.pixels is not None
                yield Row(image_id, label, name, str(index), int(self.pixels[0].nbytes))


class TorchvisionSource:
    """A data set by name, with torchvision's own classes and splits; stl10 has an unlabelled split too.

    fashion_mnist is read from `idx_folder` where its files are there. Everything else is downloaded by torchvision
    once, into the `datasets` folder of `cache_home()`.

    Attributes:
        kind: "torchvision".
        name: one of `NAMES`.
        class_names: names for the text tower.
        rows: see `Source`; ids are like "train/00012", by the data set's own order.
        notes: see `Source`.
    """

    kind = "torchvision"

    def __init__(
        self, name: str, *, class_names_file: Path | None = None, idx_folder: Path = FASHION_MNIST_FOLDER
    ) -> None:
        """Opens the data set, downloading it if needed.

        Raises:
            InputError: unknown name, or the download failed.
        """
        if name not in NAMES:
            raise one_of("the data set", name, NAMES)
        self.name = name
        self._idx_folder = idx_folder
        classes, self._splits = self._open()
        named, _ = name_classes(classes, class_names_file, ordered=True)
        self.class_names = named.names
        self.notes = [named.note] if named.note else []
        self.rows = sorted_rows(
            replace(row, label=named.indices[row.label]) if row.label >= 0 else row
            for split, content in self._splits.items()
            for row in content.rows(split)
        )

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        pixels = self._splits[row.split].pixels
        if pixels is None:
            return load_image(row.location)
        try:
            # Some sets are views with the channels first in memory, which PIL cannot take.
            return Image.fromarray(np.ascontiguousarray(pixels[int(row.location)])).convert("RGB")
        except (IndexError, ValueError) as error:
            raise UnreadableImage(f"no image {row.location} in {self.name}: {error}") from error

    def describe(self) -> dict[str, Any]:
        """Kind, name, and the folder of the files if it is not the usual one."""
        # The usual folder is left out, so that manifests from two machines agree.
        description = {"kind": self.kind, "name": self.name}
        return (
            description if self._idx_folder == FASHION_MNIST_FOLDER else description | {"path": str(self._idx_folder)}
        )

    def _open(self) -> tuple[list[str], dict[str, _Split]]:
        if self.name == "fashion_mnist" and all((self._idx_folder / f"{file}.gz").is_file() for file in _FILES):
            return list(datasets.FashionMNIST.classes), _from_idx(self._idx_folder)
        root = cache_home() / "datasets"
        try:
            root.mkdir(parents=True, exist_ok=True)
            return _OPENERS[self.name](str(root))
        # torchvision lets through whatever the network, the archive or the disk raised.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{self.name} could not be downloaded to {root} ({reason[:160]}); "
                "copy the data set there or give a folder of images instead"
            ) from error


def _from_idx(folder: Path) -> dict[str, _Split]:
    """Train and test from gzipped IDX files, whose headers hold the number and size of the images."""
    splits = {}
    for split, pixels_file, labels_file in (("train", *_FILES[:2]), ("test", *_FILES[2:])):
        pixels, labels = _read_idx(folder / f"{pixels_file}.gz"), _read_idx(folder / f"{labels_file}.gz")
        if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels):
            raise InputError(f"the IDX files in {folder} do not belong together: {pixels.shape} and {labels.shape}")
        splits[split] = _Split(labels, pixels)
    return splits


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zero bytes, type 8, number of axes, then each axis as a big-endian 32-bit number."""
    try:
        with gzip.open(path) as file:
            data = file.read()
        # The fourth byte is the number of axes, whose lengths follow.
        axes = data[3]
        shape = np.frombuffer(data, ">i4", count=axes, offset=4)
        if data[:3] != b"\0\0\x08":
            raise ValueError("it is not an IDX file of bytes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _cifar10(root: str) -> tuple[list[str], dict[str, _Split]]:
    train, test = (datasets.CIFAR10(root, train=train, download=True) for train in (True, False))
    return list(train.classes), {"train": _Split(train.targets, train.data), "test": _Split(test.targets, test.data)}


def _cifar100(root: str) -> tuple[list[str], dict[str, _Split]]:
    train, test = (datasets.CIFAR100(root, train=train, download=True) for train in (True, False))
    return list(train.classes), {"train": _Split(train.targets, train.data), "test": _Split(test.targets, test.data)}


def _fashion_mnist(root: str) -> tuple[list[str], dict[str, _Split]]:
    train, test = (datasets.FashionMNIST(root, train=train, download=True) for train in (True, False))
    splits = {"train": _Split(train.targets, train.data.numpy()), "test": _Split(test.targets, test.data.numpy())}
    return list(train.classes), splits


def _stl10(root: str) -> tuple[list[str], dict[str, _Split]]:
    splits = {}
    for split in ("train", "unlabeled", "test"):
        data = datasets.STL10(root, split=split, download=True)
        # (n, 3, H, W) to (n, H, W, 3) as a view: the unlabelled split alone is 2.8 GB.
        splits[split] = _Split(data.labels, data.data.transpose(0, 2, 3, 1))
    splits["unlabeled"].labels[:] = UNKNOWN
    return list(data.classes), splits


def _svhn(root: str) -> tuple[list[str], dict[str, _Split]]:
    splits = {}
    # Its "extra" split is left out: half a million easier images that no protocol counts as training set.
    for split in ("train", "test"):
        data = datasets.SVHN(root, split=split, download=True)
        splits[split] = _Split(data.labels, data.data.transpose(0, 2, 3, 1))
    return _DIGITS, splits


def _food101(root: str) -> tuple[list[str], dict[str, _Split]]:
    # The one set of image files; torchvision has no public name for its list.
    train, test = (datasets.Food101(root, split=split, download=True) for split in ("train", "test"))
    splits = {name: _Split(data._labels, files=data._image_files) for name, data in (("train", train), ("test", test))}
    return list(train.classes), splits


_OPENERS: dict[str, Callable[[str], tuple[list[str], dict[str, _Split]]]] = {
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "fashion_mnist": _fashion_mnist,
    "food101": _food101,
    "stl10": _stl10,
    "svhn": _svhn,
}
