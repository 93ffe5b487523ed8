"""A sweep's settings, checked; everything that a worker on another machine needs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ulfine_fast.cache.io.device import pick_device
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.data.splits import Split
from ulfine_fast.engine.steps import ENGINES
from ulfine_fast.search.objective import check_metrics, direction
from ulfine_fast.search.pruning import check_pruning
from ulfine_fast.search.samplers import LEARNING, check_sampler, grid_size
from ulfine_fast.search.space import Space

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

LEARNING_BATCH = 64
"""Trials of a pass where later ones profit from earlier ones: about what already fills a CPU."""

_RUNS_IN_MEMORY = 1 << 30  # bytes


@dataclass(frozen=True)
class Plan:
    """What is searched, how, and where it is kept.

    Attributes:
        space: what may be tried. metrics: validation figures wanted, the first decides between equals.
        sampler: who proposes. pruning: which trials are given up early.
        trials: how many in all, those of earlier calls included. batch: in one pass.
        seeds: runs averaged for each trial, of seeds `seed`, `seed` + 1, ...; `seed` is the search's seed too.
        out: folder of the results. owner: its name, which no other sweep has.
        storage: URL of the database. study: name of the study in it.
        cache: fingerprint of the features. split: a given split, None where each config draws its own.
        device, engine: where and how trials are trained.
    """

    space: Space
    metrics: tuple[str, ...]
    sampler: str
    pruning: str
    trials: int
    batch: int
    seeds: int
    seed: int
    out: Path
    owner: str
    storage: str
    study: str
    cache: str
    split: Split | None = None
    device: str = "auto"
    engine: str = "auto"

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Direction of each metric."""
        return [direction(metric) for metric in self.metrics]

    def identity(self) -> dict[str, Any]:
        """What must agree for trials of two calls to stand in one study, in JSON's types."""
        return {
            "space": self.space.to_dict(),
            "cache": self.cache,
            "metrics": list(self.metrics),
            "seeds": self.seeds,
            "seed": self.seed,
            "pruning": self.pruning,
            "split": split_fingerprint(self.split),
        }


def split_fingerprint(split: Split | None) -> str | None:
    """A short hash of the rows that trials train and are judged on."""
    if split is None:
        return None
    digest = hashlib.sha256()
    # not the test rows: a search does not see them
    for rows in (split.labeled, split.unlabeled, split.val):
        digest.update(rows.tobytes() + b"/")
    return digest.hexdigest()[:16]


def check_numbers(trials: int, seeds: int, batch: int | None, refit: int, refit_seeds: int) -> None:
    """Refuse counts that mean nothing.

    Raises:
        InputError: naming the count.
    """
    least = {"trials": (trials, 1), "seeds": (seeds, 1), "refit": (refit, 0), "refit-seeds": (refit_seeds, 1)}
    for name, (value, low) in {**least, "batch": (1 if batch is None else batch, 1)}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InputError(f"{name} must be at least {low}, got {value}")


def check_place(device: str, engine: str) -> None:
    """Refuse a device that is not there and an unknown engine, before trials are asked for.

    Raises:
        InputError: naming it.
    """
    pick_device(device)
    if engine not in ENGINES:
        raise InputError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")


def check_search(space: Space, sampler: str, metrics: tuple[str, ...], pruning: str) -> tuple[str, ...]:
    """Refuse what does not go together; returns the metrics.

    Raises:
        InputError: see the checks of samplers, metrics and pruning.
    """
    wanted = check_metrics(metrics)
    check_sampler(sampler, space, wanted)
    check_pruning(pruning, wanted, bool({"steps", "eval_every"} & set(space.searched)))
    return wanted


def wanted_trials(space: Space, sampler: str, trials: int) -> int:
    """Trials, but no more than a grid has points."""
    return min(trials, grid_size(space)) if sampler == "grid" else trials


def default_batch(sampler: str, trials: int, seeds: int, cache: FeatureCache, workers: bool) -> int:
    """Trials of a pass: all whose runs fit in memory; 64 where the search learns or several workers share them."""
    # a run holds some four arrays the size of its head, and the ids of its images
    each = 16 * len(cache.class_names) * cache.dim + 8 * len(cache)  # bytes
    wanted = LEARNING_BATCH if workers or sampler in LEARNING else trials
    return max(1, min(trials, wanted, _RUNS_IN_MEMORY // (each * seeds)))
