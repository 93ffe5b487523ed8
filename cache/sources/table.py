"""Images listed in a table: csv or parquet with the columns path, label and split."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.prompts import count_names, read_class_names
from ulfine_fast.cache.sources.image import load_image
from ulfine_fast.cache.sources.rows import SPLITS, UNKNOWN, Row, in_order

COLUMNS = ("path", "label", "split")
SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of the table as text; `number` counts data lines from 1."""

    number: int
    path: str
    label: str
    split: str


class TableSource:
    """A `.csv` (UTF-8, comma) or `.parquet` with a column `path`, and `label` and `split` if there are any.

    Paths are absolute or relative to the table's folder. A label is a class name or a whole number; if all are whole
    numbers the classes are in numeric order, else in the order of the names. An empty label means unknown. An empty
    split means "train" with a label and "unlabeled" without. Other columns are ignored.

    Attributes:
        kind: "table".
        path: the table, absolute.
        class_names: names for the text tower; the labels unless a file gives others.
        rows: see `Source`; a row's id is its path as the table has it.
    """

    kind = "table"

    def __init__(self, path: Path, *, class_names_file: Path | None = None) -> None:
        """Reads the table and asks for the size of every image; no image is opened.

        Raises:
            InputError: no such table, a column is missing, no rows, an unknown split, a training row without a label,
                a path that is not there, one path twice, or no label at all.
        """
        self.path = path.absolute()
        lines = _read_lines(self.path)
        _refuse_bad_lines(self.path, lines)
        labels = _sorted_labels({line.label for line in lines if line.label})
        if not labels:
            raise InputError(f"{path} has no label in any row; at least the training rows need one")
        if class_names_file is None:
            self.class_names = labels
        else:
            labels = _labels_for(labels, class_names_file)
            self.class_names = read_class_names(class_names_file, labels)
        # An empty label is a key like any other, so that rows need no special case.
        index = {label: place for place, label in enumerate(labels)} | {"": UNKNOWN}
        # Last, because asking for every file's size is the only slow part.
        sizes = _sizes(self.path, lines)
        self.rows = in_order(
            Row(line.path, index[line.label], line.split, str(self.path.parent / line.path), size)
            for line, size in zip(lines, sizes, strict=True)
        )

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        return load_image(row.location)

    def describe(self) -> dict[str, Any]:
        """Kind and path, for the manifest."""
        return {"kind": self.kind, "path": str(self.path)}


class ImageTable:
    """Images of a table's column `path`, whatever else it holds: what `predict` reads.

    Attributes:
        kind: "pictures".
        path: the table, absolute; the working folder for a data frame.
        class_names: always empty.
        rows: all in the split "test" with label -1; a row's id is its path as the table has it.
    """

    kind = "pictures"

    def __init__(self, table: Path | Any) -> None:
        """Reads the column and asks for the size of every image; no image is opened.

        Args:
            table: a csv or parquet file, whose paths are relative to its folder; or a data frame of pandas or Polars,
                whose are relative to the working folder.

        Raises:
            InputError: no such table, no column of that name, no rows, a path that is empty, missing or there twice.
        """
        if isinstance(table, Path):
            self.path = table.absolute()
            paths = [line.path for line in _read_lines(self.path)]
        else:
            self.path = Path.cwd() / "the data frame"  # its place, for sentences; there is no such file
            paths = _frame_paths(table)
        lines = [_Line(number, path, "", "test") for number, path in enumerate(paths, start=1)]
        _refuse_bad_lines(self.path, lines)
        self.class_names: list[str] = []
        self.rows = in_order(
            Row(line.path, UNKNOWN, "test", str(self.path.parent / line.path), size)
            for line, size in zip(lines, _sizes(self.path, lines), strict=True)
        )

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        return load_image(row.location)

    def describe(self) -> dict[str, Any]:
        """Kind and path."""
        return {"kind": self.kind, "path": str(self.path)}


def _frame_paths(frame: Any) -> list[str]:
    """The column `path` of a data frame, by Arrow's protocol, which pandas and Polars both speak."""
    try:
        table = pa.table(frame)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(f"images must be a path or a data frame with a column path, got {type(frame)}") from error
    _require_path(Path("the data frame"), table.column_names)
    return ["" if path is None else str(path) for path in table["path"].to_pylist()]


def _read_lines(table: Path) -> list[_Line]:
    if not os.path.isfile(table):
        raise InputError(f"no such table: {table}")
    columns = _read_parquet(table) if table.suffix.lower() == ".parquet" else _read_csv(table)
    return [
        _Line(number, path, label, split or ("train" if label else "unlabeled"))
        for number, (path, label, split) in enumerate(zip(*columns, strict=True), start=1)
    ]


def _read_csv(table: Path) -> list[list[str]]:
    """The three columns as text, empty where the table has none."""
    try:
        # utf-8-sig, because spreadsheet programs put a byte order mark before the first column's name.
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _require_path(table, reader.fieldnames or [])
            # A short line leaves None behind.
            rows = [[(row.get(name) or "").strip() for name in COLUMNS] for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{table} is not a UTF-8 csv file: {error}") from error
    return [list(column) for column in zip(*rows, strict=True)] or [[], [], []]


def _read_parquet(table: Path) -> list[list[str]]:
    try:
        names = parquet.read_schema(table).names
        _require_path(table, names)
        wanted = [name for name in COLUMNS if name in names]
        # Only the columns used: a table may hold embeddings or the images themselves beside them.
        content = parquet.read_table(table, columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{table} is not a parquet file: {str(error).splitlines()[0]}") from error
    empty = [""] * content.num_rows
    return [[_as_text(value) for value in content[name].to_pylist()] if name in wanted else empty for name in COLUMNS]


def _as_text(value: object) -> str:
    """A cell as text; 3.0 becomes 3, since tables with missing numbers hold floats, and nan becomes empty."""
    # nan is the one value that differs from itself
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _require_path(table: Path, found: Sequence[str]) -> None:
    if "path" not in found:
        raise InputError(f"{table} needs a column path (and label, split); found {', '.join(found) or 'none'}")


def _refuse_bad_lines(table: Path, lines: list[_Line]) -> None:
    if not lines:
        raise InputError(f"{table} has no rows")
    for line in lines:
        where = f"{table}, row {line.number}"
        if not line.path:
            raise InputError(f"{where}: the path is empty")
        if line.split not in SPLITS:
            raise InputError(f"{where}: unknown split {line.split!r}; use {', '.join(SPLITS)} or leave it empty")
        if line.split == "train" and not line.label:
            raise InputError(f"{where}: a training row without a label; leave its split empty or write unlabeled")
    path, times = Counter(line.path for line in lines).most_common(1)[0]
    if times > 1:
        raise InputError(f"{table} lists {path} {times} times; every path must be there once")


def _sizes(table: Path, lines: list[_Line]) -> list[int]:
    """File sizes; one sentence for all that are missing, since one is rarely missing alone."""
    paths = [table.parent / line.path for line in lines]
    # os.path says False where pathlib raises, such as for a path with a NUL or one that is too long.
    missing = [line for line, path in zip(lines, paths, strict=True) if not os.path.isfile(path)]
    if missing:
        raise InputError(
            f"{table}, row {missing[0].number}: {missing[0].path} is not there ({len(missing)} of {len(lines)} paths "
            f"are missing); paths are relative to {table.parent}"
        )
    return [os.stat(path).st_size for path in paths]


def _sorted_labels(labels: set[str]) -> list[str]:
    # As text 10 would come before 9.
    return sorted(labels, key=int) if all(_is_whole(label) for label in labels) else sorted(labels)


def _labels_for(labels: list[str], names_file: Path) -> list[str]:
    """The labels that a list of names stands for.

    Numbers are places in the list, so a class that has no row here still gets its name; other labels are as found.
    """
    if not all(_is_whole(label) for label in labels) or names_file.suffix.lower() == ".csv" or int(labels[0]) < 0:
        return labels
    places = [str(place) for place in range(count_names(names_file))]
    return places if int(labels[-1]) < len(places) else labels


def _is_whole(label: str) -> bool:
    return label.removeprefix("-").isascii() and label.removeprefix("-").isdigit()
