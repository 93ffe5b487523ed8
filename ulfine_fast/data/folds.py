"""Splits of a repeated stratified cross-validation: every label is held out once a repeat, and none is lost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import Rows, Split

MOST_REPEATED = 1000
"""Labelled images above which one repeat is enough: another would move the estimate by far less than its interval."""

UNLABELED, UNLABELED_PER_CLASS = 2000, 10
"""Unlabelled images that a fold's fit reads at most: so many, or so many a class where that is more."""


@dataclass(frozen=True)
class Folds:
    """The folds of one trial.

    Attributes:
        numbers: fold in which each labelled image is held out, by repeat (R, L); -1 for images that never are.
        splits: a split for each fold, repeat after repeat; its test rows are the fold.
    """

    numbers: Rows
    splits: list[Split]

    @property
    def count(self) -> int:
        """Folds in a repeat; 0 where there are none."""
        return len(self.splits) // max(len(self.numbers), 1)


def is_cross_validated(labels: Rows, splits: NDArray[np.str_], config: FitConfig) -> bool:
    """Whether a trial trains on every label and is judged by cross-validation.

    It is where the cache has no labelled test image, and the options neither ask for one nor for the protocol.

    Args:
        labels: class index of each row of the cache, -1 unknown (n,).
        splits: "train", "unlabeled", "val" or "test" for each row (n,).
        config: of the trial.
    """
    return config.n1 is None and config.test_fraction is None and not ((splits == "test") & (labels >= 0)).any()


def fold_numbers(labels: Rows, folds: int, repeats: int, random: np.random.Generator) -> Rows:
    """The fold in which each labelled image is held out, in each repeat.

    Every class is spread evenly over the folds, as far as it has images. The only image of a class is never held out:
    a classifier without it does not know the class.

    Args:
        labels: (L,).
        folds: how many.
        repeats: how many.
        random: draws the order.

    Returns:
        Folds (repeats, L), -1 for images that are never held out.
    """
    numbers = np.full((repeats, len(labels)), -1, dtype=np.int64)
    for repeat in range(repeats):
        first = 0
        for k in np.unique(labels):
            members = random.permutation(np.flatnonzero(labels == k))
            if len(members) > 1:
                # the next class goes on with the next fold, so that folds have one size
                numbers[repeat, members] = (first + np.arange(len(members))) % folds
                first += len(members)
    return numbers


def draw_folds(labels: Rows, split: Split, classes: int, config: FitConfig) -> Folds:
    """The folds of a split's labelled images.

    Args:
        labels: class index of each row of the cache (n,).
        split: with every label that trains.
        classes: K.
        config: `cv_folds`, `cv_repeats` and the split seed decide.

    Returns:
        As many folds as the largest class has labels, `cv_folds` at most; none where no class has two labels.
    """
    own = labels[split.labeled]
    random = np.random.default_rng([config.data_seed, 0xF01D])
    count = min(config.cv_folds, int(np.bincount(own, minlength=1).max()))
    repeats = config.cv_repeats if len(own) <= MOST_REPEATED else 1
    if count < 2:
        return Folds(np.full((0, len(own)), -1, dtype=np.int64), [])
    numbers = fold_numbers(own, count, repeats, random)

    # a part of the unlabelled images is enough to judge by
    most = max(UNLABELED, UNLABELED_PER_CLASS * classes)
    unlabeled = split.unlabeled
    if len(unlabeled) > most:
        unlabeled = np.sort(random.permutation(unlabeled)[:most])
    splits = []
    for own_numbers in numbers:
        for fold in range(count):
            held_out = split.labeled[own_numbers == fold]
            # a labelled image may be an unlabelled one too
            rest = unlabeled[~np.isin(unlabeled, held_out)]
            splits.append(replace(split, labeled=split.labeled[own_numbers != fold], unlabeled=rest, test=held_out))
    return Folds(numbers, splits)
