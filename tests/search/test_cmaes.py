"""CMA-ES without Optuna's pickles: the same proposals as Optuna's own sampler, from parameters and values alone."""

from __future__ import annotations

import json
import pickle
import sqlite3
import warnings
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial

from tests.search.conftest import recorded
from ulfine_fast import InputError
from ulfine_fast.search.records import GENERATION, POPULATION
from ulfine_fast.search.samplers import SAMPLERS, _derived_seed, distributions, propose, quiet_optuna
from ulfine_fast.search.space import parse_space

SPACES = {
    "two ranges": {
        "method": "ulfine",
        "lr": {"low": 0.001, "high": 0.1, "log": True},
        "tau": {"low": 0.0, "high": 2.0},
    },
    "whole numbers": {
        "rank": {"low": 2, "high": 64, "log": True},
        "n1": {"low": 10, "high": 100, "step": 7},
        "lr": {"low": 0.01, "high": 0.1},
    },
    "steps and choices": {
        "tau": {"low": 0.0, "high": 2.0, "step": 0.3},
        "method": ["ulfine", "lightweight"],
        "lr": {"low": 0.001, "high": 0.1, "log": True},
        "warmup": {"low": 0.0, "high": 1.0},
        "labeled_in_unlabeled": [True, False],
    },
}


def ask_optuna(space, past, direction, *, start, count, seed, population):
    """Proposals of Optuna's sampler; `past` are trials as its own storage would keep them, pickles included."""
    sampler = optuna.samplers.CmaEsSampler(
        seed=_derived_seed(seed, start), popsize=population, warn_independent_sampling=False
    )
    study = optuna.create_study(sampler=sampler, direction=direction)
    study.add_trials(past)
    for _ in range(count):
        study.ask(distributions(space))
    return [(trial.params, trial.system_attrs) for trial in study.get_trials(deepcopy=False)[-count:]]


def finished(params, space, random, attributes):
    """A proposed trial as complete; every seventh or so fails or is pruned."""
    state = random.choice(["COMPLETE"] * 6 + ["FAIL", "PRUNED"])
    numbers = [value for value in params.values() if not isinstance(value, str)]
    return create_trial(
        state=TrialState[state],
        params=params,
        distributions=distributions(space),
        value=float(np.sin(np.sum(np.log1p(numbers)))) if state == "COMPLETE" else None,
        system_attrs=attributes,
    )


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("name", SPACES)
def test_proposals_are_those_of_optuna_to_the_last_bit(name, direction):
    space, theirs, ours, start = parse_space(SPACES[name]), [], [], 0
    random = np.random.default_rng(0)
    generations = []
    with quiet_optuna(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # batches of the size of a generation, smaller ones, and larger ones
        for count in [8, 8, 8, 8, 3, 5, 8, 2, 20, 8, 8, 8, 1, 8, 8]:
            expected = ask_optuna(space, theirs, direction, start=start, count=count, seed=3, population=8)
            options = {"start": start, "count": count, "seed": 3, "batch": 8}
            proposed = propose(space, "cmaes", ours, [direction], **options)
            assert [trial.params for trial in proposed] == [params for params, _ in expected]
            assert all(trial.system_attrs.keys() <= {GENERATION, POPULATION} for trial in proposed)
            generations.append(proposed[0].system_attrs.get(GENERATION))
            state = random.bit_generator.state
            theirs += [finished(params, space, random, attributes) for params, attributes in expected]
            random.bit_generator.state = state
            ours += [finished(trial.params, space, random, trial.system_attrs) for trial in proposed]
            start += count
    assert generations[:2] == [None, 0]
    assert max(filter(None, generations)) >= 5


def test_a_generation_keeps_its_size_when_the_batch_changes():
    space, past = parse_space(SPACES["two ranges"]), []
    random = np.random.default_rng(0)
    with quiet_optuna():
        for start, count in [(0, 6), (6, 6), (12, 40)]:
            proposed = propose(space, "cmaes", past, ["maximize"], start=start, count=count, seed=0, batch=count)
            past += [finished(trial.params, space, random, trial.system_attrs) for trial in proposed]
    assert [past[i].system_attrs.get(POPULATION) for i in (0, 6, 12)] == [None, 6, 6]


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plant(database: Path, file: Path) -> None:
    """Add to every trial of a study what Optuna's sampler keeps there: a pickle."""
    text = pickle.dumps(Payload(file)).hex()
    pickle.loads(bytes.fromhex(text))  # it works
    assert file.exists()
    file.unlink()
    with sqlite3.connect(database) as connection:
        for (trial,) in connection.execute("SELECT trial_id FROM trials").fetchall():
            for prefix in ("cma", "sepcma", "cmawm"):
                connection.execute(
                    "INSERT INTO trial_system_attributes (trial_id, key, value_json) VALUES (?, ?, ?)",
                    (trial, f"{prefix}:optimizer:0", json.dumps(text)),
                )
    connection.close()


@pytest.mark.parametrize("sampler", ["cmaes", "tpe", "random", "qmc"])
@pytest.mark.parametrize("shared", [False, True])
def test_nothing_in_a_database_is_unpickled(search, tmp_path, sampler, shared):
    database = tmp_path / "studies.db" if shared else tmp_path / "sweep/sweep.db"
    options = {"sampler": sampler, "batch": 4, "storage": f"sqlite:///{database}" if shared else None}
    search(trials=8, **options)
    plant(database, tmp_path / "owned")
    search(trials=12, **options)
    assert not (tmp_path / "owned").exists()


def test_no_sampler_storage_or_analysis_unpickles(search, tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for sampler in SAMPLERS:
        for trials in (8, 12):
            search(trials=trials, batch=4, sampler=sampler, pruning="halving", out=tmp_path / sampler)


def test_a_sweep_continues_as_if_it_had_not_stopped(search, tmp_path):
    options = {"sampler": "cmaes", "batch": 4, "seeds": 2}
    whole = search(trials=20, out=tmp_path / "whole", **options)
    for trials in (4, 8, 20):
        parts = search(trials=trials, out=tmp_path / "parts", **options)
    assert recorded(parts) == recorded(whole)
    assert [trial.system_attrs.get(GENERATION) for trial in parts.study.trials[::4]] == [None, 0, 1, 2, 3]


def test_attributes_of_the_sampler_are_checked(search, tmp_path):
    options = {"sampler": "cmaes", "batch": 4}
    search(trials=8, **options)
    database = tmp_path / "sweep/sweep.db"
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE trial_system_attributes SET value_json = '1000000' WHERE key = ?", (POPULATION,))
    connection.close()
    with pytest.raises(InputError, match="trial 4 of the study was changed after it was recorded"):
        search(trials=12, **options)
