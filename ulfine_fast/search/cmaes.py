"""CMA-ES over the ranges of a space, its state computed anew from the recorded trials.

Optuna's own sampler pickles its state into the attributes of trials, so that anyone who can write to the database can
run code where it is read. Here the recorded generations are passed to a fresh optimiser, which gives the same state:
parameters and results of trials are all that is read.

SOURCE: Hansen, arXiv 1604.00772, as the package `cmaes` has it. Start, scaling and random numbers are those of Optuna's
`CmaEsSampler`, so that a fresh study proposes the same trials.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cmaes import CMA
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ulfine_fast.search.records import GENERATION, POPULATION

Numeric = FloatDistribution | IntDistribution


class CmaEs(BaseSampler):
    """Proposes numbers by CMA-ES and choices at random, for the trials of one batch.

    Trials of the first batch are drawn at random, those of the second from a Gaussian in the middle of the space. Once
    as many trials of a generation are complete as its population has, they are passed to the optimiser.

    Attributes:
        attributes: what a later batch must know of the trials that are proposed: their generation and its population;
            nothing of those drawn at random.
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution], *, seed: int, population: int) -> None:
        """Search the ranges among `distributions`; `population` counts unless the study has begun with another."""
        self.attributes: dict[str, int] = {}
        self._population = population
        # in the order of their names, as Optuna has them
        self._ranges: dict[str, Numeric] = {
            name: entry
            for name, entry in sorted(distributions.items())
            if isinstance(entry, Numeric) and not entry.single()
        }
        self._random = np.random.RandomState(seed)
        self._choices = RandomSampler(seed=seed)
        self._optimizer: CMA | None = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The ranges."""
        return dict(self._ranges)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A value of each range; none while no trial is complete, and each is then drawn at random."""
        if self._optimizer is None:
            complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if not complete:
                return {}
            self._optimizer = self._replay(complete, 1 if study.direction == StudyDirection.MINIMIZE else -1)
            self.attributes = {GENERATION: self._optimizer.generation, POPULATION: self._population}
            self._stored = any(trial.system_attrs.get(GENERATION, -1) > 0 for trial in complete)
        if not self._stored:
            # Optuna's sampler seeds the optimiser that it makes while it has got no generation
            self._random.randint(1, 2**31 - 2)
        self._optimizer.reseed_rng(int(self._random.randint(1, 2**16)) + trial.number)
        point = self._optimizer.ask()  # (R,), each in 0..1
        return {
            name: _from_unit(float(position), entry)
            for position, (name, entry) in zip(point, self._ranges.items(), strict=True)
        }

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A value drawn at random."""
        return self._choices.sample_independent(study, trial, param_name, param_distribution)

    def _replay(self, complete: Sequence[FrozenTrial], sign: int) -> CMA:
        """The optimiser after all generations that are complete.

        Args:
            complete: trials in the order of their numbers.
            sign: 1 where small values are good, -1 where large ones are.
        """
        recorded = [trial.system_attrs[POPULATION] for trial in complete if POPULATION in trial.system_attrs]
        self._population = recorded[0] if recorded else self._population
        dimensions = len(self._ranges)
        optimizer = CMA(
            mean=np.full(dimensions, 0.5),
            sigma=1 / 6,
            bounds=np.tile([0.0, 1.0], (dimensions, 1)),
            n_max_resampling=10 * dimensions,
            population_size=self._population,
        )
        while True:
            members = [trial for trial in complete if trial.system_attrs.get(GENERATION) == optimizer.generation]
            if members and optimizer.generation > 0:
                # Optuna's sampler saves its state after the first trial of a generation is asked for, which makes the
                # covariance symmetric to the last bit; a copy does the same
                optimizer = copy.deepcopy(optimizer)
            if len(members) < self._population:
                return optimizer
            optimizer.tell([(self._to_unit(t.params), sign * t.values[0]) for t in members[: self._population]])

    def _to_unit(self, params: Mapping[str, Any]) -> NDArray[np.float64]:
        """The position of a trial (R,), each in 0..1."""
        positions = []
        for name, entry in self._ranges.items():
            low, high = _bounds(entry)
            positions.append((_scaled(params[name], entry) - low) / (high - low))
        return np.array(positions)


def _scaled(value: float, entry: Numeric) -> float:
    return math.log(value) if entry.log else float(value)


def _bounds(entry: Numeric) -> tuple[float, float]:
    """Ends of a range on its scale; values with a step between them get half of it at both ends."""
    half = 0.5 * entry.step if entry.step is not None else 0.0
    if entry.log:
        return math.log(entry.low - half), math.log(entry.high + half)
    return float(entry.low) - half, float(entry.high) + half


def _from_unit(position: float, entry: Numeric) -> float:
    """The value at a position in 0..1 of a range."""
    low, high = _bounds(entry)
    scaled = low + position * (high - low)
    if isinstance(entry, IntDistribution):
        value = round(math.exp(scaled)) if entry.log else _nearest(scaled, entry) * entry.step + entry.low
        return min(max(value, entry.low), entry.high)
    if entry.step is not None:
        return float(
            np.clip(np.round((scaled - entry.low) / entry.step) * entry.step + entry.low, entry.low, entry.high)
        )
    # Optuna's floating ranges end below their upper end
    below = float(np.nextafter(entry.high, entry.high - 1))
    return float(np.clip(math.exp(scaled), entry.low, below)) if entry.log else min(scaled, below)


def _nearest(scaled: float, entry: IntDistribution) -> int:
    """Number of the step nearest to a value."""
    return math.floor((scaled - entry.low) / entry.step + 0.5)
