"""Which trials go through the loop together: those of one structure, and no more of them than memory holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ulfine_fast.config import FitConfig, structural_key
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.data.splits import Split
from ulfine_fast.engine.memory import budget, peak_bytes
from ulfine_fast.engine.trial_batch import Pass
from ulfine_fast.methods.registry import method_of

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

# what the allocator and the libraries below it take beside the tensors
_MARGIN = 1.2


def group(configs: Sequence[FitConfig], splits: Sequence[Split], chosen: Sequence[int]) -> list[list[int]]:
    """The `chosen` trials, those of one structure together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i in chosen:
        # a trial without unlabelled images must not be handed a neighbour's padding to learn from
        # nor take as many bags into a mini-batch as a neighbour's larger ones allow
        width = _bag_width(splits[i])
        groups.setdefault((*structural_key(configs[i]), len(splits[i].unlabeled) > 0, width), []).append(i)
    first: dict[int, int] = {}
    for i in chosen:
        first.setdefault(id(splits[i]), i)
    # neighbours of one split read the same images when they are judged
    return [sorted(members, key=lambda i: first[id(splits[i])]) for members in groups.values()]


def _bag_width(split: Split) -> int:
    """Images in the largest bag, 0 without bags."""
    return 0 if split.bags is None else split.bags.width


def cut(
    cache: FeatureCache,
    features: DeviceFeatures,
    configs: Sequence[FitConfig],
    splits: Sequence[Split],
    chosen: Sequence[int],
    engine: str,
) -> list[list[int]]:
    """The `chosen` trials as passes that fit in memory; results do not depend on the cut."""
    passes = []
    for members in group(configs, splits, chosen):
        theirs = [configs[i] for i in members], [splits[i] for i in members]
        size = trials_that_fit(cache, features, *theirs, engine)
        # passes of even size: three of 67 rather than two of 99 and one of 2
        count = -(-len(members) // size)
        bounds = [len(members) * part // count for part in range(count + 1)]
        passes += [members[start:stop] for start, stop in pairwise(bounds)]
    return passes


def trials_that_fit(
    cache: FeatureCache, features: DeviceFeatures, configs: Sequence[FitConfig], splits: Sequence[Split], engine: str
) -> int:
    """How many of these trials of one structure a pass may hold, at least 1 and at most all.

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
        return peak_bytes(lambda: Pass(cache, features, [config] * count, both[:count], engine).rehearse(), device)

    one = measured(1)
    if 2 * one > room:
        return 1
    # a method that trains no steps does all its work in the rehearsal, too much to be done for two
    slope = max(1, measured(2) - one) if method_of(config).trains else one
    return max(1, min(len(configs), (room - one) // slope + 1))


def largest(configs: Sequence[FitConfig], splits: Sequence[Split]) -> tuple[FitConfig, Split]:
    """A trial that needs at least as much memory as each of these: the most of all that they have."""
    roles = ("labeled", "unlabeled", "val", "test")
    longest = {role: max((getattr(split, role) for split in splits), key=len) for role in roles}
    bags = max((split.bags for split in splits if split.bags is not None), key=lambda own: len(own.names), default=None)
    select = "best" if any(config.select == "best" for config in configs) else "last"
    most = {name: max(getattr(config, name) for config in configs) for name in ("rank", "feature_noise")}
    return replace(configs[0], select=select, **most), replace(splits[0], **longest, bags=bags)


def estimate(features: DeviceFeatures, configs: Sequence[FitConfig], splits: Sequence[Split], classes: int) -> int:
    """Bytes that one of these trials takes at the very most, by a count of what is kept of it."""
    config, split = largest(configs, splits)
    dim, width = features.plain.shape[1], _bag_width(split)
    rows = max(config.batch_labeled, width) + 2 * config.batch_unlabeled
    heads = max(1, config.ensemble_heads)
    # some two dozen copies of the batch in the autograd graph, and the numbers of its draws
    step = 24 * rows * (dim + classes * heads) + 50 * 30 * rows
    # heads and adapter with gradient, velocity, best and kept copies, and temporaries
    weights = 16 * (4 * classes * heads + 2 * config.rank + 4) * dim
    if config.reads_tokens:
        # copies of the encoder's projection, which is no wider than the two tokens together
        weights += 2 * dim * dim
    weights += 100 * min(len(configs), 64) * config.rank * dim // len(configs)
    images = len(split.labeled) + len(split.unlabeled)
    judged = 12 * (min(images, 4096) * (dim + classes * heads) + len(split.val))
    pool = 0
    if method_of(config).uses_pool:
        # copies of all views and plain rows, and arrays of logits for every start and fold
        candidates = 5 * (1 + config.folds)
        pool = 2 * images * ((2 * features.views.shape[1] + 6) * dim + 8 * candidates * classes)
        pool += 64 * images * config.neighbors + 8 * dim * dim
    return 4 * (step + weights + judged + pool)
