"""What a sweep refuses: studies of something else, folders in use, options out of range."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import make_clusters
from tests.search.conftest import SPACE
from ulfine_fast import InputError
from ulfine_fast.search import sweep as module


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"space": {**SPACE, "tau": 0.5}}, "was made with space.tau = None, this sweep says 0.5; use the same"),
        ({"space": {**SPACE, "lr": [0.1, 0.2]}}, "was made with space.lr = "),
        ({"cache": make_clusters(seed=1)}, "was made with cache = "),
        ({"metrics": ["few"]}, r"was made with metrics = \['balanced_accuracy'\], this sweep says \['few'\]"),
        ({"seeds": 2}, "was made with seeds = 1, this sweep says 2"),
        ({"pruning": "halving"}, "was made with pruning = 'none', this sweep says 'halving'"),
    ],
)
def test_a_study_of_something_else(finished, search, change, words):
    with pytest.raises(InputError, match=words):
        search(**{"out": finished, "trials": 1, **change})


@pytest.fixture(scope="module")
def finished(clusters, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "sweep"
    return module.sweep(clusters, SPACE, out=out, trials=1, sampler="random", refit=0).out


def test_a_space_may_be_corrected_before_any_trial_is_finished(search):
    with pytest.raises(InputError, match="n1 = 5000 needs"):
        search({**SPACE, "n1": 5000}, trials=2)
    assert search(trials=2).counts == {"complete": 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"refit": -1}, "refit must be at least 0, got -1"),
        ({"refit_seeds": 0}, "refit-seeds must be at least 1, got 0"),
        ({"metrics": ["best"]}, "metric must be one of"),
        ({"sampler": "best"}, "sampler must be one of"),
        ({"pruning": "best"}, "pruning must be one of"),
        ({"engine": "steam"}, "engine must be one of"),
        ({"device": "tpu"}, "device"),
        ({"storage": "nonsense"}, "is no database URL"),
        ({"storage": "sqlite:////nowhere/at/all.db"}, "cannot open the storage"),
        ({"storage": "postgresql://me:secret@localhost/x"}, "cannot open the storage postgresql://me:.*driver"),
        ({"out": __file__}, "exists and is no sweep"),
        ({"out": Path(__file__).parent}, "exists and is no sweep"),
    ],
)
def test_options_out_of_range(search, options, words):
    with pytest.raises(InputError, match=words) as caught:
        search(**options)
    assert "secret" not in str(caught.value)


def test_two_sweeps_in_one_folder(search, finished):
    from filelock import FileLock

    with FileLock(finished / ".lock"), pytest.raises(InputError, match="another sweep is at work"):
        search(out=finished, trials=1)


def test_a_study_that_another_program_made(search, tmp_path):
    import optuna

    url = f"sqlite:///{tmp_path / 'other.db'}"
    optuna.create_study(storage=url, study_name="theirs")
    with pytest.raises(InputError, match="study 'theirs' was not made by sweep; name another with --study"):
        search(storage=url, study="theirs")
    assert search(storage=url, study="ours", trials=1).counts == {"complete": 1}
