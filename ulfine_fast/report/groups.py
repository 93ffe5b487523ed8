"""Put runs that differ only by seed together, and say what the seeds say: means, intervals, paired differences."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ulfine_fast.metrics.intervals import Interval, mean_interval
from ulfine_fast.runs.files import RunFiles

_SEED_FIELDS = frozenset({"seed", "split_seed"})


@dataclass(frozen=True, slots=True)
class Group:
    """The runs of one method and one setting, a seed each.

    Attributes:
        method: method name.
        detail: the fields in which it differs from other settings of the same method ("mu=0.1"), or "".
        runs: the runs, in the order they were read.
        number: 1, 2, ... among the settings of the same method, 0 where there is one only.
    """

    method: str
    detail: str
    runs: tuple[RunFiles, ...]
    number: int = 0

    @property
    def name(self) -> str:
        """The method in words, numbered where it stands in several settings; short enough for a chart."""
        return self.method.replace("_", " ") + (f" #{self.number}" if self.number else "")

    @property
    def label(self) -> str:
        """The name and the fields that set it apart."""
        return f"{self.name} ({self.detail})" if self.detail else self.name

    def interval(self, key: str) -> Interval | None:
        """Mean and interval of one metric over the seeds; None when no run has it."""
        return mean_interval(run.number(key) for run in self.runs)


def group_runs(runs: Sequence[RunFiles]) -> tuple[list[Group], list[RunFiles]]:
    """Group runs by method and setting without the seed.

    Returns:
        The groups, best validation balanced accuracy first (groups without one last), and the runs that were left
        out because the same setting and seed was already there: counted twice, they would make intervals too narrow.
    """
    kept: dict[str, dict[str, RunFiles]] = {}
    repeated: list[RunFiles] = []
    for run in runs:
        seeds = kept.setdefault(_key(run), {})
        seed = json.dumps([run.config.get(field) for field in sorted(_SEED_FIELDS)])
        if seed in seeds:
            repeated.append(run)
        else:
            seeds[seed] = run
    groups = _label([tuple(seeds.values()) for seeds in kept.values()])
    return _numbered(sorted(groups, key=_validation, reverse=True)), repeated


def best_by_validation(groups: Sequence[Group]) -> Group:
    """Return the group with the best mean validation balanced accuracy; the first when none has a validation part."""
    return max(groups, key=_validation)


def not_told_apart(best: Group, groups: Sequence[Group]) -> list[Group]:
    """Return the other groups that validation cannot tell from the best one.

    That is where the paired difference of validation balanced accuracy has an interval that reaches zero, or stands on
    one seed alone; groups without a shared split or without validation are left out.
    """
    found = []
    for group in groups:
        difference = None if group is best else paired_difference(best, group, "val.balanced_accuracy")
        # NaN is the half width of a single seed: no interval, so nothing is told apart
        if difference is not None and not difference.mean - difference.half > 0:
            found.append(group)
    return found


def charted(groups: Sequence[Group], limit: int) -> list[Group]:
    """Choose at most `limit` groups for the charts: the best of each method first, then the rest by validation."""
    firsts = [g for i, g in enumerate(groups) if g.method not in {other.method for other in groups[:i]}]
    # a sweep of one method would otherwise push the baselines off the page
    chosen = (firsts + [g for g in groups if g not in firsts])[:limit]
    return [g for g in groups if g in chosen]


def paired_difference(group: Group, other: Group, key: str) -> Interval | None:
    """Mean and interval of `group` minus `other` over runs with the same seed and the very same split."""
    theirs = {_pair(run): run.number(key) for run in other.runs}
    return mean_interval(run.number(key) - theirs[_pair(run)] for run in group.runs if _pair(run) in theirs)


def rank_order(run: RunFiles) -> np.ndarray:
    """Class indices (K,) from the most to the least labelled images; ties in class order."""
    return np.argsort(-np.nan_to_num(run.per_class("class_counts")), kind="stable")


def tail_third(run: RunFiles) -> np.ndarray:
    """Class indices of the third of the classes, rounded down, with the fewest labelled images."""
    order = rank_order(run)
    return order[len(order) - len(order) // 3 :]


def nan_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over the defined values; NaN, without a warning, where none is defined."""
    defined = np.isfinite(values)
    count = defined.sum(axis=axis)
    total = np.where(defined, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)


def same_counts(groups: Sequence[Group]) -> bool:
    """Tell whether all runs label the same number of images in each class, so that ranks are classes."""
    counts = [run.per_class("class_counts") for group in groups for run in group.runs]
    return all(np.array_equal(counts[0], other, equal_nan=True) for other in counts)


def _setting(run: RunFiles) -> dict[str, Any]:
    """Everything that makes two runs different settings: the config without seeds, and the encoder's weights."""
    # the path of the cache is left out: the same features may lie elsewhere for another seed
    setting = {key: value for key, value in run.config.items() if key not in _SEED_FIELDS}
    # how a head was realigned is no setting of the fit; what was chosen on validation differs between seeds
    realigned = run.metrics.get("realigned")
    by = realigned.get("by") if isinstance(realigned, dict) else None
    return setting | {"encoder": run.encoder.get("sha256") or run.encoder.get("name"), "realigned": by}


def _key(run: RunFiles) -> str:
    return json.dumps(_setting(run), sort_keys=True)


def _pair(run: RunFiles) -> tuple[str, str]:
    return json.dumps(run.seed), run.split_digest


def _validation(group: Group) -> float:
    interval = group.interval("val.balanced_accuracy")
    return -math.inf if interval is None else interval.mean


def _label(members: list[tuple[RunFiles, ...]]) -> list[Group]:
    groups = []
    for runs in members:
        rivals = [_setting(other[0]) for other in members if other[0].method == runs[0].method]
        groups.append(Group(runs[0].method, _detail(_setting(runs[0]), rivals), runs))
    return groups


def _numbered(groups: list[Group]) -> list[Group]:
    """Number the settings of a method in the order of the table."""
    methods = [group.method for group in groups]
    return [
        replace(group, number=methods[: i + 1].count(group.method)) if methods.count(group.method) > 1 else group
        for i, group in enumerate(groups)
    ]


def _detail(setting: dict[str, Any], rivals: list[dict[str, Any]]) -> str:
    """Write the fields of `setting` that are not the same in all rivals."""
    differing = [key for key in setting if len({json.dumps(rival.get(key)) for rival in rivals}) > 1]
    return " ".join(f"{key}={_short(setting[key])}" for key in differing)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 16 else text[:15] + "…"
