"""Corrected labels: a table of image ids and classes that stands over a cache's own labels."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import write_atomically
from ulfine_fast.data.splits import Rows, Split, labeled_counts

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

NOTHING = ""
"""The label of an image that shows none of the classes, or of which nobody knows what it shows."""

_COLUMNS = ["id", "label"]


def read_corrections(path: Path) -> dict[str, str]:
    """Image id -> class name, or "" for none, from a CSV file with the columns id and label.

    Raises:
        InputError: no such file, other columns, or two labels for one image.
    """
    try:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path} ({error}); name a CSV file with the columns id and label") from error
    if not rows or rows[0] != _COLUMNS:
        raise InputError(f"{path} must have the columns id and label, got {', '.join(rows[0]) if rows else 'none'}")
    found: dict[str, str] = {}
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(_COLUMNS):
            raise InputError(f"line {number} of {path} has {len(row)} cells instead of 2; mend or remove it")
        if found.setdefault(row[0], row[1]) != row[1]:
            raise InputError(f"{path} gives {row[0]!r} two labels, {found[row[0]]!r} and {row[1]!r}; keep one")
    return found


def write_corrections(path: Path, labels: Mapping[str, str]) -> None:
    """Replace the table as a whole, so that no instant leaves half of it.

    Raises:
        InputError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_COLUMNS, *labels.items()])
    write_atomically(path, text.getvalue().encode())


def corrected(cache: FeatureCache, labels: Mapping[str, str]) -> FeatureCache:
    """The cache with these labels in the place of its own.

    Args:
        cache: features of the images named.
        labels: image id -> class name, or "" for none.

    Raises:
        InputError: an image or a class that the cache does not know.
    """
    known = cache.labels.copy()
    known[_rows_of(cache, labels)] = _classes_of(cache, labels)
    return cache.with_labels(known)


def corrected_split(split: Split, cache: FeatureCache, labels: Mapping[str, str]) -> Split:
    """The split with every corrected image in its place; no image changes between training and being held out.

    A training image with a corrected class is labelled, one that shows none of them unlabelled; a held-out image
    that shows none of them is left out.

    Args:
        split: of the cache before the corrections.
        cache: as :func:`corrected` returns it.
        labels: image id -> class name, or "" for none.

    Raises:
        InputError: a class is left without a labelled image, or see :func:`corrected`.
    """
    rows = _rows_of(cache, labels)
    known = cache.labels[rows] >= 0
    mine = np.isin(rows, np.concatenate([split.labeled, split.unlabeled]))
    moved = replace(
        split,
        labeled=_moved(split.labeled, rows[mine & known], rows[~known]),
        unlabeled=_moved(split.unlabeled, rows[mine & ~known], rows[known]),
        val=np.setdiff1d(split.val, rows[~known]),
        test=np.setdiff1d(split.test, rows[~known]),
    )
    for k in np.flatnonzero(labeled_counts(cache.labels, moved, len(cache.class_names)) == 0)[:1]:
        name = cache.class_names[k]
        raise InputError(f"the corrections leave class {name!r} without a labelled image; give it one")
    return moved


def _moved(rows: Rows, come: Rows, gone: Rows) -> Rows:
    """Sorted rows after some came and others went."""
    return np.union1d(np.setdiff1d(rows, gone), come)


def _rows_of(cache: FeatureCache, labels: Mapping[str, str]) -> Rows:
    row_of = {name: row for row, name in enumerate(cache.ids)}
    for name in labels:
        if name not in row_of:
            raise InputError(f"the corrected labels name {name!r}, which this cache lacks; remove its line")
    return np.array([row_of[name] for name in labels], dtype=np.int64)


def _classes_of(cache: FeatureCache, labels: Mapping[str, str]) -> Rows:
    class_of = {NOTHING: -1, **{name: k for k, name in enumerate(cache.class_names)}}
    for name, label in labels.items():
        if label not in class_of:
            raise InputError(f"{name!r} has the label {label!r}, which is none of {', '.join(cache.class_names)}")
    return np.array([class_of[label] for label in labels.values()], dtype=np.int64)
