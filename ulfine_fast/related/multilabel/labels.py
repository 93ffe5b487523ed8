"""A table of labels beside a cache: which of several classes each image shows, as far as anybody knows."""

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
_MEANING = {"1": PRESENT, "0": ABSENT, "": UNKNOWN}
_RESERVED = ("id", "split")

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class LabelTable:
    """Labels of some images.

    Attributes:
        class_names: (K,). ids: of the n images. values: 1 present, 0 absent, -1 unknown, int8 (n, K).
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
    """Rows of a cache: what a trial learns from, what it may be chosen by, and what it is judged by."""

    train: Rows
    val: Rows
    test: Rows


def read_label_table(path: Path) -> LabelTable:
    """Reads a table with a column `id` and one for each class, whose cells are 1, 0, or empty or -1 for unknown.

    Raises:
        InputError: not such a table (see `read_table`), class names that are no names, another value, an image twice;
            names the line.
    """
    table = read_table(path, ["id"], others="keep", form="the column id and then one for each class")
    ids, names = table.texts("id", strip=False), [name for name in table.names if name != "id"]
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
        meanings = {cell: _MEANING[label] for cell in set(cells) if (label := label_text(cell)) in _MEANING}
        for row, cell in enumerate(cells):
            if cell not in meanings:
                raise InputError(
                    f"{table.where(row)} has {cell!r} for class {name!r}; write 1, 0 or nothing for unknown"
                )
        values[:, column] = [meanings[cell] for cell in cells]
    seen: set[str] = set()
    for row, image in enumerate(ids):
        if image in seen:
            raise InputError(f"{table.where(row)} names {image!r} again; keep one line for each image")
        seen.add(image)
    return LabelTable(names, ids, values)


def placed(table: LabelTable, cache: FeatureCache) -> tuple[NDArray[np.int8], Rows]:
    """Labels of all rows of a cache (N, K), unknown where the table says nothing, and the rows that it names (n,).

    Raises:
        InputError: an image that the cache lacks, or an empty table.
    """
    if not table.ids:
        raise InputError("the labels name no image; add a line for each")
    rows = cache.row_of(table.ids, source="the table of labels", fix="remove its line")
    whole = np.full((len(cache), len(table.class_names)), UNKNOWN, dtype=np.int8)
    whole[rows] = table.values
    return whole, np.sort(rows)


def split_labels(
    cache: FeatureCache, labels: NDArray[np.int8], rows: Rows, class_names: Sequence[str], config: MultiLabelConfig
) -> LabelSplit:
    """Divide the labelled rows as the cache does; without test rows a share of the training ones is held out.

    Args:
        cache: whose splits count; "train" and "unlabeled" are learned from.
        labels: of all rows (N, K).
        rows: those that the table names (n,).
        class_names: (K,).
        config: seed, share, and what unknown labels are.

    Raises:
        InputError: nothing to learn from, or a class without what a trial needs of it.
    """
    splits = cache.splits[rows]
    train, val, test = (rows[np.isin(splits, names)] for names in (("train", "unlabeled"), ("val",), ("test",)))
    if not len(test):
        mixed = np.random.default_rng([config.data_seed, 0x71A]).permutation(train)
        held = round(config.test_fraction * len(train))
        train, test = np.sort(mixed[held:]), np.sort(mixed[:held])
    if not len(train):
        raise InputError("the labels name no training image; all are in the cache's splits val and test")
    _refuse_missing(labels[train], class_names, config)
    return LabelSplit(train, val, test)


def _refuse_missing(labels: NDArray[np.int8], class_names: Sequence[str], config: MultiLabelConfig) -> None:
    """Refuse a class that training images (n, K) never show, or never lack where unknown labels are ignored."""
    for k, name in enumerate(class_names):
        if not (labels[:, k] == PRESENT).any():
            raise InputError(
                f"class {name!r} is 1 in none of {len(labels)} training images; label one or remove the column"
            )
        if config.unknown == "ignore" and not (labels[:, k] == ABSENT).any():
            raise InputError(f"class {name!r} is 0 in no training image; with --unknown ignore it needs one")
