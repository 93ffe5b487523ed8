"""Both searches on a small world: same draws, no look at test images, and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.speed import sweep
from benchmarks.speed.sweep import PlainLoop, measure, space_of
from tests.benchmarks.program import run_command
from tests.conftest import make_clusters
from ulfine_fast.data.splits import draw_split


@pytest.fixture(scope="module")
def cache():
    return make_clusters(classes=6, train=260, text_noise=2.0, noise=0.7)


@pytest.fixture(scope="module")
def space():
    return space_of(6, 3)


def test_both_searches_draw_the_same_settings(cache, space, monkeypatch):
    drawn = {"engine": [], "plain": []}
    fit_many, run = sweep.fit_many, PlainLoop.run
    monkeypatch.setattr(
        sweep, "fit_many", lambda c, configs, **named: drawn["engine"].append(configs) or fit_many(c, configs, **named)
    )
    monkeypatch.setattr(PlainLoop, "run", lambda loop, config: drawn["plain"].append(config) or run(loop, config))
    rows = measure(cache, 3, 2, space, "cpu")
    assert drawn["engine"][-1][:2] == drawn["plain"]
    assert len({config.lr for config in drawn["engine"][-1]}) == 3
    assert [row["extrapolated"] for row in rows] == [True, False]
    assert rows[0]["seconds"] == pytest.approx(1.5 * rows[0]["measured_seconds"])
    assert rows[1]["seconds"] == rows[1]["measured_seconds"]
    assert [row["finished"] for row in rows] == [2, 3]


def test_neither_search_looks_at_test_images(cache, space):
    blind = replace(cache._loaded, plain=cache.plain.copy())
    blind.plain[np.flatnonzero(cache.splits == "test")] = np.nan
    other = make_clusters(classes=6, train=260, text_noise=2.0, noise=0.7)
    other._loaded = blind
    medians = [
        [row["median_val_balanced_accuracy"] for row in measure(one, 2, 2, space, "cpu")] for one in (cache, other)
    ]
    assert medians[0] == medians[1]


def test_the_plain_loop_learns(cache):
    space = space_of(60, 60)
    config = space.config({"lr": 0.1, "lambda_u": 0.5, "threshold": 0.8}, 0)
    split = draw_split(cache.labels, cache.splits, cache.class_names, config)
    loop = PlainLoop(cache, split, torch.device("cpu"))
    untrained = loop.run(replace(config, lr=0.0, mu=0.0))
    assert loop.run(config) > untrained + 0.05


def test_the_command_prints_and_writes(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "demo", lambda: cache)
    file = tmp_path / "rows.json"
    done = run_command(sweep.sweep, "--trials", 3, "--steps", 4, "--measured", 1, "--json", file)
    assert done.exit_code == 0, done.output
    assert "extrapolated from 1 trials" in done.output
    assert [row["trials"] for row in json.loads(file.read_text())] == [3, 3]
