"""Runs grouped by method and setting, what their seeds say together, and classes by labelled count."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ulfine_fast.metrics.intervals import Interval, balanced_difference, mean_interval
from ulfine_fast.runs.files import RunFiles

_SEED_FIELDS = ("seed", "split_seed")


@dataclass(frozen=True, slots=True)
class Group:
    """The runs of one method and setting, one a seed.

    Attributes:
        method: method name.
        detail: the options that differ from other settings of the same method ("mu=0.1"), or "".
        runs: the runs, in the order they were read.
        number: 1, 2, ... among the settings of the same method, 0 where there is only one.
    """

    method: str
    detail: str
    runs: tuple[RunFiles, ...]
    number: int = 0

    @property
    def name(self) -> str:
        """The method in words, numbered if it has several settings; short enough for a chart."""
        return self.method.replace("_", " ") + (f" #{self.number}" if self.number else "")

    @property
    def label(self) -> str:
        """The name and the options that differ."""
        return f"{self.name} ({self.detail})" if self.detail else self.name

    def interval(self, key: str) -> Interval | None:
        """Mean and interval of one metric over the seeds; None where no run has it."""
        return mean_interval(run.number(key) for run in self.runs)

    @property
    def is_cross_validated(self) -> bool:
        """Whether cross-validation estimates the metrics of its runs, which have no test split."""
        return all(run.is_cross_validated for run in self.runs)

    @property
    def choice(self) -> str:
        """The metric by which groups are compared: balanced accuracy on validation, or by cross-validation."""
        validated = self.interval("val.balanced_accuracy") is not None or not self.is_cross_validated
        return "val.balanced_accuracy" if validated else "cross_validation.balanced_accuracy"


def group_runs(runs: Sequence[RunFiles]) -> tuple[list[Group], list[RunFiles]]:
    """Group runs that differ only by seed.

    Returns:
        The groups, best validation balanced accuracy first (groups without one last, then those that are
        cross-validated), and the runs left out because another run has the same setting and seed: counted twice, they
        would make the intervals too narrow.
    """
    # runs by setting, then by seed
    by_setting: dict[str, dict[str, RunFiles]] = {}
    repeated = []
    for run in runs:
        by_seed = by_setting.setdefault(json.dumps(_setting(run), sort_keys=True), {})
        seed = json.dumps([run.config.get(field) for field in _SEED_FIELDS])
        if seed in by_seed:
            repeated.append(run)
        else:
            by_seed[seed] = run

    # a group is described by the options in which it differs from other settings of its method
    members = [tuple(by_seed.values()) for by_seed in by_setting.values()]
    groups = []
    for group_members in members:
        method, setting = group_members[0].method, _setting(group_members[0])
        settings = [_setting(other[0]) for other in members if other[0].method == method]
        differing = [key for key in setting if len({json.dumps(other.get(key)) for other in settings}) > 1]
        detail = " ".join(f"{key}={_shorten(setting[key])}" for key in differing)
        groups.append(Group(method, detail, group_members))

    # the settings of a method are numbered in the order of validation
    groups.sort(key=_validation, reverse=True)
    methods = [group.method for group in groups]
    for i, group in enumerate(groups):
        if methods.count(group.method) > 1:
            groups[i] = replace(group, number=methods[: i + 1].count(group.method))
    return groups, repeated


def best_by_validation(groups: Sequence[Group]) -> Group:
    """The group with the best mean of :attr:`Group.choice`; the first where no group has it."""
    return max(groups, key=_validation)


def indistinguishable(best: Group, groups: Sequence[Group]) -> list[Group]:
    """The other groups that validation, or cross-validation, cannot tell from the best one.

    Their paired difference of balanced accuracy has an interval that reaches zero, or rests on one seed. Groups without
    a shared split, or neither validated nor cross-validated, are left out.
    """
    close = []
    for group in groups:
        if group is best:
            continue
        difference = held_out_difference(best, group) or paired_difference(best, group, "val.balanced_accuracy")
        # a single seed has a half width of NaN, which no comparison exceeds
        if difference is not None and not difference.mean - difference.half > 0:
            close.append(group)
    return close


def groups_to_chart(groups: Sequence[Group], limit: int) -> list[Group]:
    """At most `limit` groups for the charts: the best of each method first, then the rest by validation."""
    best_of_method = [g for i, g in enumerate(groups) if g.method not in {other.method for other in groups[:i]}]
    # without this order a sweep of one method would push the baselines off the page
    chosen = (best_of_method + [g for g in groups if g not in best_of_method])[:limit]
    return [group for group in groups if group in chosen]


def paired_difference(group: Group, other: Group, key: str) -> Interval | None:
    """Mean and interval of `group` minus `other` over pairs of runs with the same seed and the same split."""
    values = {(json.dumps(run.seed), run.split_digest): run.number(key) for run in other.runs}
    pairs = [(run, values.get((json.dumps(run.seed), run.split_digest))) for run in group.runs]
    return mean_interval(run.number(key) - value for run, value in pairs if value is not None)


def held_out_difference(group: Group, other: Group, *, balanced: bool = True) -> Interval | None:
    """`group` minus `other` in correctness on the labelled images that cross-validation held out, image by image.

    Every image has the mean over repeats and seeds, since all of them hold out the same images.

    Args:
        group: cross-validated.
        other: likewise.
        balanced: whether every class has the same weight; False takes the mean over images.

    Returns:
        Mean and interval; None where one of them has a test split, or they were fitted on other labels.
    """
    if not (group.is_cross_validated and other.is_cross_validated):
        return None
    rows, other_rows = _held_out(group), _held_out(other)
    if rows is None or other_rows is None or rows.keys() != other_rows.keys():
        return None
    difference = np.array([rows[key] - other_rows[key] for key in rows])
    labels = np.array([label for _, label in rows])
    return balanced_difference(difference, labels if balanced else np.zeros_like(labels))


def _held_out(group: Group) -> dict[tuple[str, int], float] | None:
    """Mean correctness of each held-out image by id and label; None where the seeds have other images."""
    sums: dict[tuple[str, int], float] = {}
    for i, run in enumerate(group.runs):
        rows = run.predictions()
        assert rows.correct is not None
        own = dict(zip(zip(rows.ids, rows.labels.tolist(), strict=True), rows.correct.tolist(), strict=True))
        if i and own.keys() != sums.keys():
            return None
        sums = {key: sums.get(key, 0.0) + value for key, value in own.items()}
    return {key: value / len(group.runs) for key, value in sums.items()}


def rank_order(run: RunFiles) -> np.ndarray:
    """Class indices (K,) from the most to the fewest labelled images; ties in class order."""
    return np.argsort(-np.nan_to_num(run.per_class("class_counts")), kind="stable")


def tail_third(run: RunFiles) -> np.ndarray:
    """Class indices of the third of the classes, rounded down, with the fewest labelled images."""
    order = rank_order(run)
    return order[len(order) - len(order) // 3 :]


def same_counts(groups: Sequence[Group]) -> bool:
    """Whether every class has the same number of labelled images in all runs, so that each rank is one class."""
    counts = [run.per_class("class_counts") for group in groups for run in group.runs]
    return all(np.array_equal(counts[0], other, equal_nan=True) for other in counts)


def nan_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over the defined values; NaN, without a warning, where none is defined."""
    defined = np.isfinite(values)
    count = defined.sum(axis=axis)
    total = np.where(defined, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)


def _setting(run: RunFiles) -> dict[str, Any]:
    """What distinguishes settings: the options without seeds, the encoder's weights, how the head was realigned."""
    # not the cache's path: the same features may be at another path for another seed
    setting = {key: value for key, value in run.config.items() if key not in _SEED_FIELDS}
    # of the realignment only the method: what it chose on validation differs between seeds
    realigned = run.metrics.get("realigned")
    by = realigned.get("by") if isinstance(realigned, dict) else None
    return setting | {"encoder": run.encoder.get("sha256") or run.encoder.get("name"), "realigned": by}


def _validation(group: Group) -> tuple[bool, float]:
    """What groups are ordered by; estimates by cross-validation are of other images, and come after the others."""
    interval = group.interval(group.choice)
    return not group.is_cross_validated, -math.inf if interval is None else interval.mean


def _shorten(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 16 else text[:15] + "…"
