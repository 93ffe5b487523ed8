"""A sweep's options, checked; all that a worker on another machine needs to know."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ulfine_fast.cache.io.device import pick_device
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import one_of
from ulfine_fast.data.splits import Split
from ulfine_fast.engine.steps import ENGINES
from ulfine_fast.search.objective import check_metrics, direction
from ulfine_fast.search.pruning import check_pruning
from ulfine_fast.search.records import MOST_TRIALS
from ulfine_fast.search.samplers import LEARNING, check_sampler, grid_size
from ulfine_fast.search.space import Space
from ulfine_fast.search.storage import database_url

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

LEARNING_BATCH = 64
"""Trials of a batch where later ones learn from earlier ones: about what already fills a CPU."""

MOST_SEEDS = 10_000
"""Seeds of a trial."""

_RUNS_IN_MEMORY = 1 << 30  # bytes


@dataclass(frozen=True)
class Plan:
    """What is searched, how, and where it is kept.

    Attributes:
        space: what may be tried.
        metrics: validation metrics to optimise; the first one orders trials of the same front.
        sampler: who proposes trials.
        pruning: which trials stop early.
        trials: how many in all, those of earlier calls included.
        batch: trials of a batch.
        seeds: runs averaged for each trial, of seeds `seed`, `seed` + 1, ...
        seed: the first of them, and the seed of the search.
        out: folder of the results.
        owner: random id of that folder.
        storage: URL of the database.
        study: name of the study in it.
        cache: fingerprint of the features.
        split: the split of every trial; None where each config draws its own.
        device: where trials are trained.
        engine: how they are trained.
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

    @property
    def trial_seeds(self) -> range:
        """Seeds that each trial is averaged over."""
        return range(self.seed, self.seed + self.seeds)

    @property
    def own_database(self) -> bool:
        """Whether the study's database is that of the sweep's own folder."""
        return self.storage == database_url(self.out)

    def identity(self) -> dict[str, Any]:
        """What must be equal for trials of two calls to belong to one study, in JSON's types."""
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
    """A short hash of the rows that trials train and are validated on."""
    if split is None:
        return None
    digest = hashlib.sha256()
    # not the test rows: a search does not see them
    for rows in (split.labeled, split.unlabeled, split.val):
        digest.update(rows.tobytes() + b"/")
    return digest.hexdigest()[:16]


def check_options(
    *, trials: int, seeds: int, batch: int | None, refit: int, refit_seeds: int, device: str, engine: str
) -> None:
    """Refuse counts out of range, a device that is not available and an unknown engine.

    Raises:
        InputError: naming the option and its value.
    """
    least = {"trials": 1, "seeds": 1, "refit": 0, "refit-seeds": 1, "batch": 1}
    most = {"trials": MOST_TRIALS, "seeds": MOST_SEEDS, "refit": MOST_TRIALS, "refit-seeds": MOST_SEEDS}
    counts = {"trials": trials, "seeds": seeds, "refit": refit, "refit-seeds": refit_seeds, "batch": batch}
    for name, count in counts.items():
        if name == "batch" and count is None:
            continue
        if isinstance(count, bool) or not isinstance(count, int) or count < least[name]:
            raise InputError(f"{name} must be at least {least[name]}, got {count}")
        if count > most.get(name, MOST_TRIALS):
            raise InputError(f"{name} must be at most {most.get(name, MOST_TRIALS)}, got {count}")
    pick_device(device)
    if engine not in ENGINES:
        raise one_of("engine", engine, ENGINES)


def check_search(space: Space, sampler: str, metrics: tuple[str, ...], pruning: str) -> tuple[str, ...]:
    """Refuse metrics, a sampler and pruning that cannot work on this space; returns the metrics.

    Raises:
        InputError: see :func:`check_metrics`, :func:`check_sampler` and :func:`check_pruning`.
    """
    checked = check_metrics(metrics)
    check_sampler(sampler, space, checked)
    check_pruning(pruning, checked, bool({"steps", "eval_every"} & set(space.searched)))
    return checked


def trial_count(space: Space, sampler: str, trials: int) -> int:
    """How many trials to run: no more than a grid has points."""
    return min(trials, grid_size(space)) if sampler == "grid" else trials


def default_batch(sampler: str, trials: int, seeds: int, cache: FeatureCache, workers: bool) -> int:
    """Trials of a batch: as many as have their runs fit in memory; at most 64 where the sampler learns or Ray works."""
    # a run holds about four arrays the size of its head, and the ids of its images
    run_bytes = 16 * len(cache.class_names) * cache.dim + 8 * len(cache)
    largest = LEARNING_BATCH if workers or sampler in LEARNING else trials
    return max(1, min(trials, largest, _RUNS_IN_MEMORY // (run_bytes * seeds)))
