"""Samplers: the same trial at the same index, whatever the batches; every point of a grid once."""

from __future__ import annotations

import optuna
import pytest

from ulfine_fast import InputError
from ulfine_fast.search.samplers import SAMPLERS, check_sampler, distributions, grid_size, propose, quiet_optuna
from ulfine_fast.search.space import parse_space

SPACE = parse_space(
    {
        "method": "ulfine",
        "lr": {"low": 0.001, "high": 0.1, "log": True},
        "tau": {"low": 0.0, "high": 2.0},
        "rank": [4, 16],
    }
)


def params(sampler, start, count, past=(), seed=0, batch=4, space=SPACE):
    with quiet_optuna():
        trials = propose(space, sampler, past, ["maximize"], start=start, count=count, seed=seed, batch=batch)
    return [trial.params for trial in trials]


@pytest.mark.parametrize("sampler", ["random", "grid", "qmc"])
def test_a_sequence_does_not_depend_on_how_it_is_split(sampler):
    whole = params(sampler, 0, 9)
    assert whole == params(sampler, 0, 4) + params(sampler, 4, 3) + params(sampler, 7, 2)
    assert whole != params(sampler, 0, 9, seed=1)


def test_a_grid_tries_every_point_once():
    assert grid_size(SPACE) == 5 * 5 * 2
    points = params("grid", 0, 50)
    assert len({tuple(sorted(one.items())) for one in points}) == 50


def test_quasi_random_trials_fill_the_space_evenly():
    # of 16 consecutive Sobol points after the first, each sixteenth of the range holds about one
    positions = [one["tau"] / 2 for one in params("qmc", 1, 16)]
    assert len({int(8 * position) for position in positions}) == 8


def finished(proposed, score):
    """Trials of an earlier batch, with their values."""
    return [
        optuna.trial.create_trial(params=one, distributions=distributions(SPACE), value=score(one)) for one in proposed
    ]


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_a_learning_sampler_moves_towards_what_was_good(sampler):
    past = []
    for start in range(0, 48, 16):
        proposed = params(sampler, start, 16, past, batch=16)
        assert proposed == params(sampler, start, 16, past, batch=16)
        past += finished(proposed, lambda one: -abs(one["tau"] - 1.5))
    first, last = (sum(abs(trial.params["tau"] - 1.5) for trial in part) for part in (past[:16], past[-16:]))
    assert last < first


def test_refusals():
    with pytest.raises(InputError, match="sampler must be one of tpe, random, grid, cmaes, qmc, got 'best'"):
        check_sampler("best", SPACE, ["few"])
    with pytest.raises(InputError, match="cmaes searches for one metric, got few, ece"):
        check_sampler("cmaes", SPACE, ["few", "ece"])
    with pytest.raises(InputError, match="cmaes needs at least two ranges in the space, got 0"):
        check_sampler("cmaes", parse_space({"rank": [4, 16]}), ["few"])
    for sampler in SAMPLERS:
        check_sampler(sampler, SPACE, ["few"])


def test_optunas_verbosity_is_restored():
    before = optuna.logging.get_verbosity()
    with quiet_optuna():
        assert optuna.logging.get_verbosity() == optuna.logging.ERROR
    assert optuna.logging.get_verbosity() == before
