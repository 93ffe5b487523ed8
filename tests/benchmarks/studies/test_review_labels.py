from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.studies import review_labels
from tests.benchmarks.program import run_command
from tests.conftest import make_clusters


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(review_labels, "open_features", lambda data: make_clusters(noise=1.2))
    out = tmp_path / "rows.json"
    done = run_command(review_labels.review_labels, "--gamma", "1,10", "--seeds", "0", "--json", str(out))
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())
    assert [(row["gamma"], row["strategy"]) for row in rows] == [
        (gamma, strategy) for gamma in (1.0, 10.0) for strategy in review_labels.STRATEGIES
    ]
    for row in rows:
        labels = [one["labels"] for one in row["rounds"]]
        assert labels[0] == 4
        assert labels == sorted(set(labels))
        assert row["labels"] in labels
        assert labels[-1] <= row["images"]
        assert all((one["expected"] is None) == (row["strategy"] != "proposed") for one in row["rounds"][1:])
    assert "|demo, 10" in done.output


def test_the_pool_is_long_tailed_and_the_test_split_is_not():
    cache = review_labels.long_tailed(make_clusters(), 6, seed=1)
    train = np.bincount(cache.labels[cache.splits == "train"])
    assert sorted(train.tolist()) == [10, 18, 33, 60]
    assert np.bincount(cache.labels[cache.splits == "test"]).tolist() == [15] * 4


def test_a_target_is_reached_when_it_holds():
    rounds = [{"labels": n, "accuracy": a} for n, a in ((10, 0.5), (30, 0.8), (50, 0.6), (70, 0.8), (90, 0.9))]
    assert review_labels.needed(rounds, 0.7) == 70
    assert review_labels.needed(rounds, 0.95) == 90


def test_the_least_certain_have_the_least_margin():
    from tests.review.test_groups import fit_of

    fit = fit_of([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5], [0.8, 0.2]], [-1] * 4)
    assert review_labels.baseline("margin", fit, np.arange(4), 2, seed=0).tolist() == [2, 0]
    drawn = review_labels.baseline("random", fit, np.arange(4), 2, seed=0)
    assert len(set(drawn.tolist())) == 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_cache_without_a_split_is_refused(monkeypatch, split):
    cache = make_clusters()
    from benchmarks.data import changed_cache

    monkeypatch.setattr(
        review_labels, "open_features", lambda data: changed_cache(cache, np.flatnonzero(cache.splits != split))
    )
    done = run_command(review_labels.review_labels)
    assert done.exit_code == 2
    assert "training images of every class" in done.output
