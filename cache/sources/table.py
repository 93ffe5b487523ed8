"""Images listed in a table with the columns path, label and split."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import did_you_mean
from ulfine_fast.cache.io.tables import SUFFIXES, Table, read_frame, read_table, whole_number
from ulfine_fast.cache.models.prompts import ClassNames
from ulfine_fast.cache.sources.image import load_image
from ulfine_fast.cache.sources.labels import name_classes, suspicious_labels
from ulfine_fast.cache.sources.rows import SPLITS, UNKNOWN, Row, sorted_rows

__all__ = ["SUFFIXES", "ImageTable", "TableSource"]


class TableSource:
    """A `.csv`, `.tsv` or `.parquet` with a column `path`, and `label` and `split` if there are any.

    Paths are absolute or relative to the table's folder. A label is a class name or a whole number; an empty label and
    -1 mean unknown. If all labels are whole numbers the classes are in numeric order, else in the order of the names.
    An empty split means "train" with a label and "unlabeled" without. Other columns are ignored.

    Attributes:
        kind: "table".
        path: the table, absolute.
        class_names: names for the text tower; the labels unless a file gives others.
        rows: see `Source`; a row's id is its path as written in the table.
        notes: see `Source`.
    """

    kind = "table"

    def __init__(self, path: Path, *, class_names_file: Path | None = None) -> None:
        """Reads the table and asks for the size of every image; no image is opened.

        Raises:
            InputError: not a table (see `read_table`), no rows, an unknown split, a training row without a label, a
                path that is missing or there twice, a label below -1, a number written in two ways, or no label at all.
        """
        # Spreadsheet programs leave out empty cells at the end of a line.
        table = read_table(path.absolute(), ["path"], ["label", "split"], fill=True)
        self.path = path.absolute()
        paths, labels = table.texts("path"), table.labels("label")
        _refuse_bad_paths(table, paths)

        # Splits
        splits = table.texts("split")
        for row, (split, label) in enumerate(zip(splits, labels, strict=True)):
            splits[row] = split = split or ("train" if label else "unlabeled")
            if split not in SPLITS:
                raise InputError(
                    f"{table.where(row)}: unknown split {split!r}; use {', '.join(SPLITS)} or leave it empty"
                    f"{did_you_mean(split, SPLITS)}"
                )
            if split == "train" and not label:
                raise InputError(
                    f"{table.where(row)}: a training row without a label; leave its split empty or write unlabeled"
                )

        # Classes
        classes, indices = _classes(table, labels, class_names_file)
        self.class_names = classes.names
        self.notes = [classes.note] if classes.note else []
        self.notes += suspicious_labels(labels)
        indices[""] = UNKNOWN

        # Rows, last because asking for every file's size is the only slow part.
        sizes = _file_sizes(table, paths, self.path.parent)
        self.rows = sorted_rows(
            Row(path, indices[label], split, str(self.path.parent / path), size)
            for path, label, split, size in zip(paths, labels, splits, sizes, strict=True)
        )

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        return load_image(row.location)

    def describe(self) -> dict[str, Any]:
        """Kind and path, for the manifest."""
        return {"kind": self.kind, "path": str(self.path)}


class ImageTable:
    """Images of a table's column `path`, whatever other columns it has: what `predict` reads.

    Attributes:
        kind: "pictures".
        path: the table, absolute; the working folder for a data frame.
        class_names: always empty.
        rows: all in the split "test" with label -1; a row's id is its path as written in the table.
    """

    kind = "pictures"

    def __init__(self, source: Path | Any) -> None:
        """Reads the column and asks for the size of every image; no image is opened.

        Args:
            source: a table file, whose paths are relative to its folder; or a data frame of pandas or Polars, whose
                paths are relative to the working folder.

        Raises:
            InputError: not a table or data frame, no column of that name, no rows, a path that is empty, missing or
                there twice.
        """
        if isinstance(source, Path):
            self.path = source.absolute()
            folder = self.path.parent
            table = read_table(self.path, ["path"], fill=True)
        else:
            self.path = folder = Path.cwd()
            table = read_frame(source, ["path"])
        paths = table.texts("path")
        _refuse_bad_paths(table, paths)
        sizes = _file_sizes(table, paths, folder)
        self.class_names: list[str] = []
        self.rows = sorted_rows(
            Row(path, UNKNOWN, "test", str(folder / path), size) for path, size in zip(paths, sizes, strict=True)
        )

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        return load_image(row.location)

    def describe(self) -> dict[str, Any]:
        """Kind and path."""
        return {"kind": self.kind, "path": str(self.path)}


def _refuse_bad_paths(table: Table, paths: Sequence[str]) -> None:
    if not paths:
        raise InputError(f"{table.source} has no rows")
    if "" in paths:
        raise InputError(f"{table.where(paths.index(''))}: the path is empty")
    path, times = Counter(paths).most_common(1)[0]
    if times > 1:
        raise InputError(f"{table.source} lists {path} {times} times; every path must be there once")


def _file_sizes(table: Table, paths: Sequence[str], folder: Path) -> list[int]:
    """Sizes in bytes; one sentence for all files that are missing, since one is rarely missing alone."""
    # os.path says False where pathlib raises, such as for a path with a NUL or one that is too long.
    missing = [row for row, path in enumerate(paths) if not os.path.isfile(folder / path)]
    if missing:
        raise InputError(
            f"{table.where(missing[0])}: {paths[missing[0]]} is not there ({len(missing)} of {len(paths)} paths are "
            f"missing); paths are relative to {folder}"
        )
    return [os.stat(folder / path).st_size for path in paths]


def _classes(table: Table, labels: Sequence[str], class_names_file: Path | None) -> tuple[ClassNames, dict[str, int]]:
    """Class names, and the class index of every known label.

    Without a file the labels are the names, whole numbers in numeric order. For files see `match_class_names`: a class
    without a row here may have its name in one as well.
    """
    known = sorted({label for label in labels if label})
    if not known:
        raise InputError(f"{table.source} has no label in any row; at least the training rows need one")
    if all(whole_number(label) is not None for label in known):
        _refuse_bad_numbers(table, known)
        # As text 10 would come before 9.
        known.sort(key=int)
    return name_classes(known, class_names_file)


def _refuse_bad_numbers(table: Table, labels: Sequence[str]) -> None:
    lowest = min(map(int, labels))
    if lowest < 0:
        raise InputError(f"{table.source} has the label {lowest}; use numbers from 0, and -1 for unknown")
    number, times = Counter(map(int, labels)).most_common(1)[0]
    if times > 1:
        same = [label for label in labels if int(label) == number]
        raise InputError(f"{table.source} writes one label in several ways, {' and '.join(same)}; use one of them")
