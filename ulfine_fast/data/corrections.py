"""Corrected labels: a table of image ids and classes that replaces some of a cache's labels."""

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
from ulfine_fast.cache.io.names import did_you_mean, listed
from ulfine_fast.cache.io.tables import delimiter, label_key, label_text, read_table
from ulfine_fast.data.splits import Rows, Split, labeled_counts

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

NOTHING = ""
"""The label of an image that shows none of the classes, or whose class is unknown."""

_COLUMNS = ["id", "label"]


def read_corrections(path: Path) -> dict[str, str]:
    """Image id -> class name, or "" for none, from a table with the columns id and label.

    Raises:
        InputError: not such a table (see `read_table`), or two labels for one image.
    """
    table = read_table(path, _COLUMNS, others="refuse")
    labels: dict[str, str] = {}
    for name, label in zip(table.texts("id", strip=False), table.texts("label", strip=False), strict=True):
        if labels.setdefault(name, label) != label:
            raise InputError(f"{path} gives {name!r} two labels, {labels[name]!r} and {label!r}; keep one")
    return labels


def write_corrections(path: Path, labels: Mapping[str, str]) -> None:
    """Replaces the whole table, with tabs in a .tsv and commas else; at no moment the file holds half of it.

    Raises:
        InputError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter(path), lineterminator="\n")
    writer.writerows([_COLUMNS, *labels.items()])
    write_atomically(path, text.getvalue().encode())


def corrected(cache: FeatureCache, labels: Mapping[str, str]) -> FeatureCache:
    """The cache with these labels instead of its own.

    Args:
        cache: features of the images named.
        labels: image id -> class name, or "" or "-1" for none. A whole number may be written as 1.0.

    Raises:
        InputError: an image or a class that the cache does not have.
    """
    indices = {NOTHING: -1, **{label_key(name): k for k, name in enumerate(cache.class_names)}}
    new = cache.labels.copy()
    for row, (name, label) in zip(_rows_of(cache, labels), labels.items(), strict=True):
        # A class may itself be called "1.0", so the exact text comes first.
        index = indices.get(label_key(label), indices.get(label_text(label)))
        if index is None:
            classes, hint = listed(cache.class_names), did_you_mean(label, cache.class_names)
            raise InputError(f"{name!r} has the label {label!r}, which is none of {classes}{hint}")
        new[row] = index
    return cache.with_labels(new)


def corrected_split(split: Split, cache: FeatureCache, labels: Mapping[str, str]) -> Split:
    """The split after the corrections; no image changes between training and being held out.

    A training image with a corrected class becomes labelled, one that shows none of them unlabelled; a held-out image
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
    training = np.isin(rows, np.concatenate([split.labeled, split.unlabeled]))
    moved = replace(
        split,
        labeled=np.union1d(np.setdiff1d(split.labeled, rows[~known]), rows[training & known]),
        unlabeled=np.union1d(np.setdiff1d(split.unlabeled, rows[known]), rows[training & ~known]),
        val=np.setdiff1d(split.val, rows[~known]),
        test=np.setdiff1d(split.test, rows[~known]),
    )
    for k in np.flatnonzero(labeled_counts(cache.labels, moved, len(cache.class_names)) == 0)[:1]:
        name = cache.class_names[k]
        raise InputError(f"the corrections leave class {name!r} without a labelled image; give it one")
    return moved


def _rows_of(cache: FeatureCache, labels: Mapping[str, str]) -> Rows:
    return cache.row_of(list(labels), source="the corrected labels", fix="remove its line")
