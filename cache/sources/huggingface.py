"""Data sets of Hugging Face's `datasets`: saved on this machine, or by name."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.prompts import read_class_names
from ulfine_fast.cache.sources.image import UnreadableImage, load_image
from ulfine_fast.cache.sources.parquet_images import LABELS
from ulfine_fast.cache.sources.rows import SPLITS, Part, Row
from ulfine_fast.cache.sources.streams import Labels, classes_of, names_or_refuse, split_named

PREFIX = "hf:"
_MARKS = ("dataset_dict.json", "dataset_info.json")


class HuggingFaceSource:
    """`hf:FOLDER`, as `save_to_disk` leaves it, or `hf:OWNER/NAME`, which `datasets` downloads once.

    The first column of images is used, and the column `label`, `class`, `cls` or `fine_label`. Splits are known by
    their names (train, validation, test, unlabeled and what people write instead); others are left aside. An image's
    id is its split and its number there.

    Attributes:
        kind: "huggingface".
        where: the folder or the name, without `hf:`.
        class_names: names for the text tower: from the user's file, else what the data set says, else the labels.
    """

    kind = "huggingface"

    def __init__(
        self, where: str, *, class_names_file: Path | None = None, class_names: list[str] | None = None
    ) -> None:
        """Opens the data set; no image is decoded.

        Args:
            where: a folder or a name.
            class_names_file: names for the classes that the data set has.
            class_names: instead of a file; an empty list leaves all labels unknown.

        Raises:
            InputError: `datasets` is not installed, nothing there, no known split, or no column of images.
        """
        self.where = str(Path(where).expanduser().absolute()) if os.path.isdir(os.path.expanduser(where)) else where
        first = next(iter(self._splits.values()))
        self._image = _image_column(self.where, first)
        self._label = next((name for name in LABELS if name in first.column_names), None)
        self.class_names = self._classes(class_names_file) if class_names is None else class_names
        self._labels = Labels(self.class_names)

    def __getstate__(self) -> dict[str, Any]:
        """Without the open data set: readers open their own, which costs a moment."""
        return {name: value for name, value in self.__dict__.items() if name != "_splits"}

    def plan(self, shard_size: int) -> list[Part]:
        """Slices of the splits."""
        slices = [
            (split, f"{split}#{start}-{min(start + shard_size, len(self._splits[split]))}")
            for split in SPLITS
            if split in self._splits
            for start in range(0, len(self._splits[split]), shard_size)
        ]
        return [Part(number, split, None, None, name) for number, (split, name) in enumerate(slices)]

    def open(self, part: Part) -> list[Row]:
        """The rows of a slice: labels alone, no image."""
        start, stop = map(int, part.name.partition("#")[2].split("-"))
        labels = self._splits[part.split][self._label][start:stop] if self._label else [None] * (stop - start)
        rows = []
        for number, label in enumerate(labels, start=start):
            known = self._labels.of(label, f"{part.split}, row {number}")
            rows.append(Row(f"{part.split}/{number:08d}", known, part.split, str(number), 0))
        return rows

    def close(self, part: Part) -> None:
        """Nothing to do: the data set lies mapped in memory."""

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        value = self._splits[row.split][int(row.location)][self._image]
        content = value.get("bytes") if isinstance(value, dict) else value
        if content:
            return load_image(bytes(content))
        if isinstance(value, dict) and value.get("path"):
            return load_image(str(value["path"]))
        raise UnreadableImage("its cell is empty")

    def describe(self) -> dict[str, Any]:
        """Kind and place, for the manifest."""
        return {"kind": self.kind, "path": self.where}

    def fingerprint(self) -> str:
        """Hex sha256 over the splits' names, lengths and the data set's own fingerprints."""
        digest = hashlib.sha256()
        for split in SPLITS:
            if split in self._splits:
                digest.update(f"{split}\0{len(self._splits[split])}\0{self._splits[split].info.features}\n".encode())
        return digest.hexdigest()

    @cached_property
    def _splits(self) -> dict[str, Any]:
        """The data set's splits by our names, images left encoded."""
        found = _load(self.where)
        splits = found.items() if hasattr(found, "items") else [(str(found.split or "train"), found)]
        known = {split: data for name, data in splits if (split := split_named(name)) is not None and len(data)}
        if not known:
            raise InputError(f"{self.where} has no split called train, unlabeled, val or test that holds images")
        return {split: _encoded(data) for split, data in known.items()}

    def _classes(self, class_names_file: Path | None) -> list[str]:
        if self._label is None:
            return names_or_refuse(class_names_file, f"{self.where}, which has no column of labels,")
        told = next(iter(self._splits.values())).features[self._label]
        names = list(getattr(told, "names", None) or [])
        if not names:
            found = {label for data in self._splits.values() for label in data.unique(self._label)}
            names = classes_of(found, self.where)
        return names if class_names_file is None else read_class_names(class_names_file, names)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` made the folder."""
    # os.path says False where pathlib raises, such as for a name that is too long
    return any(os.path.isfile(folder / name) for name in _MARKS)


def _load(where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError('data sets of Hugging Face need a package: pip install "ulfine-fast[datasets]"') from error
    try:
        return datasets.load_from_disk(where) if os.path.isdir(where) else datasets.load_dataset(where)
    # whatever the network, the hub or a damaged file raised
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"the data set {where} cannot be opened ({reason}); name a folder it is saved in") from error


def _encoded(data: Any) -> Any:
    """Images as the bytes they were stored as: they are decoded where all others are."""
    import datasets

    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    return data


def _image_column(where: str, data: Any) -> str:
    import datasets

    found = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
    if not found:
        raise InputError(f"{where} has no column of images; found {', '.join(data.column_names) or 'none'}")
    return found[0]
