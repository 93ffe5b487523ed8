"""Bags and their class proportions from files, and the split that trains on them."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import did_you_mean, listed
from ulfine_fast.cache.io.tables import find_column, label_key, label_text, read_table
from ulfine_fast.data.splits import Split
from ulfine_fast.related.label_proportions.bags import Bags

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

_TOLERANCE = 1e-3
"""How far the proportions of a bag may be from a sum of 1, so that three digits of each are enough."""


def read_bags(bags: str | Path, proportions: str | Path, cache: FeatureCache) -> Bags:
    """Bags of a cache's images from two tables.

    Args:
        bags: with the columns id and bag.
        proportions: with the columns bag, class and share, or a column bag and one for each class; a class left out has
            the proportion 0.
        cache: features of the images named.

    Raises:
        InputError: a file that is none of these, an image or a class that the cache lacks, an image in two bags or
            held out by the cache, a bag without images or without proportions, or values that are no proportions.
    """
    members = _members(Path(bags), cache)
    proportions_of = _proportions(Path(proportions), cache.class_names)
    for name in members:
        if name not in proportions_of:
            raise InputError(
                f"{proportions} has no proportions of bag {name!r}; add them, or take the bag out of {bags}"
            )
    for name in proportions_of:
        if name not in members:
            raise InputError(f"bag {name!r} of {proportions} has no image in {bags}; add its images or remove it")
    rows = tuple(np.array(rows, dtype=np.int64) for rows in members.values())
    return Bags(tuple(members), rows, np.stack([proportions_of[name] for name in members]))


def bag_split(cache: FeatureCache, bags: Bags) -> Split:
    """The split that trains on bags alone: their images without labels, and labelled ones to validate and test on.

    The cache's own val and test images have these roles. Labelled images outside the bags validate where the cache
    has none for that; where it has no test images, they are the test instead.

    Raises:
        InputError: no image is left to test on.
    """
    labeled = cache.labels >= 0
    in_bags = np.isin(np.arange(len(cache)), bags.rows)
    val, test = (np.flatnonzero(labeled & (cache.splits == role)) for role in ("val", "test"))
    rest = np.flatnonzero(labeled & (cache.splits == "train") & ~in_bags)
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
    table = read_table(path, ["id", "bag"])
    if not len(table):
        raise InputError(f"{path} has no line; give the columns id and bag, and a line for each image")
    ids, bags = table.texts("id", strip=False), [label_key(name) for name in table.texts("bag")]
    bag_of: dict[str, str] = {}
    members: dict[str, list[int]] = {}
    rows = cache.row_of(ids, source=str(path), fix="remove its line")
    for name, bag, row in zip(ids, bags, rows.tolist(), strict=True):
        if not bag:
            raise InputError(f"{path} names no bag for {name!r}; name one or remove the line")
        if name in bag_of:
            raise InputError(f"{path} puts {name!r} into bag {bag_of[name]!r} and again into {bag!r}; keep one line")
        split = cache.splits[row]
        if split in ("val", "test"):
            raise InputError(f"bag {bag!r} of {path} holds {name!r}, a {split} image of this cache; remove its line")
        bag_of[name] = bag
        members.setdefault(bag, []).append(row)
    return members


def _proportions(path: Path, classes: list[str]) -> dict[str, NDArray[np.float64]]:
    """Proportions (K,) of each bag, summing to 1, from either form of the file."""
    form = "the columns bag, class and share, or bag and one for each class"
    table = read_table(path, ["bag"], others="keep", form=form)
    bags = [label_key(name) for name in table.texts("bag")]
    columns = [name for name in table.names if name != "bag"]
    if not columns:
        raise InputError(f"{path} must have {form}, got bag")
    if not bags:
        raise InputError(f"{path} has no line; give {form}, and a line for each entry")

    # one of the two columns alone is a slip, unless it is a class
    for present, absent in (("class", "share"), ("share", "class")):
        if present in columns and present not in classes and absent not in columns:
            find_column(str(path), columns, [absent])
            raise InputError(f"{path} has a column {present} and no {absent}; it must have {form}")

    # (bag, class, share) of every cell
    if {"class", "share"} <= set(columns):
        entries = list(zip(bags, table.texts("class"), table.texts("share"), strict=True))
    else:
        for bag, times in Counter(bags).most_common(1):
            if times > 1:
                raise InputError(f"{path} has two lines for bag {bag!r}; keep one")
        entries = [(bag, name, text) for name in columns for bag, text in zip(bags, table.texts(name), strict=True)]

    values: dict[str, dict[str, float]] = {bag: {} for bag in bags}
    written = {label_key(name): name for name in classes}
    for bag, label, text in entries:
        name = written.get(label_key(label), written.get(label_text(label)))
        if name is None:
            hint = did_you_mean(label, classes)
            raise InputError(f"{path} names class {label!r}, which is none of {listed(classes)}{hint}")
        if name in values[bag]:
            raise InputError(f"{path} gives two proportions of class {name!r} in bag {bag!r}; keep one")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            raise InputError(
                f"{path} gives bag {bag!r} the proportion {text!r} of class {name!r}; give a number from 0 to 1"
            )
        values[bag][name] = value

    # proportions that sum to 1 exactly
    proportions = {}
    for bag, of_class in values.items():
        row = [of_class.get(name, 0.0) for name in classes]
        total = math.fsum(row)
        if abs(total - 1) > _TOLERANCE:
            raise InputError(
                f"the proportions of bag {bag!r} in {path} sum to {total:g}; give proportions that sum to 1"
            )
        proportions[bag] = np.array(row) / total
    return proportions
