from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.studies import channel_ensemble as bench
from tests.benchmarks.program import run_command
from tests.conftest import make_clusters
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import draw_split
from ulfine_fast.engine.fit import fit
from ulfine_fast.metrics.classification import softmax

VALUES = {"n1": 20, "m1": 30, "gamma_l": 4.0, "gamma_u": 4.0, "steps": 20, "eval_every": 20}


def fitted(**values):
    cache = make_clusters()
    run = fit(cache, FitConfig(**VALUES, method="fixmatch", **values), device="cpu", progress=False)
    return cache, run, draw_split(cache.labels, cache.splits, cache.class_names, run.config)


def test_identical_heads_are_the_first_line_again():
    compared = bench.arms(2, 0.5, 1.0)
    rows = bench.measure(make_clusters(), "fixmatch", [0, 1], VALUES, compared)
    assert [row["arm"] for row in rows[::2]] == list(compared)
    for one, same in zip(rows[:2], rows[2:4], strict=True):
        assert same["balanced_accuracy"] == pytest.approx(one["balanced_accuracy"])
        assert same["correlation"] == pytest.approx(1.0)
    assert all(row["correlation"] < 0.999 for row in rows[4:])
    assert bench.table(rows, "arm", ["guesses"])[1][1].endswith("(+0.0 ±0.0)")


def test_voters_are_means_of_probabilities():
    cache, run, split = fitted()
    voters = bench.voters(cache, run, run, split.unlabeled)
    one = voters["one view"]
    np.testing.assert_allclose(one, softmax(run.logits(cache.plain[split.unlabeled])))
    weak = cache.views("weak")[[list(cache.view_rows).index(row) for row in split.unlabeled]]
    total = one + sum(softmax(run.logits(weak[:, v])) for v in range(weak.shape[1]))
    np.testing.assert_allclose(voters["plain and weak views"], total / (1 + weak.shape[1]), atol=1e-6)
    np.testing.assert_allclose(voters["channel heads"], one)
    assert all(np.allclose(voter.sum(1), 1, atol=1e-4) for voter in voters.values())


def test_prompts_are_zero_shot_classifiers():
    cache = make_clusters()
    rows = cache.plain[:3].astype(np.float64)
    texts = cache.text_features.astype(np.float64)
    of_prompts = bench.prompt_probabilities(cache, cache.plain[:3])
    assert of_prompts.shape == (texts.shape[1], 3, len(texts))
    for p in range(texts.shape[1]):
        for x, probabilities in zip(rows, of_prompts[p], strict=True):
            cosines = [x @ t / np.linalg.norm(x) / np.linalg.norm(t) for t in texts[:, p]]
            wanted = softmax(cache.logit_scale * np.array([cosines]))[0]
            np.testing.assert_allclose(probabilities, wanted, atol=1e-3)


def test_a_probe_learns_from_the_most_confident_guesses():
    cache, run, split = fitted()
    truth = np.eye(len(cache.class_names))[cache.labels[split.unlabeled]]
    right = bench.probe_on_guesses(cache, split, run.config, truth, 1.0)
    assert right["guesses"] == right["kept"] == 1.0
    # the confident half is wrong, the other half right
    half = len(truth) // 2
    mixed = np.concatenate([np.roll(truth[:half], 1, axis=1), 0.9 * truth[half:]])
    wrong = bench.probe_on_guesses(cache, split, run.config, mixed, half / len(truth))
    assert wrong["kept"] == 0.0
    assert wrong["guesses"] == pytest.approx(1 - half / len(truth))
    assert wrong["balanced_accuracy"] < right["balanced_accuracy"]


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "open_features", lambda name: make_clusters())
    monkeypatch.setattr(bench, "arms", lambda *_: {"one head": None, "2 channel heads": {"ensemble_heads": 2}})
    out = tmp_path / "rows.json"
    words = ["--methods", "fixmatch", "--seeds", "0", "--heads", "2", "--json", str(out)]
    done = run_command(bench.channel_ensemble, *words, "--n1", "20", "--m1", "20", "--gamma", "4", "--steps", "5")
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())
    assert [row["arm"] for row in rows if "arm" in row] == ["one head", "2 channel heads"]
    assert [row["voter"] for row in rows if "voter" in row][:2] == ["one view", "channel heads"]
