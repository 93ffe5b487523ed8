"""Which trials train together: those of one structure, as many as memory holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ulfine_fast.config import FitConfig, structural_key
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.data.splits import Split
from ulfine_fast.engine.memory import budget, peak_bytes
from ulfine_fast.engine.trial_batch import TrialBatch
from ulfine_fast.engine.validation import ROWS, trials_together
from ulfine_fast.methods.registry import method_of

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

# factor for what the allocator and libraries take beside the tensors
_MARGIN = 1.2


def schedule(
    cache: FeatureCache,
    features: DeviceFeatures,
    configs: Sequence[FitConfig],
    splits: Sequence[Split],
    chosen: Sequence[int],
    engine: str,
) -> list[list[int]]:
    """Trial batches of the `chosen` trials that fit in memory; results do not depend on the grouping."""
    batches = []
    for members in group(configs, splits, chosen):
        size = trials_that_fit(cache, features, [configs[i] for i in members], [splits[i] for i in members], engine)
        # batches of even size: three of 67 rather than two of 99 and one of 2
        count = -(-len(members) // size)
        bounds = [len(members) * part // count for part in range(count + 1)]
        batches += [members[start:stop] for start, stop in pairwise(bounds)]
    return batches


def group(configs: Sequence[FitConfig], splits: Sequence[Split], chosen: Sequence[int]) -> list[list[int]]:
    """The `chosen` trials by structure: each group may train in one trial batch."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i in chosen:
        # a trial without unlabelled images must not train on a neighbour's padding
        has_unlabeled = len(splits[i].unlabeled) > 0
        together = method_of(configs[i]).rows_together(splits[i])
        groups.setdefault((*structural_key(configs[i]), has_unlabeled, together), []).append(i)
    first: dict[int, int] = {}
    for i in chosen:
        first.setdefault(id(splits[i]), i)
    # trials of one split come together, as validation reads their images once
    return [sorted(members, key=lambda i: first[id(splits[i])]) for members in groups.values()]


def trials_that_fit(
    cache: FeatureCache, features: DeviceFeatures, configs: Sequence[FitConfig], splits: Sequence[Split], engine: str
) -> int:
    """How many of these trials of one structure a trial batch may hold, at least 1 and at most all.

    Where a generous estimate does not fit, one and two of the largest trials go through one step of training, and the
    difference of their peaks is the memory of one more trial.
    """
    device = features.plain.device
    room = int(budget(device) / _MARGIN)
    if len(configs) * estimate(features, configs, splits, len(cache.class_names)) <= room:
        return len(configs)
    config, split = largest(configs, splits)
    # two unlike splits, since trials of one split share what they read
    both = [split, replace(split, val=split.val[::-1], unlabeled=split.unlabeled[::-1])]

    def measured(count: int) -> int:
        """Peak bytes of a trial batch of so many."""

        def rehearse() -> None:
            TrialBatch(cache, features, [config] * count, both[:count], engine).rehearse()

        return peak_bytes(rehearse, device)

    one = measured(1)
    if 2 * one > room:
        return 1
    # a method without steps does all its work in the rehearsal, too much to repeat for two
    slope = max(1, measured(2) - one) if method_of(config).trains else one
    return max(1, min(len(configs), (room - one) // slope + 1))


def largest(configs: Sequence[FitConfig], splits: Sequence[Split]) -> tuple[FitConfig, Split]:
    """A trial that needs at least as much memory as each of these: with the most of everything that they have."""
    roles = ("labeled", "unlabeled", "val", "test")
    longest = {role: max((getattr(split, role) for split in splits), key=len) for role in roles}
    extra = max((split.extra for split in splits), key=lambda extra: sum(map(len, extra.values())))
    select = "best" if any(config.select == "best" for config in configs) else "last"
    most = {name: max(getattr(config, name) for config in configs) for name in ("rank", "feature_noise")}
    return replace(configs[0], select=select, **most), replace(splits[0], **longest, extra=extra)


def estimate(features: DeviceFeatures, configs: Sequence[FitConfig], splits: Sequence[Split], classes: int) -> int:
    """Upper bound of the bytes that one of these trials takes, by a count of its tensors."""
    config, split = largest(configs, splits)
    method = method_of(config)
    dim, heads = features.plain.shape[1], method.heads(config)
    rows = max(config.batch_labeled, method.rows_together(split)) + 2 * config.batch_unlabeled
    # some two dozen copies of the mini-batch in the autograd graph, and its random numbers
    step = 24 * rows * (dim + classes * heads) + 50 * 30 * rows if method.trains else 0
    # heads and adapter with gradient, velocity, best and kept copies, and temporaries
    weights = 16 * (4 * classes * heads + 2 * config.rank + 4) * dim
    if config.reads_tokens:
        # copies of the encoder's projection, which is no wider than the two tokens together
        weights += 2 * dim * dim
    weights += 100 * min(len(configs), 64) * config.rank * dim // len(configs)
    images = len(split.labeled) + len(split.unlabeled)
    # logits are computed for some trials at a time
    width = max(1, min(images, ROWS))
    together = min(len(configs), trials_together(features, width))
    validation = 12 * (width * (dim + classes * heads) * together // len(configs) + len(split.val))
    pool = 0
    if method.uses_pool:
        pool = method.pool_values(config, images, features.views.shape[1], dim, classes)
    return 4 * (step + weights + validation + pool)
