"""A table of labels beside a cache: which of several classes each image shows, as far as it is known."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.tables import label_text, read_table
from ulfine_fast.related.multilabel.settings import MultiLabelConfig

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

PRESENT, ABSENT, UNKNOWN = 1, 0, -1
_CELLS = {"1": PRESENT, "0": ABSENT, "": UNKNOWN}
_RESERVED = ("id", "split")

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class LabelTable:
    """Labels of some images.

    Attributes:
        class_names: (K,).
        ids: of the n images.
        values: 1 present, 0 absent, -1 unknown, int8 (n, K).
    """

    class_names: list[str]
    ids: list[str]
    values: NDArray[np.int8]

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all of it."""
        text = "\0".join([*self.class_names, "", *self.ids]).encode()
        return hashlib.sha256(text + self.values.tobytes()).hexdigest()


@dataclass(frozen=True)
class LabelSplit:
    """Rows of a cache.

    Attributes:
        train: a trial learns from these.
        val: settings may be chosen by these.
        test: a trial is evaluated on these.
    """

    train: Rows
    val: Rows
    test: Rows


def read_label_table(path: Path) -> LabelTable:
    """Read a table with a column `id` and one for each class, whose cells are 1, 0, or empty or -1 for unknown.

    Raises:
        InputError: not such a table (see `read_table`), class names that are no names, another value, an image twice;
            names the line.
    """
    table = read_table(path, ["id"], others="keep", form="the column id and then one for each class")
    ids = table.texts("id", strip=False)
    names = [name for name in table.names if name != "id"]
    if not names:
        raise InputError(f"{path} must have the column id and then one for each class, got id")
    for name in names:
        if not name or name in _RESERVED or names.count(name) > 1:
            raise InputError(
                f"{path} has a class {name!r}; names are not empty, not {' or '.join(_RESERVED)}, and differ"
            )
    values = np.empty((len(ids), len(names)), dtype=np.int8)
    for column, name in enumerate(names):
        cells = table.texts(name)
        values_of = {cell: _CELLS[text] for cell in set(cells) if (text := label_text(cell)) in _CELLS}
        for row, cell in enumerate(cells):
            if cell not in values_of:
                raise InputError(
                    f"{table.where(row)} has {cell!r} for class {name!r}; write 1, 0 or nothing for unknown"
                )
        values[:, column] = [values_of[cell] for cell in cells]
    seen: set[str] = set()
    for row, image in enumerate(ids):
        if image in seen:
            raise InputError(f"{table.where(row)} names {image!r} again; keep one line for each image")
        seen.add(image)
    return LabelTable(names, ids, values)


def labels_by_row(table: LabelTable, cache: FeatureCache) -> tuple[NDArray[np.int8], Rows]:
    """Labels of all rows of a cache (N, K), unknown for images that the table does not name, and the named rows (n,).

    Raises:
        InputError: an image that the cache lacks, or an empty table.
    """
    if not table.ids:
        raise InputError("the labels name no image; add a line for each")
    rows = cache.row_of(table.ids, source="the table of labels", fix="remove its line")
    labels = np.full((len(cache), len(table.class_names)), UNKNOWN, dtype=np.int8)
    labels[rows] = table.values
    return labels, np.sort(rows)


def split_labels(
    cache: FeatureCache, labels: NDArray[np.int8], rows: Rows, class_names: Sequence[str], config: MultiLabelConfig
) -> LabelSplit:
    """Split the labelled rows as the cache does; without test rows a fraction of the training rows is held out.

    Args:
        cache: whose splits count; a trial learns from "train" and "unlabeled".
        labels: of all rows (N, K).
        rows: those that the table names (n,).
        class_names: (K,).
        config: seed and fraction of what is held out, and what unknown labels count as.

    Raises:
        InputError: no training image, or a class that they never show, or never lack where unknown labels are ignored.
    """
    splits = cache.splits[rows]
    train = rows[np.isin(splits, ("train", "unlabeled"))]
    val = rows[splits == "val"]
    test = rows[splits == "test"]
    if not len(test):
        shuffled = np.random.default_rng([config.data_seed, 0x71A]).permutation(train)
        held_out = round(config.test_fraction * len(train))
        train, test = np.sort(shuffled[held_out:]), np.sort(shuffled[:held_out])
    if not len(train):
        raise InputError("the labels name no training image; all are in the cache's splits val and test")

    for name, column in zip(class_names, labels[train].T, strict=True):
        if not (column == PRESENT).any():
            raise InputError(
                f"class {name!r} is 1 in none of {len(train)} training images; label one or remove the column"
            )
        if config.unknown == "ignore" and not (column == ABSENT).any():
            raise InputError(f"class {name!r} is 0 in no training image; with --unknown ignore it needs one")
    return LabelSplit(train=train, val=val, test=test)
