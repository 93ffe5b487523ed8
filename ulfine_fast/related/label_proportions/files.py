"""Bags and their class proportions from files, and the split that trains on them."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.data.splits import Split
from ulfine_fast.related.label_proportions.bags import Bags

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

Cells = list[list[str]]

_TOLERANCE = 1e-3
"""How far shares may be from a sum of 1: three digits of each are enough."""


def read_bags(bags: str | Path, proportions: str | Path, cache: FeatureCache) -> Bags:
    """Bags of a cache's images from two CSV files.

    Args:
        bags: with the columns id and bag.
        proportions: with the columns bag, class and share, or a column bag and one for each class; a class left out has
            the share 0.
        cache: features of the images named.

    Raises:
        InputError: a file that is none of these, an image or a class that the cache lacks, an image in two bags or
            held out by the cache, a bag without images or without shares, or shares that are none.
    """
    members = _members(Path(bags), cache)
    shares = _shares(Path(proportions), cache.class_names)
    for name in members:
        if name not in shares:
            raise InputError(f"{proportions} has no shares of bag {name!r}; add them, or take the bag out of {bags}")
    for name in shares:
        if name not in members:
            raise InputError(f"bag {name!r} of {proportions} has no image in {bags}; add its images or remove it")
    rows = tuple(np.array(found, dtype=np.int64) for found in members.values())
    return Bags(tuple(members), rows, np.stack([shares[name] for name in members]))


def bag_split(cache: FeatureCache, bags: Bags) -> Split:
    """The split that trains on bags alone: their images without labels, and labelled ones to validate and test on.

    The cache's own val and test images have these roles. Labelled images outside the bags validate where the cache
    has none for that; where it has no test images, they are the test instead.

    Raises:
        InputError: no image is left to test on.
    """
    labeled, mine = cache.labels >= 0, np.isin(np.arange(len(cache)), bags.rows)
    val, test = (np.flatnonzero(labeled & (cache.splits == role)) for role in ("val", "test"))
    rest = np.flatnonzero(labeled & (cache.splits == "train") & ~mine)
    if not len(test):
        test = rest
    elif not len(val):
        val = rest
    if not len(test):
        raise InputError("no labelled image is left outside the bags to test on; extract some in a folder named test")
    none = np.zeros(0, dtype=np.int64)
    extra = {"bags": bags.to_list(cache.ids)}
    return Split(none, bags.rows, val, test, np.arange(len(cache.class_names)), extra)


def _members(path: Path, cache: FeatureCache) -> dict[str, list[int]]:
    """Rows of each bag, in the order of the file."""
    header, rows = _read(path, "the columns id and bag")
    if header != ["id", "bag"]:
        raise InputError(f"{path} must have the columns id and bag, got {', '.join(header)}")
    row_of = {name: row for row, name in enumerate(cache.ids)}
    bag_of: dict[str, str] = {}
    members: dict[str, list[int]] = {}
    for name, bag in rows:
        _refuse_image(name, bag, path, cache, row_of)
        if name in bag_of:
            raise InputError(f"{path} puts {name!r} into bag {bag_of[name]!r} and again into {bag!r}; keep one line")
        bag_of[name] = bag
        members.setdefault(bag, []).append(row_of[name])
    return members


def _refuse_image(name: str, bag: str, path: Path, cache: FeatureCache, row_of: dict[str, int]) -> None:
    """Refuse an image that is in no bag, not in the cache, or held out by it."""
    if not bag:
        raise InputError(f"{path} names no bag for {name!r}; name one or remove the line")
    if name not in row_of:
        raise InputError(f"bag {bag!r} of {path} holds {name!r}, which this cache lacks; remove its line")
    where = cache.splits[row_of[name]]
    if where in ("val", "test"):
        raise InputError(f"bag {bag!r} of {path} holds {name!r}, a {where} image of this cache; remove its line")


def _shares(path: Path, classes: list[str]) -> dict[str, NDArray[np.float64]]:
    """Shares (K,) of each bag, summing to 1, from either form of the file."""
    header, rows = _read(path, "the columns bag, class and share, or bag and one for each class")
    if header[0] != "bag" or len(header) < 2:
        raise InputError(
            f"{path} must have the columns bag, class and share, or bag and one for each class, got {', '.join(header)}"
        )
    entries = rows if header == ["bag", "class", "share"] else _melted(header, rows, path)
    found: dict[str, dict[str, float]] = {}
    for bag, name, text in entries:
        if name not in classes:
            raise InputError(f"{path} names class {name!r}, which is none of {', '.join(classes)}")
        own = found.setdefault(bag, {})
        if name in own:
            raise InputError(f"{path} gives two shares of class {name!r} in bag {bag!r}; keep one")
        own[name] = _share(text, bag, name, path)
    return {bag: _normalized(bag, [own.get(name, 0.0) for name in classes], path) for bag, own in found.items()}


def _melted(header: list[str], rows: Cells, path: Path) -> Cells:
    """A row for each cell of a table with a column for each class."""
    seen: set[str] = set()
    for row in rows:
        if row[0] in seen:
            raise InputError(f"{path} has two lines for bag {row[0]!r}; keep one")
        seen.add(row[0])
    return [[row[0], name, cell] for row in rows for name, cell in zip(header[1:], row[1:], strict=True)]


def _share(text: str, bag: str, name: str, path: Path) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise InputError(f"{path} gives bag {bag!r} the share {text!r} of class {name!r}; give a number from 0 to 1")
    return value


def _normalized(bag: str, shares: list[float], path: Path) -> NDArray[np.float64]:
    """Shares that sum to 1 exactly."""
    total = math.fsum(shares)
    if abs(total - 1) > _TOLERANCE:
        raise InputError(f"the shares of bag {bag!r} in {path} sum to {total:g}; give shares that sum to 1")
    return np.array(shares) / total


def _read(path: Path, wanted: str) -> tuple[list[str], Cells]:
    """Header and rows of a CSV file that has at least one row, all of them as long as the header."""
    try:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path} ({error}); name a CSV file with {wanted}") from error
    if len(rows) < 2:
        raise InputError(f"{path} has no line; give {wanted}, and a line for each entry")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(rows[0]):
            raise InputError(
                f"line {number} of {path} has {len(row)} cells instead of {len(rows[0])}; mend or remove it"
            )
    return rows[0], rows[1:]
