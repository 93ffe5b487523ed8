"""Who proposes trials: Optuna's samplers, asked for a whole trial batch together.

Optuna is imported inside functions: it takes half a second, and checking a sweep's options needs none of it.
"""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import one_of
from ulfine_fast.search.choices import Sampler
from ulfine_fast.search.space import Range, Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

SAMPLERS: tuple[str, ...] = get_args(Sampler)
LEARNING = ("tpe", "cmaes")
"""Samplers that use the results of earlier trials; the others could propose everything at the start."""

MOST_POINTS = 10_000_000
"""Points of a grid, which is held in memory."""


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna's reports of every trial, and its notes on experimental parts, off the terminal."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, message="PedAnova")
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def check_sampler(sampler: str, space: Space, metrics: Sequence[str]) -> None:
    """Refuse a sampler that cannot search this space for these metrics.

    Raises:
        InputError: an unknown sampler, or CMA-ES with several metrics or without two ranges.
    """
    if sampler not in SAMPLERS:
        raise one_of("sampler", sampler, SAMPLERS)
    ranges = [name for name, entry in space.searched.items() if isinstance(entry, Range)]
    if sampler == "cmaes" and len(metrics) > 1:
        raise InputError(f"cmaes searches for one metric, got {', '.join(metrics)}; use tpe or random")
    if sampler == "cmaes" and len(ranges) < 2:
        raise InputError(f"cmaes needs at least two ranges in the space, got {len(ranges)}; use tpe or random")


def grid_size(space: Space) -> int:
    """Points of the space's grid.

    Raises:
        InputError: more than `MOST_POINTS`.
    """
    # counted before they are listed: a range may have any number of them
    most = math.prod(
        float(entry.grid_points if isinstance(entry, Range) else len(entry)) for entry in space.searched.values()
    )
    if most > MOST_POINTS:
        raise InputError(
            f"the grid of the space has {most:g} points, more than {MOST_POINTS:g}; give its ranges a larger step or "
            "fewer points, or use --sampler qmc"
        )
    return math.prod(len(_grid_values(entry)) for entry in space.searched.values())


def propose(
    space: Space,
    sampler: str,
    past: Sequence[FrozenTrial],
    directions: Sequence[Literal["minimize", "maximize"]],
    *,
    start: int,
    count: int,
    seed: int,
    batch: int,
) -> list[FrozenTrial]:
    """Propose the next trials, in a study in memory: a database query for each value would cost more than training.

    Args:
        space: what may be tried.
        sampler: one of `SAMPLERS`.
        past: trials so far, running ones included; only learning samplers look at them.
        directions: "maximize" or "minimize" of each metric.
        start: index of the first trial in the sequence. Samplers that do not learn propose the same trial at the same
            index, however the sequence is split into batches.
        count: how many trials to propose.
        seed: of the search.
        batch: trials of a whole trial batch; a generation of CMA-ES.

    Returns:
        Running trials, with the attributes that CMA-ES reads again.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    learns = sampler in LEARNING
    # a learning sampler continues from the past and needs a fresh seed; the others replay their sequence up to `start`
    sampler_seed = _derived_seed(seed, start) if learns else seed
    searched = distributions(space)
    chosen = _make_sampler(space, sampler, searched, seed=sampler_seed, batch=batch)
    study = optuna.create_study(sampler=chosen, directions=list(directions))
    if learns:
        study.add_trials(list(past))
    for _ in range(count if learns else start + count):
        study.ask(searched)
    attributes = getattr(chosen, "attributes", {})
    return [
        create_trial(
            state=TrialState.RUNNING, params=trial.params, distributions=searched, system_attrs=dict(attributes)
        )
        for trial in study.get_trials(deepcopy=False)[-count:]
    ]


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Optuna's distribution of each searched setting."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    by_name: dict[str, BaseDistribution] = {}
    for name, entry in space.searched.items():
        if not isinstance(entry, Range):
            by_name[name] = CategoricalDistribution(entry)
        elif entry.whole:
            by_name[name] = IntDistribution(int(entry.low), int(entry.high), entry.log, int(entry.step or 1))
        else:
            by_name[name] = FloatDistribution(entry.low, entry.high, entry.log, entry.step)
    return by_name


def _make_sampler(
    space: Space, name: str, searched: Mapping[str, BaseDistribution], *, seed: int, batch: int
) -> BaseSampler:
    from optuna import samplers

    if name == "random":
        return samplers.RandomSampler(seed=seed)
    if name == "grid":
        return samplers.GridSampler({field: _grid_values(entry) for field, entry in space.searched.items()}, seed=seed)
    if name == "qmc":
        silent: Any = {"warn_asynchronous_seeding": False, "warn_independent_sampling": False}
        return samplers.QMCSampler(scramble=True, seed=seed, **silent)
    if name == "cmaes":
        from ulfine_fast.search.cmaes import CmaEs  # start-up: it imports Optuna

        return CmaEs(searched, seed=seed, population=max(batch, 4))
    return samplers.TPESampler(seed=seed, constant_liar=True)


def _grid_values(entry: Range | tuple[Any, ...]) -> list[Any]:
    return entry.grid() if isinstance(entry, Range) else list(entry)


def _derived_seed(seed: int, start: int) -> int:
    """A seed of 31 bits for each index of the sequence, so that a later batch does not repeat an earlier one."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{start}".encode()).digest()[:4], "big") >> 1
