"""Images inside parquet files: a column of bytes, as data set hubs and crawlers keep them."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec.core import url_to_fs
from PIL import Image
from pyarrow import parquet

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.sources.image import UnreadableImage, load_image
from ulfine_fast.cache.sources.rows import SPLITS, Part, Row
from ulfine_fast.cache.sources.streams import (
    File,
    Labels,
    classes_of,
    files_sha256,
    is_local,
    list_files,
    local_path,
    names_or_refuse,
    plain_id,
    split_named,
)

SUFFIX = ".parquet"
LABELS = ("label", "class", "cls", "fine_label")
IDS = ("id", "key", "__key__")
# Reader threads ask for neighbouring rows: a row group decoded by one serves the others.
_GROUPS = threading.Lock()


class ParquetSource:
    """Parquet files with a column of encoded images, and of labels, ids and splits if there are any.

    The images' column holds bytes, or pairs of `bytes` and `path`. Labels are class indices or names, in a column
    `label`, `class`, `cls` or `fine_label`. A row's split is what the column `split` says, else the file's folder or
    the beginning of its name, else "train" where there is a column of labels and "unlabeled" where not.

    Attributes:
        kind: "parquet".
        where: what the user named: a file, a folder, a pattern, or any URL that fsspec knows.
        class_names: names for the text tower: from the user's file, else what the files say of their labels, else the
            labels themselves.
        files: the parquet files.
    """

    kind = "parquet"

    def __init__(
        self, where: str, *, class_names_file: Path | None = None, class_names: list[str] | None = None
    ) -> None:
        """Reads the files' footers and, where nothing else tells the classes, the column of labels.

        Args:
            where: see the class.
            class_names_file: one name a line.
            class_names: instead of a file; an empty list leaves all labels unknown.

        Raises:
            InputError: nothing there, files that are not parquet, no column of images, or no class.
        """
        self.where = where if not is_local(where) else str(Path(local_path(where)).expanduser().absolute())
        self.files = list_files(self.where, SUFFIX)
        self._by_name = {file.name: file for file in self.files}
        schema = _opened(self.files[0].url).schema_arrow
        self._image = _image_column(self.files[0], schema)
        self._label, self._id, self._split = (
            next((name for name in names if name in schema.names), None) for names in (LABELS, IDS, ("split",))
        )
        if class_names is None:
            class_names = self._classes(class_names_file, schema)
        self.class_names = class_names
        self._labels = Labels(self.class_names)

    def plan(self, shard_size: int) -> list[Part]:
        """Runs of row groups, none much longer than a shard unless a single group is."""
        parts = [
            (split, f"{file.name}#{first}-{last}")
            for file in self.files
            for first, last in _runs(_opened(file.url), shard_size)
            for split in self._splits(file, first, last)
        ]
        ordered = sorted(parts, key=lambda pair: (SPLITS.index(pair[0]), pair[1].partition("#")[0]))
        return [Part(number, split, None, None, name) for number, (split, name) in enumerate(ordered)]

    def open(self, part: Part) -> list[Row]:
        """The rows of some row groups: labels and ids alone, no image."""
        name, _, span = part.name.partition("#")
        first, last = map(int, span.split("-"))
        return [row for group in range(first, last + 1) for row in self._rows(self._by_name[name], group, part.split)]

    def close(self, part: Part) -> None:
        """Nothing to do: what was read is kept only while neighbours ask for it."""

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        url, group, place = row.location.split("\0")
        if not url:
            raise UnreadableImage(place)
        with _GROUPS:
            column = _images(url, int(group), self._image)
        value = column[int(place)].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not content:
            raise UnreadableImage("its cell is empty")
        return load_image(bytes(content))

    def describe(self) -> dict[str, Any]:
        """Kind and place, for the manifest."""
        return {"kind": self.kind, "path": self.where}

    def fingerprint(self) -> str:
        """Hex sha256 over names, splits and sizes of the files."""
        return files_sha256(self.files, self._file_parts)

    @cached_property
    def _file_parts(self) -> list[Part]:
        return [Part(number, file.split or "", None, None, file.name) for number, file in enumerate(self.files)]

    def _classes(self, class_names_file: Path | None, schema: pa.Schema) -> list[str]:
        if class_names_file is not None or self._label is None:
            return names_or_refuse(class_names_file, "a parquet file without a column of labels")
        told = _told_names(schema, self._label)
        if told:
            return told
        found: set[Any] = set()
        for file in self.files:
            found.update(_opened(file.url).read(columns=[self._label])[self._label].unique().to_pylist())
        return classes_of(found, self.where)

    def _splits(self, file: File, first: int, last: int) -> list[str]:
        """The splits that occur in some row groups, in their order."""
        if self._split is None:
            return [file.split or ("train" if self._label else "unlabeled")]
        groups = _opened(file.url).read_row_groups(list(range(first, last + 1)), columns=[self._split])
        found = {self._split_of(value, file) for value in groups[self._split].unique().to_pylist()}
        return [split for split in SPLITS if split in found]

    def _split_of(self, value: Any, file: File) -> str:
        if not value:
            return "train" if self._label else "unlabeled"
        split = split_named(str(value))
        if split is None:
            raise InputError(f"{file.url}: unknown split {value!r}; use {', '.join(SPLITS)} or leave it empty")
        return split

    def _rows(self, file: File, group: int, split: str) -> list[Row]:
        opened = _opened(file.url)
        wanted = [name for name in (self._label, self._id, self._split) if name]
        count = opened.metadata.row_group(group).num_rows
        columns = opened.read_row_group(group, columns=wanted).to_pydict() if wanted else {}
        before = sum(opened.metadata.row_group(k).num_rows for k in range(group))
        return [
            self._row(file, group, place, before + place, split, {name: columns[name][place] for name in wanted})
            for place in range(count)
            if self._split is None or self._split_of(columns[self._split][place], file) == split
        ]

    def _row(self, file: File, group: int, place: int, number: int, split: str, cells: dict[str, Any]) -> Row:
        key = str(cells[self._id]) if self._id else f"{number:08d}"
        name, where = plain_id(file.stem, key), f"{file.name}, row {number}"
        label = self._labels.of(cells[self._label] if self._label else None, where)
        if name is None:
            return Row(f"{file.stem}/row-{number:08d}", label, split, "\0\0its id leads elsewhere or does not print", 0)
        return Row(name, label, split, f"{file.url}\0{group}\0{place}", 0)


def holds_images(table: Path) -> bool:
    """Whether a parquet file has a column of encoded images, and not paths of images."""
    try:
        schema = parquet.read_schema(table)
    except (pa.ArrowException, OSError):
        return False
    return "path" not in schema.names and any(_is_image(field.type) for field in schema)


@lru_cache(maxsize=64)
def _opened(url: str) -> parquet.ParquetFile:
    """A file's footer; handles of one process are never used by another, since the cache is not pickled."""
    try:
        if is_local(url):
            return parquet.ParquetFile(local_path(url))
        system, path = url_to_fs(url)
        return parquet.ParquetFile(system.open(path, "rb"))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{url} is not a parquet file: {str(error).splitlines()[0]}") from error


@lru_cache(maxsize=2)
def _images(url: str, group: int, column: str) -> pa.ChunkedArray:
    """The encoded images of a row group; two are kept, since batches cross from one to the next."""
    try:
        return _opened(url).read_row_group(group, columns=[column])[column]
    except (pa.ArrowException, OSError) as error:
        raise UnreadableImage(f"its row group cannot be read: {str(error).splitlines()[0]}") from error


def _image_column(file: File, schema: pa.Schema) -> str:
    found = [field.name for field in schema if _is_image(field.type)]
    if not found:
        raise InputError(
            f"{file.url} has no column of encoded images (bytes, or pairs of bytes and path); found "
            f"{', '.join(schema.names) or 'none'}"
        )
    return found[0]


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_image(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _told_names(schema: pa.Schema, label: str) -> list[str]:
    """Class names that Hugging Face's writers leave in a file's metadata; none where there are none."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in told] if isinstance(told, list) else []


def _runs(opened: parquet.ParquetFile, shard_size: int) -> Sequence[tuple[int, int]]:
    """First and last row group of each part."""
    runs: list[tuple[int, int]] = []
    rows = 0
    for group in range(opened.metadata.num_row_groups):
        count = opened.metadata.row_group(group).num_rows
        if runs and rows + count <= shard_size:
            runs[-1], rows = (runs[-1][0], group), rows + count
        else:
            runs.append((group, group))
            rows = count
    return runs
