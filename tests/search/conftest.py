"""A sweep that takes a moment: a linear probe or the lightweight method on the small clusters."""

from __future__ import annotations

import pytest

from ulfine_fast import sweep

SPACE = {
    "method": "lightweight",
    "n1": 30,
    "gamma_l": 10.0,
    "steps": 27,
    "eval_every": 9,
    "lr": {"low": 0.001, "high": 0.3, "log": True},
    "threshold": {"low": 0.5, "high": 0.99},
}


def recorded(result):
    """What the study records: parameters, state and values of every trial."""
    return [(trial.params, trial.state.name, trial.values) for trial in result.study.trials]


@pytest.fixture
def search(clusters, tmp_path):
    """Run a small sweep into the test's own folder; the test gives the space and options that it needs."""

    def run(space=None, cache=None, **options):
        arguments = {"out": tmp_path / "sweep", "trials": 6, "sampler": "random", "refit": 0, **options}
        return sweep(cache or clusters, SPACE if space is None else space, **arguments)

    return run
