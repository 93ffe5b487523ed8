"""Whether validation has images of the classes that a sweep's metrics count: found before hours are spent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig, shared_options
from ulfine_fast.data.splits import KEPT_BY_TRAINING, Split, draw_split, labeled_counts
from ulfine_fast.methods.registry import method_of
from ulfine_fast.metrics.classification import class_groups

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.search.plan import Plan

_ALL_IMAGES = ("accuracy", "ece", "ece_temperature_scaled")  # metrics that do not look at classes
_NAMED = 3  # classes that a sentence names


def check_held_out_images(plan: Plan, cache: FeatureCache) -> list[str]:
    """Refuse metrics that validation cannot give, and say which classes it leaves out.

    Nothing is checked where the space searches options of the split.

    Args:
        plan: of the sweep.
        cache: its features.

    Returns:
        A sentence where classes have no validation image, and the metrics are of the other classes.

    Raises:
        InputError: no validation images, or none of the classes that a metric counts; says what is missing.
    """
    split_options = {name for name, spec in shared_options().items() if spec.metadata["panel"].startswith("Split")}
    if split_options & plan.space.searched.keys():
        return []
    params = {name: e[0] if isinstance(e, tuple) else e.low for name, e in plan.space.searched.items()}
    configs = [plan.space.config(params, seed) for seed in plan.trial_seeds]
    splits = [plan.split or _split(cache, config) for config in configs]
    classes = len(cache.class_names)
    held_out = [np.bincount(cache.labels[split.val], minlength=classes) for split in splits]  # (K,) of each seed
    trained = [labeled_counts(cache.labels, split, classes) for split in splits]

    fix = f"label more than {KEPT_BY_TRAINING} images of a class"
    if plan.split is not None or bool((cache.splits == "val").any()):
        fix = "give the split images of every class for validation"

    # no image at all
    fraction = configs[0].val_fraction
    if not all(counts.any() for counts in held_out):
        if plan.split is None and fraction > 0:
            raise InputError(
                f"there are no validation images to judge by: val_fraction = {fraction:g} takes none of a class with "
                f"{KEPT_BY_TRAINING} labelled images or fewer, and no class has more; {fix}"
            )
        raise InputError("the split has no validation images to judge by; set val_fraction above 0")

    # a metric of classes none of which has one
    for metric in plan.metrics:
        for counts, labeled in zip(held_out, trained, strict=True):
            group = class_groups(labeled).get(metric)
            if group is None or counts[group].any():
                continue
            if not len(group):
                raise InputError(
                    f"no trial has {metric} on validation: no class is in that group; choose another --metric"
                )
            names = _listed([cache.class_names[k] for k in group])
            raise InputError(
                f"no trial has {metric} on validation: there is no validation image of {names}; {fix}, "
                "or choose another --metric"
            )

    # classes that the metrics leave out, whatever the seed
    left_out = np.flatnonzero(sum(held_out) == 0)
    counted = [metric for metric in plan.metrics if metric not in _ALL_IMAGES]
    if not len(left_out) or not counted:
        return []
    most = max(int(labeled[left_out].max()) for labeled in trained)
    names = _listed([cache.class_names[k] for k in left_out])
    return [
        f"there is no validation image of {names} ({most} labelled), so {', '.join(counted)} counts "
        f"{classes - len(left_out)} of {classes} classes; {fix}"
    ]


def _split(cache: FeatureCache, config: FitConfig) -> Split:
    """The split that `fit_many` draws for a config."""
    own = method_of(config).split(cache, config)
    return own or draw_split(cache.labels, cache.splits, cache.class_names, config)


def _listed(names: Sequence[str]) -> str:
    """The first classes by name, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"class {', '.join(map(repr, names[:_NAMED]))}{more}"
