"""Images inside parquet files: a column of bytes, as data set hubs and crawlers keep them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec.core import url_to_fs
from PIL import Image
from pyarrow import parquet

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import refuse_irregular_file
from ulfine_fast.cache.io.json_files import parse_json
from ulfine_fast.cache.io.names import did_you_mean
from ulfine_fast.cache.io.tables import find_column
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
from ulfine_fast.cache.sources.streams import (
    File,
    files_sha256,
    is_local,
    list_files,
    local_path,
    plain_id,
    split_named,
)

SUFFIX = ".parquet"
_ID_COLUMNS = ("id", "key", "__key__")
# Reader threads ask for neighbouring rows: a row group decoded by one serves the others.
_group_lock = threading.Lock()


class ParquetSource:
    """Parquet files with a column of encoded images, and of labels, ids and splits if there are any.

    The images' column holds bytes, or pairs of `bytes` and `path`; a path without bytes is relative to the file.
    Labels are class indices or names, in a column
    `label`, `class`, `cls` or `fine_label`. A row's split is in the column `split`, else in the file's folder or the
    beginning of its name, else it is "train" where there is a column of labels and "unlabeled" where not.

    Attributes:
        kind: "parquet".
        where: what the user named: a file, a folder, a pattern, or any URL that fsspec knows.
        class_names: names for the text tower: from the user's file, else from the files' metadata, else the labels.
        files: the parquet files.
        notes: see `Source`.
    """

    kind = "parquet"

    def __init__(
        self, where: str, *, class_names_file: Path | None = None, class_names: list[str] | None = None
    ) -> None:
        """Reads the files' footers and, where nothing else names the classes, the column of labels.

        Args:
            where: see the class.
            class_names_file: one name a line.
            class_names: instead of a file; an empty list leaves all labels unknown.

        Raises:
            InputError: no such files, files that are not parquet, no column of images, a column that looks like one of
                labels or splits but is not, or no class.
        """
        self.where = where if not is_local(where) else str(Path(local_path(where)).expanduser().absolute())
        self.files = list_files(self.where, SUFFIX)
        self._by_name = {file.name: file for file in self.files}

        # Columns
        source, schema = self.files[0].url, _open_file(self.files[0].url).schema_arrow
        images = [field.name for field in schema if _is_image(field.type)]
        if not images:
            raise InputError(
                f"{source} has no column of encoded images (bytes, or pairs of bytes and path); found "
                f"{', '.join(schema.names) or 'none'}"
            )
        self.notes: list[str] = []
        self._image = choose_column(source, images, IMAGE_COLUMNS, "images", self.notes)
        self._label = find_label_column(source, schema.names, self.notes)
        self._split = find_column(source, schema.names, ["split"])
        self._id = next((name for name in _ID_COLUMNS if name in schema.names), None)

        unnamed = [file.name for file in self.files if file.split is None]
        if self._split is None and unnamed:
            has = "there is a column" if self._label else "there is no column"
            self.notes.append(
                f"the name of {unnamed[0]} says no split; taken as {self._default_split}, since {has} of labels"
            )

        # Classes
        if class_names is None:
            self.class_names, self._labels = self._read_class_names(class_names_file, schema)
        else:
            self.class_names, self._labels = class_names, Labels(class_names)

    def plan(self, shard_size: int) -> list[Part]:
        """Runs of row groups, none much longer than a shard unless a single group is."""
        parts = [
            (split, file.name, f"{first}-{last}")
            for file in self.files
            for first, last in _group_runs(_open_file(file.url), shard_size)
            for split in self._splits_in(file, first, last)
        ]
        # A stable sort, which leaves the runs of a file in their order.
        parts.sort(key=lambda part: (SPLITS.index(part[0]), part[1]))
        return [Part(number, split, None, None, f"{name}#{run}") for number, (split, name, run) in enumerate(parts)]

    def open(self, part: Part) -> list[Row]:
        """The rows of a run of row groups: labels and ids alone, no image."""
        name, _, run = part.name.partition("#")
        first, last = map(int, run.split("-"))
        file = self._by_name[name]
        opened, rows = _open_file(file.url), []
        wanted = [column for column in (self._label, self._id, self._split) if column]
        number = sum(opened.metadata.row_group(group).num_rows for group in range(first))
        for group in range(first, last + 1):
            with _parquet_errors(file.url):
                cells = opened.read_row_group(group, columns=wanted).to_pydict() if wanted else {}
            for index in range(opened.metadata.row_group(group).num_rows):
                values = {column: cells[column][index] for column in wanted}
                if self._split is None or self._split_of(values[self._split], file) == part.split:
                    rows.append(self._row(file, group, index, number, part.split, values))
                number += 1
        return rows

    def close(self, part: Part) -> None:
        """Does nothing: what was read is kept only while neighbours ask for it."""

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        url, group, index = row.location.split("\0")
        if not url:
            raise UnreadableImage(index)
        with _group_lock:
            column = _read_images(url, int(group), self._image)
        try:
            value = column[int(index)].as_py()
        except (IndexError, ValueError) as error:
            raise UnreadableImage("its cell is damaged") from error
        content = value.get("bytes") if isinstance(value, dict) else value
        if content:
            return load_image(bytes(content))
        path = value.get("path") if isinstance(value, dict) else None
        if not path:
            raise UnreadableImage("its cell is empty")
        if not is_local(url):
            raise UnreadableImage("its cell holds a path alone, and the table is not on this machine")
        return load_image(Path(local_path(url)).parent / path)

    def describe(self) -> dict[str, Any]:
        """Kind and location, for the manifest."""
        return {"kind": self.kind, "path": self.where}

    def fingerprint(self) -> str:
        """Hex sha256 over names, splits and sizes of the files."""
        return files_sha256(self.files, self._file_parts)

    @cached_property
    def _file_parts(self) -> list[Part]:
        return [Part(number, file.split or "", None, None, file.name) for number, file in enumerate(self.files)]

    def _read_class_names(self, class_names_file: Path | None, schema: pa.Schema) -> tuple[list[str], Labels]:
        """Class names from the files' metadata or the labels that occur; those of the user's file instead."""
        if self._label is None:
            return needed_labels(class_names_file, "a parquet file without a column of labels")

        declared = _names_in_metadata(schema, self._label)
        # Whole numbers are indices, and a file may name classes that do not occur.
        if not declared and class_names_file is not None and not _is_text(schema.field(self._label).type):
            return needed_labels(class_names_file, "")

        def occurring() -> set[Any]:
            values: set[Any] = set()
            for file in self.files:
                with _parquet_errors(file.url):
                    column = _open_file(file.url).read(columns=[self._label])[self._label]
                    values.update(column.unique().to_pylist())
            return values

        names, labels, notes = labels_of_column(self.where, declared, occurring, class_names_file)
        self.notes += notes
        return names, labels

    def _splits_in(self, file: File, first: int, last: int) -> list[str]:
        """The splits that occur in a run of row groups, in the order of `SPLITS`."""
        if self._split is None:
            return [file.split or self._default_split]
        with _parquet_errors(file.url):
            groups = _open_file(file.url).read_row_groups(list(range(first, last + 1)), columns=[self._split])
            values = groups[self._split].unique().to_pylist()
        present = {self._split_of(value, file) for value in values}
        return [split for split in SPLITS if split in present]

    def _split_of(self, value: Any, file: File) -> str:
        """The split that a cell names."""
        if not value:
            return self._default_split
        split = split_named(str(value))
        if split is None:
            raise InputError(
                f"{file.url}: unknown split {value!r}; use {', '.join(SPLITS)} or leave it empty"
                f"{did_you_mean(value, SPLITS)}"
            )
        return split

    @property
    def _default_split(self) -> str:
        return "train" if self._label else "unlabeled"

    def _row(self, file: File, group: int, index: int, number: int, split: str, values: dict[str, Any]) -> Row:
        """The row at an index of a row group; `number` counts the rows of the whole file."""
        label = self._labels.index(values[self._label] if self._label else None, f"{file.name}, row {number}")
        name = plain_id(file.stem, str(values[self._id]) if self._id else f"{number:08d}")
        if name is None:
            reason = "its id leads elsewhere or does not print"
            return Row(f"{file.stem}/row-{number:08d}", label, split, f"\0\0{reason}", 0)
        return Row(name, label, split, f"{file.url}\0{group}\0{index}", 0)


def holds_images(table: Path) -> bool:
    """Whether a parquet file has a column of encoded images, and not paths of images."""
    try:
        refuse_irregular_file(table)
        schema = parquet.read_schema(table)
    except (pa.ArrowException, OSError, ValueError):  # a ValueError is a name that is not UTF-8
        return False
    return "path" not in schema.names and any(_is_image(field.type) for field in schema)


@contextmanager
def _parquet_errors(url: str) -> Iterator[None]:
    """Turns what Arrow raises for damaged cells into one sentence.

    Raises:
        InputError: names the file.
    """
    try:
        yield
    except InputError:
        raise
    # A ValueError is text that is not UTF-8, or one of Arrow's own errors.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{url} cannot be read as a parquet file ({reason}); write or fetch it again") from error


@lru_cache(maxsize=64)
def _open_file(url: str) -> parquet.ParquetFile:
    """A file with its footer; handles of one process are never used by another, since the cache is not pickled."""
    try:
        if is_local(url):
            refuse_irregular_file(local_path(url))
            return parquet.ParquetFile(local_path(url))
        system, path = url_to_fs(url)
        return parquet.ParquetFile(system.open(path, "rb"))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{url} is not a parquet file: {str(error).splitlines()[0]}") from error


@lru_cache(maxsize=2)
def _read_images(url: str, group: int, column: str) -> pa.ChunkedArray:
    """The encoded images of a row group; two groups are kept, since batches cross from one to the next."""
    try:
        return _open_file(url).read_row_group(group, columns=[column])[column]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UnreadableImage(f"its row group cannot be read: {str(error).splitlines()[0]}") from error


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_image(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value))


def _names_in_metadata(schema: pa.Schema, label: str) -> list[str]:
    """Class names that Hugging Face's writers leave in a file's metadata; empty where there are none."""
    try:
        note = parse_json((schema.metadata or {})[b"huggingface"], dict[str, Any], name="its metadata", fix="")
        names = note["info"]["features"][label]["names"]
    except (KeyError, TypeError, InputError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _group_runs(opened: parquet.ParquetFile, shard_size: int) -> list[tuple[int, int]]:
    """First and last row group of each part."""
    runs: list[tuple[int, int]] = []
    rows = 0
    for group in range(opened.metadata.num_row_groups):
        count = opened.metadata.row_group(group).num_rows
        if runs and rows + count <= shard_size:
            runs[-1] = (runs[-1][0], group)
            rows += count
        else:
            runs.append((group, group))
            rows = count
    return runs
