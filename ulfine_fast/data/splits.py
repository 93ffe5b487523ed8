"""Long-tailed semi-supervised splits of a cache's rows, drawn from a seed and saved by image id."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.ids import RowIndex
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.json_files import check_schema, read_json
from ulfine_fast.config import FitConfig

Rows = NDArray[np.int64]

RULE = (
    "count of rank k = max(1, int(N1 * gamma_l ** (-k / (K - 1)))), the last max(1, int(N1 / gamma_l)); "
    "unlabelled the same with M1, gamma_u and no lower bound; per class: labelled rows first, unlabelled next, of one "
    "seeded permutation"
)
"""The protocol in words, as split.json records it."""

MAX_SPLIT_BYTES = 4 << 30  # a hundred million image ids

TEST_FRACTION = 0.2
"""Fraction of each class held out for testing where the protocol or a search needs a test split that the data lack."""

KEPT_BY_TRAINING = 3
"""Labelled images of a class that validation takes none of: it takes some where there are more."""

_SPLIT_KEYS = ("format", "version", "rule", "class_order", "labeled", "unlabeled", "val", "test")


class SavedSplit(msgspec.Struct):
    """A split as a file holds it, by image id; single methods read further parts."""

    class_order: list[Annotated[int, msgspec.Meta(ge=0, le=2**53)]]
    labeled: list[str]
    unlabeled: list[str]
    val: list[str]
    test: list[str]
    rule: str = "not recorded"


@dataclass(frozen=True)
class Split:
    """Row numbers of a cache by role.

    Attributes:
        labeled: rows that train with their label (L,).
        unlabeled: rows that train without (U,); their labels, where known, are used for pseudo-label metrics only.
        val: rows held out of the labelled ones for selection and calibration (V,).
        test: rows read once, at the end (E,).
        class_order: class indices from head to tail (K,), by drawn rank or by labelled count.
        extra: what methods add to it, by name, as JSON values with image ids.
    """

    labeled: Rows
    unlabeled: Rows
    val: Rows
    test: Rows
    class_order: Rows
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self, ids: list[str]) -> dict[str, Any]:
        """The split as image ids, so that it fits a cache of the same images made with another model."""
        roles = {role: [ids[row] for row in getattr(self, role)] for role in ("labeled", "unlabeled", "val", "test")}
        order = [int(k) for k in self.class_order]
        return {"format": "ulfine-fast-split", "version": 1, "rule": RULE, "class_order": order, **roles, **self.extra}


def read_split(path: Path, ids: list[str]) -> Split:
    """Load a saved split.

    Args:
        path: a split.json, or a run folder that holds one.
        ids: the cache's image ids, in row order.

    Raises:
        InputError: no such file, no split in it, or an image the cache lacks.
    """
    file = path / "split.json" if path.is_dir() else path
    fix = "it is not a saved split: name the split.json of a run"
    content = read_json(file, dict[str, Any], fix=fix, max_bytes=MAX_SPLIT_BYTES)
    saved = check_schema(content, SavedSplit, name=str(file), fix=fix)
    index = RowIndex(ids)
    order = np.asarray(saved.class_order, dtype=np.int64)
    # parts are lists; a program that adds a number or a text means no method
    extra = {name: part for name, part in content.items() if name not in _SPLIT_KEYS and isinstance(part, list)}
    rows = {
        role: index.rows(getattr(saved, role), source=f"the {role} part of {file}", fix="use the cache it was made on")
        for role in ("labeled", "unlabeled", "val", "test")
    }
    return Split(**rows, class_order=order, extra=extra)


def long_tail_counts(largest: int, gamma: float, classes: int, smallest: int = 0) -> Rows:
    """Class sizes from head to tail, falling exponentially from `largest` to `largest / gamma`.

    Returns:
        Counts of shape (K,), each at least `smallest`.
    """
    ranks = np.arange(classes) / max(classes - 1, 1)
    counts = (largest * gamma ** (-ranks)).astype(np.int64)  # (K,)
    if classes > 1:
        # the power may be rounded to just below an exact quotient, the division is not
        counts[-1] = int(largest / gamma)
    return np.maximum(counts, smallest)


def unlabeled_counts(m1: int, gamma: float, shape: str, classes: int) -> Rows:
    """Unlabelled class sizes in the labelled rank order (head first), for one of the protocol's shapes.

    `consistent` falls, `reversed` rises, `uniform` is flat, `middle` peaks at the middle ranks and `head-tail` at both
    ends (the last two after SimPro, arXiv 2402.13505; which of two equally distant ranks is larger is our choice).
    `shuffled` falls along a second random order of the classes, which the caller draws.

    Returns:
        Counts of shape (K,).
    """
    if shape == "uniform":
        return np.full(classes, m1, dtype=np.int64)
    falling = long_tail_counts(m1, gamma, classes)
    if shape == "reversed":
        return falling[::-1].copy()
    if shape in ("middle", "head-tail"):
        distance = np.abs(np.arange(classes) - (classes - 1) / 2)
        from_centre = np.argsort(distance, kind="stable")
        counts = np.empty_like(falling)
        counts[from_centre if shape == "middle" else from_centre[::-1]] = falling
        return counts
    return falling


def draw_split(
    labels: Rows, splits: NDArray[Any], class_names: list[str], config: FitConfig, *, hold_out: bool = True
) -> Split:
    """Draw a trial's split from the cache's rows.

    Args:
        labels: class index of each row, -1 unknown (n,).
        splits: "train", "unlabeled", "val" or "test" for each row (n,).
        class_names: (K,).
        config: n1, m1, gamma_l, gamma_u, shape and the split seed decide.
        hold_out: whether labelled images are held out for testing and validation, where the cache has none of its own.

    Raises:
        InputError: too few images for the counts asked for, or a class with no labelled image.
    """
    random = np.random.default_rng([config.data_seed, 0x5B11])

    # test images, and the labelled images of each class in random order
    test = _rows(np.flatnonzero((splits == "test") & (labels >= 0)))
    pools = [
        _rows(random.permutation(np.flatnonzero((splits == "train") & (labels == k)))) for k in range(len(class_names))
    ]
    if hold_out and not len(test):
        fraction = TEST_FRACTION if config.test_fraction is None else config.test_fraction
        test, pools = held_out_rows(pools, fraction, keep=2)
    for name, pool in zip(class_names, pools, strict=True):
        if not len(pool):
            raise InputError(f"class {name!r} has no labelled training image; add one or remove the class")

    # labelled and unlabelled training images
    unknown = _rows(np.flatnonzero((splits == "unlabeled") | ((splits == "train") & (labels < 0))))
    if config.n1 is None:
        order, labeled, unlabeled = _natural(pools, config.labeled_fraction)
        unlabeled = np.concatenate([unlabeled, unknown])
    else:
        order = random.permutation(len(pools)) if config.permute_classes else np.arange(len(pools))
        labeled, unlabeled = _long_tailed(pools, order, class_names, config, random)
        if config.shape == "natural":
            unlabeled = np.concatenate([unlabeled, unknown])
    if config.labeled_in_unlabeled:
        unlabeled = np.concatenate([unlabeled, *labeled])

    # validation images: the cache's, else some of the labelled ones
    val = _rows(np.flatnonzero((splits == "val") & (labels >= 0)))
    if hold_out and not len(val):
        val, labeled = held_out_rows(labeled, config.val_fraction, keep=KEPT_BY_TRAINING)
    return Split(
        labeled=np.sort(np.concatenate(labeled)),
        unlabeled=np.sort(unlabeled),
        val=np.sort(val),
        test=np.sort(test),
        class_order=_rows(order),
    )


def labeled_counts(labels: Rows, split: Split, classes: int) -> Rows:
    """Labelled training images of each class (K,), validation left out."""
    return np.bincount(labels[split.labeled], minlength=classes).astype(np.int64)


def training_labels(labels: Rows, split: Split, classes: int, config: FitConfig) -> Rows:
    """The labels that training sees: some of them wrong where `label_noise` is above 0 (symmetric noise).

    round(`label_noise` L) labelled images, drawn from the split seed, get one of the other classes with equal
    probability. Images that are wrong at one fraction are wrong in the same way at every larger one.

    Args:
        labels: class index of each row of the cache (n,).
        split: with the labelled images.
        classes: K.
        config: `label_noise` and the split seed decide.

    Returns:
        Classes of `split.labeled`, in its order (L,).

    Raises:
        InputError: noise where there is no other class.
    """
    noisy = labels[split.labeled]
    if not config.label_noise:
        return noisy
    if classes < 2:
        raise InputError(f"label_noise = {config.label_noise:g} needs a second class; set it to 0")
    random = np.random.default_rng([config.data_seed, 0x401E])
    order = random.permutation(len(noisy))
    shifts = random.integers(1, classes, len(noisy))
    wrong = order[: round(config.label_noise * len(noisy))]
    noisy[wrong] = (noisy[wrong] + shifts[wrong]) % classes
    return noisy


def _rows(values: Any) -> Rows:
    return np.asarray(values, dtype=np.int64)


def held_out_rows(pools: list[Rows], fraction: float, keep: int) -> tuple[Rows, list[Rows]]:
    """Hold out a fraction of each class: at least one row of classes with more than `keep`, none of others.

    Returns:
        The rows held out, and the rest of each class.
    """
    sizes = [max(1, round(len(pool) * fraction)) if fraction > 0 and len(pool) > keep else 0 for pool in pools]
    held_out = np.concatenate([pool[:size] for pool, size in zip(pools, sizes, strict=True)])
    return _rows(held_out), [pool[size:] for pool, size in zip(pools, sizes, strict=True)]


def _natural(pools: list[Rows], fraction: float) -> tuple[Rows, list[Rows], Rows]:
    """Keep the class counts of the data; a fraction of each class, at least one image, stays labelled.

    Returns:
        Classes from head to tail, labelled rows of each class, and unlabelled rows.
    """
    sizes = [max(1, round(len(pool) * fraction)) for pool in pools]
    labeled = [pool[:size] for pool, size in zip(pools, sizes, strict=True)]
    hidden = [pool[size:] for pool, size in zip(pools, sizes, strict=True)]
    order = np.argsort([-len(rows) for rows in labeled], kind="stable")
    return order, labeled, _rows(np.concatenate(hidden))


def _long_tailed(
    pools: list[Rows], order: NDArray[Any], class_names: list[str], config: FitConfig, random: np.random.Generator
) -> tuple[list[Rows], Rows]:
    """Labelled rows per class and unlabelled rows, by the protocol's counts along `order`."""
    classes = len(pools)
    assert config.n1 is not None
    counts = np.empty(classes, dtype=np.int64)
    counts[order] = long_tail_counts(config.n1, config.gamma_l, classes, smallest=1)
    sizes = np.array([len(pool) for pool in pools])
    for k in np.flatnonzero(counts > sizes)[:1]:
        raise InputError(
            f"n1 = {config.n1} needs {counts[k]} labelled images of class {class_names[k]!r}, "
            f"which has {sizes[k]}; lower n1"
        )
    labeled = [pool[:count] for pool, count in zip(pools, counts, strict=True)]
    rest = [pool[count:] for pool, count in zip(pools, counts, strict=True)]
    if config.shape == "natural":
        return labeled, _rows(np.concatenate(rest))
    hidden = np.empty(classes, dtype=np.int64)
    # shuffled: an order of the classes that is independent of the labelled one
    ranked = random.permutation(order) if config.shape == "shuffled" else order
    hidden[ranked] = _hidden_counts(sizes[ranked] - counts[ranked], config)
    for k in np.flatnonzero(hidden > sizes - counts)[:1]:
        raise InputError(
            f"m1 = {config.m1} needs {hidden[k]} unlabelled images of class {class_names[k]!r}, "
            f"which has {sizes[k] - counts[k]} left; lower m1 or n1"
        )
    return labeled, _rows(np.concatenate([rows[:count] for rows, count in zip(rest, hidden, strict=True)]))


def _hidden_counts(left: Rows, config: FitConfig) -> Rows:
    """Unlabelled counts by rank; without m1, the largest M1 for which every class has enough images left."""

    def counts(m1: int) -> Rows:
        return unlabeled_counts(m1, config.gamma_u, config.shape, len(left))

    if config.m1 is not None:
        return counts(config.m1)
    # no count falls when M1 grows, so all feasible values are below all others
    feasible = bisect.bisect_left(range(int(left.max()) + 1), True, key=lambda m1: bool((counts(m1) > left).any()))
    return counts(max(0, feasible - 1))
