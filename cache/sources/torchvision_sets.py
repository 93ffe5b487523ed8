"""Data sets that torchvision knows by name."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.models.prompts import read_class_names
from ulfine_fast.cache.sources.image import UnreadableImage, load_image
from ulfine_fast.cache.sources.rows import UNKNOWN, Row, in_order

NAMES = ("cifar10", "cifar100", "fashion_mnist", "food101", "stl10", "svhn")
# Where Debian's package dataset-fashion-mnist puts the files.
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_DIGITS = [str(digit) for digit in range(10)]
_FILES = "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


class _Part:
    """One split: labels (n,) and pixels (n, H, W) or (n, H, W, 3) uint8, or image files."""

    def __init__(self, labels: Any, pixels: np.ndarray | None = None, files: list[Path] | None = None) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.pixels, self.files = pixels, files

    def location(self, place: int) -> tuple[str, int]:
        """Where image `place` is, as text, and its size in bytes."""
        if self.files is not None:
            return str(self.files[place]), self.files[place].stat().st_size
        assert self.pixels is not None
        return str(place), int(self.pixels[0].nbytes)


class TorchvisionSource:
    """A data set by name, with torchvision's own classes and splits; stl10 has an unlabelled split too.

    fashion_mnist is read from `idx_folder` where its files are there. Everything else is downloaded by torchvision
    once, into the `datasets` folder of `cache_home()`.

    Attributes:
        kind: "torchvision".
        name: one of `NAMES`.
        class_names: names for the text tower.
        rows: see `Source`; ids are like "train/00012", the place in the data set's own order.
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
            raise InputError(f"unknown data set {name!r}; torchvision sets known here: {', '.join(NAMES)}")
        self.name, self._idx_folder = name, idx_folder
        classes, self._parts = self._open()
        self.class_names = classes if class_names_file is None else read_class_names(class_names_file, classes)
        self.rows = in_order(row for split, part in self._parts.items() for row in _rows(split, part))

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        pixels = self._parts[row.split].pixels
        if pixels is None:
            return load_image(row.location)
        try:
            # Some sets are views with the channels first in memory, which PIL cannot take.
            return Image.fromarray(np.ascontiguousarray(pixels[int(row.location)])).convert("RGB")
        except (IndexError, ValueError) as error:
            raise UnreadableImage(f"no image {row.location} in {self.name}: {error}") from error

    def describe(self) -> dict[str, Any]:
        """Kind, name, and where the files were if not in the usual place."""
        # The usual place is left out, so that manifests from two machines agree.
        described = {"kind": self.kind, "name": self.name}
        return described if self._idx_folder == FASHION_MNIST_FOLDER else described | {"path": str(self._idx_folder)}

    def _open(self) -> tuple[list[str], dict[str, _Part]]:
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


def _rows(split: str, part: _Part) -> list[Row]:
    rows = []
    for place, label in enumerate(part.labels.tolist()):
        location, size = part.location(place)
        # Five digits, so that the order by id is the data set's own.
        rows.append(Row(f"{split}/{place:05d}", label, split, location, size))
    return rows


def _from_idx(folder: Path) -> dict[str, _Part]:
    """Train and test from gzipped IDX files; the headers say how many images of which size."""
    arrays = [_read_idx(folder / f"{file}.gz") for file in _FILES]
    for pixels, labels in (arrays[:2], arrays[2:]):
        if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels):
            raise InputError(f"the IDX files in {folder} do not belong together: {pixels.shape} and {labels.shape}")
    return {"train": _Part(arrays[1], arrays[0]), "test": _Part(arrays[3], arrays[2])}


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zero bytes, type 8, number of axes, then each axis as a big-endian 32-bit number."""
    try:
        with gzip.open(path) as file:
            data = file.read()
        # The fourth byte says how many numbers of the shape follow.
        axes = data[3]
        shape = np.frombuffer(data, ">i4", count=axes, offset=4)
        if data[:3] != b"\0\0\x08":
            raise ValueError("it is not an IDX file of bytes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _cifar10(root: str) -> tuple[list[str], dict[str, _Part]]:
    train, test = (datasets.CIFAR10(root, train=train, download=True) for train in (True, False))
    return list(train.classes), {"train": _Part(train.targets, train.data), "test": _Part(test.targets, test.data)}


def _cifar100(root: str) -> tuple[list[str], dict[str, _Part]]:
    train, test = (datasets.CIFAR100(root, train=train, download=True) for train in (True, False))
    return list(train.classes), {"train": _Part(train.targets, train.data), "test": _Part(test.targets, test.data)}


def _fashion_mnist(root: str) -> tuple[list[str], dict[str, _Part]]:
    train, test = (datasets.FashionMNIST(root, train=train, download=True) for train in (True, False))
    parts = {"train": _Part(train.targets, train.data.numpy()), "test": _Part(test.targets, test.data.numpy())}
    return list(train.classes), parts


def _stl10(root: str) -> tuple[list[str], dict[str, _Part]]:
    parts = {}
    for split in ("train", "unlabeled", "test"):
        part = datasets.STL10(root, split=split, download=True)
        # (n, 3, H, W) to (n, H, W, 3) as a view: the unlabelled split alone is 2.8 GB
        parts[split] = _Part(part.labels, part.data.transpose(0, 2, 3, 1))
    parts["unlabeled"].labels[:] = UNKNOWN
    return list(part.classes), parts


def _svhn(root: str) -> tuple[list[str], dict[str, _Part]]:
    parts = {}
    # Its "extra" split is left out: half a million easier images that no protocol counts as training set.
    for split in ("train", "test"):
        part = datasets.SVHN(root, split=split, download=True)
        parts[split] = _Part(part.labels, part.data.transpose(0, 2, 3, 1))
    return _DIGITS, parts


def _food101(root: str) -> tuple[list[str], dict[str, _Part]]:
    # The one set of image files; torchvision has no public name for its list.
    train, test = (datasets.Food101(root, split=split, download=True) for split in ("train", "test"))
    parts = {"train": train, "test": test}
    return list(train.classes), {name: _Part(part._labels, files=part._image_files) for name, part in parts.items()}


_OPENERS: dict[str, Callable[[str], tuple[list[str], dict[str, _Part]]]] = {
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "fashion_mnist": _fashion_mnist,
    "food101": _food101,
    "stl10": _stl10,
    "svhn": _svhn,
}
