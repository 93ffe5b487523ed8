"""What a source of pictures is: rows in a fixed order, and a way to read the picture of a row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

# This order is the order of the rows and of the codes in a shard.
SPLITS = ("train", "unlabeled", "val", "test")
UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class Row:
    """One picture.

    Attributes:
        id: unique in the source, the same on every machine, always encodable as UTF-8.
        label: class index, or -1 if unknown. A label in the split "unlabeled" serves only to score pseudo-labels.
        split: one of `SPLITS`.
        location: where the source finds the picture: a path, or an index as text.
        bytes: size of the file, or of the pixels where there is no file per picture.
    """

    id: str
    label: int
    split: str
    location: str
    bytes: int


class Source(Protocol):
    """Pictures from somewhere.

    Attributes:
        kind: "folder", "table" or "torchvision".
        class_names: K names for the text tower, in class order.
        rows: all rows, split by split in the order of `SPLITS`, by id inside a split.
    """

    kind: str
    class_names: list[str]
    rows: list[Row]

    def read(self, row: Row) -> Image.Image:
        """The picture of `row` as RGB; raises UnreadablePicture."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `reopen_source` needs, fit for JSON."""
        ...


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows sorted by split, then by id: the order in which they are extracted and stored."""
    # Python compares code points, so the order is the same under every locale.
    return sorted(rows, key=lambda row: (SPLITS.index(row.split), row.id))


def fingerprint(rows: Iterable[Row]) -> str:
    """Hex sha256 over (id, label, split, bytes) of the rows in their order; changes when any picture's size does."""
    digest = hashlib.sha256()
    for row in rows:
        # NUL cannot be part of a file name, so no two different rows give the same text.
        digest.update(f"{row.id}\0{row.label}\0{row.split}\0{row.bytes}\n".encode())
    return digest.hexdigest()
