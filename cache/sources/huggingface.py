"""Data sets of Hugging Face's `datasets`: saved on this machine, or by name."""

from __future__ import annotations

import hashlib
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ulfine_fast.cache.io.errors import InputError, one_line
from ulfine_fast.cache.io.hub import load_from_hub
from ulfine_fast.cache.sources.image import UnreadableImage, load_image
from ulfine_fast.cache.sources.labels import (
    IMAGE_COLUMNS,
    Labels,
    choose_column,
    find_label_column,
    labels_of_column,
    needed_labels,
)
from ulfine_fast.cache.sources.rows import SPLITS, Part, Row
from ulfine_fast.cache.sources.streams import split_named

PREFIX = "hf:"
_MARKS = ("dataset_dict.json", "dataset_info.json")
# NAME or OWNER/NAME; everything else is a folder
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_SAVED_FIX = "name a folder it is saved in"


class HuggingFaceSource:
    """`hf:FOLDER`, as `save_to_disk` leaves it, or `hf:OWNER/NAME`, which `datasets` downloads once.

    Of several columns of images the one called `image`, `img` or like a format is used, else the first; labels are in
    the column `label`, `class`, `cls` or `fine_label`. Splits are known by their names (train, validation, test,
    unlabeled and their usual synonyms); others are passed over. An image's id is its split and its number there.

    Attributes:
        kind: "huggingface".
        where: the folder or the name, without `hf:`.
        class_names: names for the text tower: from the user's file, else from the data set, else the labels.
        notes: see `Source`.
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
            InputError: `datasets` is not installed, no such data set, no known split, no column of images, or a column
                that looks like one of labels but is not.
        """
        self.where = str(Path(where).expanduser().absolute()) if os.path.isdir(os.path.expanduser(where)) else where
        self._splits, self.notes = _known_splits(self.where)
        first = next(iter(self._splits.values()))
        self._image = choose_column(self.where, _image_columns(self.where, first), IMAGE_COLUMNS, "images", self.notes)
        self._label = find_label_column(self.where, first.column_names, self.notes)
        if class_names is None:
            self.class_names, self._labels = self._read_class_names(class_names_file)
        else:
            self.class_names, self._labels = class_names, Labels(class_names)

    def __getstate__(self) -> dict[str, Any]:
        """Without the open data set: readers open it again, which costs a moment."""
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
        for number, value in enumerate(labels, start=start):
            label = self._labels.index(value, f"{part.split}, row {number}")
            rows.append(Row(f"{part.split}/{number:08d}", label, part.split, str(number), 0))
        return rows

    def close(self, part: Part) -> None:
        """Does nothing: the data set is mapped into memory."""

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        value = self._splits[row.split][int(row.location)][self._image]
        content = value.get("bytes") if isinstance(value, dict) else value
        if content:
            return load_image(bytes(content))
        if isinstance(value, dict) and value.get("path"):
            # A path that is absolute stays as it is.
            return load_image(Path(self.where) / str(value["path"]))
        raise UnreadableImage("its cell is empty")

    def describe(self) -> dict[str, Any]:
        """Kind and location, for the manifest."""
        return {"kind": self.kind, "path": self.where}

    def fingerprint(self) -> str:
        """Hex sha256 over the names, lengths and features of the splits."""
        digest = hashlib.sha256()
        for split in SPLITS:
            if split in self._splits:
                digest.update(f"{split}\0{len(self._splits[split])}\0{self._splits[split].info.features}\n".encode())
        return digest.hexdigest()

    @cached_property
    def _splits(self) -> dict[str, Any]:
        """The data set's splits by our names, opened again in a reader process."""
        return _known_splits(self.where)[0]

    def _read_class_names(self, class_names_file: Path | None) -> tuple[list[str], Labels]:
        """Class names from the data set or the labels that occur; those of the user's file instead."""
        if self._label is None:
            return needed_labels(class_names_file, f"{self.where}, which has no column of labels,")

        # A column of class labels declares its numbers as indices.
        declared = [_declared_names(data, self._label) for data in self._splits.values()]
        if any(names != declared[0] for names in declared):
            raise InputError(f"the splits of {self.where} have other class names, or in another order; save them alike")

        def occurring() -> set[Any]:
            return {label for data in self._splits.values() for label in data.unique(self._label)}

        names, labels, notes = labels_of_column(self.where, declared[0], occurring, class_names_file)
        self.notes += notes
        return names, labels


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` made the folder."""
    # os.path says False where pathlib raises, such as for a name that is too long.
    return any(os.path.isfile(folder / name) for name in _MARKS)


def _open(where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError('data sets of Hugging Face need a package: pip install "ulfine-fast[datasets]"') from error
    if not os.path.isdir(where) and _HUB_NAME.fullmatch(where):
        return load_from_hub(lambda: datasets.load_dataset(where), f"the images of {where}", _SAVED_FIX)
    try:
        return datasets.load_from_disk(where)
    # Whatever a damaged file raised.
    except Exception as error:
        raise InputError(f"the data set {where} cannot be opened ({one_line(error)}); {_SAVED_FIX}") from error


def _known_splits(where: str) -> tuple[dict[str, Any], list[str]]:
    """The data set's splits by our names, and notes on the others; images stay as they were stored.

    Raises:
        InputError: no such data set, two splits of one meaning, or none that is known and holds images.
    """
    opened = _open(where)
    import datasets

    named = opened.items() if hasattr(opened, "items") else [(str(opened.split or "train"), opened)]
    splits: dict[str, Any] = {}
    names: dict[str, str] = {}
    notes = []
    for name, data in named:
        split = split_named(name)
        if split in names:
            raise InputError(f"{where} has the splits {names[split]} and {name}, which are both {split}; keep one")
        if split is None:
            notes.append(f"the split {name} is passed over; known are {', '.join(SPLITS)}")
        elif len(data):
            names[split] = name
            for column, feature in data.features.items():
                if isinstance(feature, datasets.Image):
                    data = data.cast_column(column, datasets.Image(decode=False))  # `load_image` decodes them
            splits[split] = data
    if not splits:
        raise InputError(f"{where} has no split called train, unlabeled, val or test that holds images")
    return splits, notes


def _declared_names(data: Any, label: str) -> list[str]:
    """Names of a column of class labels; empty for other columns."""
    return list(getattr(data.features.get(label), "names", None) or [])


def _image_columns(where: str, data: Any) -> list[str]:
    import datasets

    columns = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise InputError(f"{where} has no column of images; found {', '.join(data.column_names) or 'none'}")
    return columns
