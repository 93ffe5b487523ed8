"""Optuna's own tools work on a sweep's study: its dashboard serves it, its plots draw it."""

from __future__ import annotations

import json

import optuna
import pytest

from tests.search.conftest import SPACE


def ask(app, path):
    """GET a path of a WSGI application; its status and JSON."""
    from wsgiref.util import setup_testing_defaults

    route, _, query = path.partition("?")
    environment = {"PATH_INFO": route, "QUERY_STRING": query}
    setup_testing_defaults(environment)
    seen = []
    body = b"".join(app(environment, lambda status, _headers, _error=None: seen.append(status)))
    return seen[0], json.loads(body)


def test_the_dashboard_serves_the_trials(search):
    dashboard = pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed (extra dashboard)")
    result = search(trials=3, pruning="halving")
    app = dashboard.wsgi(result.storage)
    status, studies = ask(app, "/api/studies")
    assert status.startswith("200")
    (study,) = [one for one in studies["study_summaries"] if one["study_name"] == result.study_name]
    status, detail = ask(app, f"/api/studies/{study['study_id']}?after=0")
    assert status.startswith("200")
    assert [trial["number"] for trial in detail["trials"]] == [0, 1, 2]
    states = [trial.state.name.lower() for trial in result.study.trials]
    assert [trial["state"].lower() for trial in detail["trials"]] == states
    assert {one["name"] for one in detail["trials"][0]["params"]} == {"lr", "threshold"}
    assert detail["objective_names"] == ["balanced_accuracy"]


def test_the_study_says_what_was_searched_and_the_results(search):
    study = search(trials=2, seeds=2).study
    assert study.metric_names == ["balanced_accuracy"]
    assert study.user_attrs["sweep"]["space"]["steps"] == SPACE["steps"]
    seeds = study.trials[0].user_attrs["seeds"]
    assert [(one["seed"], one["status"]) for one in seeds] == [(0, "done"), (1, "done")]
    assert study.trials[0].value == pytest.approx(sum(one["val"]["balanced_accuracy"] for one in seeds) / 2)


def test_optunas_tables_of_a_study(search):
    result = search(trials=3)
    best = optuna.load_study(study_name=result.study_name, storage=result.storage).best_trial
    assert best.value == result.leaderboard[0].metrics["balanced_accuracy"].mean
