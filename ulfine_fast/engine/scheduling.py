"""Which trials train together: those of one structure, and no more of them than memory holds."""

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
from ulfine_fast.methods.registry import method_of

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

# what the allocator and the libraries below it take beside the tensors
_MARGIN = 1.2


def schedule(
    cache: FeatureCache,
    features: DeviceFeatures,
    configs: Sequence[FitConfig],
    splits: Sequence[Split],
    chosen: Sequence[int],
    engine: str,
) -> list[list[int]]:
    """The `chosen` trials in trial batches that fit in memory; results do not depend on how they are grouped."""
    batches = []
    for members in group(configs, splits, chosen):
        size = trials_that_fit(cache, features, [configs[i] for i in members], [splits[i] for i in members], engine)
        # batches of even size: three of 67 rather than two of 99 and one of 2
        count = -(-len(members) // size)
        bounds = [len(members) * part // count for part in range(count + 1)]
        batches += [members[start:stop] for start, stop in pairwise(bounds)]
    return batches


def group(configs: Sequence[FitConfig], splits: Sequence[Split], chosen: Sequence[int]) -> list[list[int]]:
    """The `chosen` trials, those of one structure together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i in chosen:
        # a trial without unlabelled images must not train on a neighbour's padding
        has_unlabeled = len(splits[i].unlabeled) > 0
        together = method_of(configs[i]).rows_together(splits[i])
        groups.setdefault((*structural_key(configs[i]), has_unlabeled, together), []).append(i)
    first: dict[int, int] = {}
    for i in chosen:
        first.setdefault(id(splits[i]), i)
    # neighbours of one split read the same images in validation
    return [sorted(members, key=lambda i: first[id(splits[i])]) for members in groups.values()]


def trials_that_fit(
    cache: FeatureCache, features: DeviceFeatures, configs: Sequence[FitConfig], splits: Sequence[Split], engine: str
) -> int:
    """How many of these trials of one structure a trial batch may hold, at least 1 and at most all.

    Where a generous estimate does not settle it, one and two of the largest trials go through a single step of all
    that training does, and the most memory they take says what one more costs.
    """
    device = features.plain.device
    room = int(budget(device) / _MARGIN)
    if len(configs) * estimate(features, configs, splits, len(cache.class_names)) <= room:
        return len(configs)
    config, split = largest(configs, splits)
    # trials of one split would share what they read
    both = [split, replace(split, val=split.val[::-1], unlabeled=split.unlabeled[::-1])]

    def measured(count: int) -> int:
        """Peak bytes of a trial batch of so many."""
        batch = lambda: TrialBatch(cache, features, [config] * count, both[:count], engine)  # noqa: E731
        return peak_bytes(lambda: batch().rehearse(), device)

    one = measured(1)
    if 2 * one > room:
        return 1
    # a method that trains no steps does all its work in the rehearsal, too much to be done for two
    slope = max(1, measured(2) - one) if method_of(config).trains else one
    return max(1, min(len(configs), (room - one) // slope + 1))


def largest(configs: Sequence[FitConfig], splits: Sequence[Split]) -> tuple[FitConfig, Split]:
    """A trial that needs at least as much memory as each of these: the most of everything that they have."""
    roles = ("labeled", "unlabeled", "val", "test")
    longest = {role: max((getattr(split, role) for split in splits), key=len) for role in roles}
    extra = max((split.extra for split in splits), key=lambda extra: sum(map(len, extra.values())))
    select = "best" if any(config.select == "best" for config in configs) else "last"
    most = {name: max(getattr(config, name) for config in configs) for name in ("rank", "feature_noise")}
    return replace(configs[0], select=select, **most), replace(splits[0], **longest, extra=extra)


def estimate(features: DeviceFeatures, configs: Sequence[FitConfig], splits: Sequence[Split], classes: int) -> int:
    """Bytes that one of these trials takes at the very most, by a count of what is kept of it."""
    config, split = largest(configs, splits)
    method = method_of(config)
    dim, heads = features.plain.shape[1], method.heads(config)
    rows = max(config.batch_labeled, method.rows_together(split)) + 2 * config.batch_unlabeled
    # some two dozen copies of the mini-batch in the autograd graph, and the numbers of its draws
    step = 24 * rows * (dim + classes * heads) + 50 * 30 * rows
    # heads and adapter with gradient, velocity, best and kept copies, and temporaries
    weights = 16 * (4 * classes * heads + 2 * config.rank + 4) * dim
    if config.reads_tokens:
        # copies of the encoder's projection, which is no wider than the two tokens together
        weights += 2 * dim * dim
    weights += 100 * min(len(configs), 64) * config.rank * dim // len(configs)
    images = len(split.labeled) + len(split.unlabeled)
    validation = 12 * (min(images, 4096) * (dim + classes * heads) + len(split.val))
    pool = 0
    if method.uses_pool:
        pool = method.pool_values(config, images, features.views.shape[1], dim, classes)
    return 4 * (step + weights + validation + pool)
