"""A table of labels beside a cache: which of several classes each image shows, as far as anybody knows."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.related.multilabel.settings import MultiLabelConfig

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

PRESENT, ABSENT, UNKNOWN = 1, 0, -1
_MEANING = {"1": PRESENT, "0": ABSENT, "": UNKNOWN}
_TAKEN = ("id", "split")

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
    """Read a CSV file with a column `id` and then one for each class, its cells 1, 0 or empty for unknown.

    Raises:
        InputError: no such file, other columns, another value, an image twice; names the line.
    """
    try:
        lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path} ({error}); name a CSV file of labels") from error
    names = _class_names(path, lines[0] if lines else [])
    rows = [(number, line) for number, line in enumerate(lines[1:], 2) if line]
    values = np.array([_values(path, number, line, names) for number, line in rows], dtype=np.int8)
    seen: set[str] = set()
    for number, line in rows:
        if line[0] in seen:
            raise InputError(f"line {number} of {path} names {line[0]!r} again; keep one line for each image")
        seen.add(line[0])
    return LabelTable(names, [line[0] for _, line in rows], values.reshape(len(rows), len(names)))


def _class_names(path: Path, header: Sequence[str]) -> list[str]:
    """The classes of the first line."""
    if not header or header[0] != "id" or len(header) < 2:
        raise InputError(
            f"{path} must have the column id and then one for each class, got {', '.join(header) or 'none'}"
        )
    names = list(header[1:])
    for name in names:
        if not name.strip() or name in _TAKEN or names.count(name) > 1:
            raise InputError(f"{path} has a class {name!r}; names are not empty, not {' or '.join(_TAKEN)}, and differ")
    return names


def _values(path: Path, number: int, line: Sequence[str], names: Sequence[str]) -> list[int]:
    """One image's labels (K,)."""
    if len(line) != len(names) + 1:
        raise InputError(
            f"line {number} of {path} has {len(line)} cells instead of {len(names) + 1}; mend or remove it"
        )
    for name, cell in zip(names, line[1:], strict=True):
        if cell.strip() not in _MEANING:
            raise InputError(
                f"line {number} of {path} has {cell!r} for class {name!r}; write 1, 0 or nothing for unknown"
            )
    return [_MEANING[cell.strip()] for cell in line[1:]]


def placed(table: LabelTable, cache: FeatureCache) -> tuple[NDArray[np.int8], Rows]:
    """Labels of all rows of a cache (N, K), unknown where the table says nothing, and the rows that it names (n,).

    Raises:
        InputError: an image that the cache lacks, or an empty table.
    """
    row_of = {name: row for row, name in enumerate(cache.ids)}
    for name in table.ids:
        if name not in row_of:
            raise InputError(f"the labels name {name!r}, which this cache lacks; its ids look like {cache.ids[0]!r}")
    if not table.ids:
        raise InputError("the labels name no image; add a line for each")
    rows = np.array([row_of[name] for name in table.ids], dtype=np.int64)
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
