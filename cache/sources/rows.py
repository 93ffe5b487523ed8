"""What a source of images is: rows in a fixed order, and a way to read the image of a row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL import Image

# This order is the order of the rows, and of the codes in a shard.
SPLITS = ("train", "unlabeled", "val", "test")
UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class Row:
    """One image.

    Attributes:
        id: unique in the source, the same on every machine, always encodable as UTF-8.
        label: class index, or -1 if unknown. A label in the split "unlabeled" serves only to score pseudo-labels.
        split: one of `SPLITS`.
        location: where the source finds the image: a path, or an index as text.
        bytes: size of the file, or of the pixels where there is no file per image.
    """

    id: str
    label: int
    split: str
    location: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """What one shard covers: rows of one split.

    Attributes:
        number: the shard's number, from 0.
        split: one of `SPLITS`.
        first_row: its first row in the source's order; None for streams, whose rows are not counted ahead.
        rows: how many rows; None where only opening the part shows it.
        name: of its file, relative to the source; "" for a slice of listed rows.
    """

    number: int
    split: str
    first_row: int | None
    rows: int | None
    name: str = ""


class ListedSource(Protocol):
    """Images whose rows fit in memory: a folder, a table, a data set by name.

    Attributes:
        kind: "folder", "table" or "torchvision".
        class_names: K names for the text tower, in class order.
        rows: all rows, split by split in the order of `SPLITS`, by id inside a split.

    A source may also have `notes`: lines that say what it took something for where that is not certain, or passed over.
    """

    kind: str
    class_names: list[str]
    rows: list[Row]

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `reopen_source` needs, fit for JSON."""
        ...


class StreamedSource(Protocol):
    """Images too many to list: files of images, one part each; only the rows of open parts are in memory.

    It can be pickled, for reader processes; file handles are made where they are used.

    Attributes:
        kind: such as "tar".
        class_names: K names for the text tower, in class order.
    """

    kind: str
    class_names: list[str]

    def plan(self, shard_size: int) -> list[Part]:
        """The parts, split by split in the order of `SPLITS`, by name inside a split; no image is opened."""
        ...

    def open(self, part: Part) -> list[Row]:
        """The rows of a part, in their order; raises InputError where the part cannot be read to its end."""
        ...

    def close(self, part: Part) -> None:
        """Ends the work on a part, so that a local copy of a remote file can be removed."""
        ...

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB, while its part is open; raises UnreadableImage."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `reopen_source` needs, fit for JSON."""
        ...

    def fingerprint(self) -> str:
        """Hex sha256 over names, splits and sizes of the parts' files."""
        ...


Source = ListedSource | StreamedSource


def sorted_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows by split, then by id: the order in which they are extracted and stored."""
    # Python compares code points, so the order is the same under every locale.
    return sorted(rows, key=lambda row: (SPLITS.index(row.split), row.id))


def fingerprint(rows: Iterable[Row]) -> str:
    """Hex sha256 over (id, label, split, bytes) of the rows in their order; changes when any image's size does."""
    digest = hashlib.sha256()
    for row in rows:
        # NUL cannot be part of a file name, so no two different rows give the same text.
        digest.update(f"{row.id}\0{row.label}\0{row.split}\0{row.bytes}\n".encode())
    return digest.hexdigest()
