"""`linear_probe` with solver "converged": in fits, sweeps, the estimator and saved runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from benchmarks.data import unit_rows
from tests.conftest import make_clusters
from tests.methods.conftest import pool_of, trials_of
from ulfine_fast import FitConfig, fit, fit_many
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.data.splits import draw_split
from ulfine_fast.engine import scheduling
from ulfine_fast.engine.memory import peak_bytes
from ulfine_fast.engine.trial_batch import TrialBatch
from ulfine_fast.estimator import LinearProbeClassifier
from ulfine_fast.methods import linear_probe
from ulfine_fast.methods.registry import method_of
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.runs.evidence import evidence_lines
from ulfine_fast.runs.run import Run
from ulfine_fast.search.space import default_space
from ulfine_fast.search.sweep import sweep


def probe(**values):
    """A converged probe on a long-tailed split of the clusters."""
    usual = {"method": "linear_probe", "solver": "converged", "n1": 30, "gamma_l": 10, "gamma_u": 10}
    return FitConfig(**{**usual, **values})


def affine(**values):
    """Plain logistic regression."""
    return probe(head="affine", tau=0.0, **values)


@pytest.mark.parametrize(
    ("options", "weight"), [({}, None), ({"class_weighted": True, "ridge": 0.05, "val_fraction": 0.0}, "balanced")]
)
def test_an_affine_head_is_scikit_learns_logistic_regression(clusters, options, weight):
    config = affine(**options)
    split = draw_split(clusters.labels, clusters.splits, clusters.class_names, config)
    run = fit(clusters, config, split=split)
    rows, labels = unit_rows(clusters.plain), clusters.labels
    model = LogisticRegression(C=1 / config.ridge, class_weight=weight, tol=1e-8, max_iter=5000)
    model.fit(rows[split.labeled], labels[split.labeled])
    wanted = model.predict_log_proba(rows[split.test])
    reached = torch.log_softmax(torch.from_numpy(run.logits(rows[split.test])), 1).numpy()
    np.testing.assert_allclose(reached, wanted, rtol=0.02, atol=0.01)
    assert run.metrics["converged"] == 1
    assert run.metrics["solver_steps"] > 0


@pytest.mark.parametrize("head", ["cosine", "affine"])
def test_a_trial_alone_and_among_others_gives_the_same(clusters, head):
    configs = [
        probe(head=head, seed=seed, n1=n1, ridge=ridge, class_weighted=weighted)
        for seed, n1, ridge, weighted in [(0, 30, 1.0, False), (5, 20, 0.1, True), (9, 25, 100.0, False)]
    ]
    together, alone = fit_many(clusters, configs), fit(clusters, configs[1])
    np.testing.assert_allclose(together[1].test_probabilities, alone.test_probabilities, atol=1e-3)
    assert together[1].metrics["balanced_accuracy"] == alone.metrics["balanced_accuracy"]


@pytest.mark.parametrize("head", ["cosine", "affine"])
def test_a_saved_run_predicts_what_the_fit_did(clusters, tmp_path, head):
    run = fit(clusters, probe(head=head))
    loaded = Run.load(run.save(tmp_path / "run"))
    rows = [clusters.ids.index(name) for name in run.test_ids]
    result = loaded.predict_proba(np.asarray(clusters.plain[rows], dtype=np.float32))
    np.testing.assert_allclose(result, run.test_probabilities, atol=1e-4)


def test_a_cosine_head_has_a_lower_loss_than_sgd(clusters):
    config = probe(ridge=0.0, val_fraction=0.0)
    split = draw_split(clusters.labels, clusters.splits, clusters.class_names, config)
    rows, labels = torch.from_numpy(unit_rows(clusters.plain[split.labeled])), clusters.labels[split.labeled]
    prior = np.log(np.bincount(labels) / len(labels))

    def loss(config):
        """Mean logit-adjusted cross-entropy of the labelled images."""
        logits = torch.from_numpy(fit(clusters, config, split=split).logits(rows) + prior)
        return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)))

    by_sgd = replace(config, solver="sgd", ridge=1.0, steps=300, lr=0.3, weight_decay=0.0)
    assert loss(config) < loss(by_sgd)


def small_pool(rows, labels):
    """Trials over forty images, and their pool; -1 is padding."""
    torch.manual_seed(0)
    features = normalize(torch.randn(40, 6) + torch.nn.functional.one_hot(torch.arange(40) % 3, 6))
    trials = trials_of(affine(), torch.randn(len(rows), 3, 6), torch.full((len(rows), 3), 1 / 3).log())
    empty = [[0]] * len(rows)
    return trials, pool_of(features, rows, labels, empty, [[False]] * len(rows))


def fitted(trials, pool):
    """Weights and biases of all trials."""
    method = method_of(trials.config)
    state = method.start(trials)
    method.refresh(trials, state, pool, 0)
    return torch.cat([state.memory["linear"], state.memory["bias"].unsqueeze(-1)], -1)


def test_trials_share_rows_by_union_or_by_split_with_the_same_result(monkeypatch):
    # images 3 to 30 in common; image 5 has another label in the second trial, and is twice in the third
    rows = [list(range(30)), list(range(3, 33)), [*range(3, 31), 5, 0]]
    labels = [[i % 3 for i in trial] for trial in rows]
    labels[1][2] = 0
    labels[2][-1] = -1
    trials, pool = small_pool(rows, labels)
    [group] = linear_probe._groups(pool, 3)
    assert group.counts.shape == (3, 34)
    assert group.counts.sum(1).tolist() == [30, 30, 29]
    assert group.counts.max() == 2
    together = fitted(trials, pool)
    monkeypatch.setattr(linear_probe, "_UNION", 0.0)
    assert [len(group.trials) for group in linear_probe._groups(pool, 3)] == [1, 1, 1]
    torch.testing.assert_close(fitted(trials, pool), together, rtol=0.01, atol=0.01)


def test_trials_of_one_split_are_one_group_and_those_of_others_apart():
    rows = [list(range(10)), list(range(20, 30)), list(range(10))]
    labels = [[i % 3 for i in trial] for trial in rows]
    _, pool = small_pool(rows, labels)
    assert sorted(group.trials.tolist() for group in linear_probe._groups(pool, 3)) == [[0, 2], [1]]


def test_weak_views_train_with_the_weight_of_one_image(clusters):
    plain, weak = (fit(clusters, affine(train_views=views, ridge=0.1)) for views in ("plain", "weak"))
    assert not np.allclose(plain.test_probabilities, weak.test_probabilities, atol=1e-3)
    # the views of these clusters are near the image: twice the weight would move the head much further
    np.testing.assert_allclose(plain.test_probabilities, weak.test_probabilities, atol=0.1)
    with pytest.raises(InputError, match=r"views.weak = 0; extract again"):
        fit(make_clusters(views=False), affine(train_views="weak"))


def test_separable_classes_without_a_penalty_are_reported():
    cache = make_clusters(noise=0.1)
    runs = fit_many(cache, [affine(ridge=0.0), affine(ridge=1.0)])
    assert [run.metrics["separable"] for run in runs] == [1.0, 0.0]
    assert [run.metrics["converged"] for run in runs] == [0.0, 1.0]
    assert np.isfinite(runs[0].test_probabilities).all()
    [line] = evidence_lines([run.metrics for run in runs], cache.class_names)
    assert line.startswith("1 of 2 fits have no minimum")
    assert evidence_lines([runs[1].metrics], cache.class_names) == []


def test_a_fit_without_unlabelled_images_says_whether_it_converged(clusters):
    run = fit(clusters, affine(m1=0))
    assert run.metrics["converged"] == 1.0
    assert not any("pseudo" in name for name in run.metrics)


@pytest.mark.parametrize("values", [{"head": "affine"}, {"ridge": 2.0}, {"class_weighted": True}])
def test_options_of_the_other_solver_are_refused(clusters, values):
    with pytest.raises(InputError, match="is read by solver converged alone; add --solver converged or leave"):
        fit(clusters, FitConfig(method="linear_probe", **values))


def test_a_sweep_tries_the_options_of_its_solver():
    assert set(default_space("linear_probe").searched) == {"tau", "lr", "weight_decay", "feature_noise"}
    space = default_space("linear_probe", {"solver": "converged", "tau": 0.0})
    assert set(space.searched) == {"ridge"}
    path = space.searched["ridge"].grid()
    assert len(path) == 45
    assert (path[0], path[-1]) == pytest.approx((1e-5, 1e6))


def test_a_sweep_over_penalties_is_one_trial_batch(clusters, tmp_path, monkeypatch):
    sizes = []
    minimise = linear_probe.fit_affine
    monkeypatch.setattr(
        linear_probe, "fit_affine", lambda *args, **named: sizes.append(len(args[3])) or minimise(*args, **named)
    )
    fixed = {name: getattr(affine(), name) for name in ("method", "solver", "head", "tau", "n1", "gamma_l", "gamma_u")}
    space = {"ridge": {"low": 1e-2, "high": 1e3, "log": True, "points": 5}}
    result = sweep(
        clusters, space, settings=fixed, out=tmp_path / "sweep", trials=99, sampler="grid", seeds=2, refit_seeds=2
    )
    # five penalties of each seed share products, as many as there are cores, and so do the refits of each
    assert sum(sizes) == 12
    assert len(sizes) == 2 * min(5, torch.get_num_threads()) + 2
    assert len(result.leaderboard) == 5
    scores = [trial.metrics["balanced_accuracy"].mean for trial in result.leaderboard]
    assert scores[0] > scores[-1]
    assert result.best[0]["test"]["balanced_accuracy"]["mean"] > 0.6


def test_the_estimator_has_the_solver(clusters):
    rows, labels = unit_rows(clusters.plain), clusters.labels
    model = LinearProbeClassifier(solver="converged", head="affine", tau=0.0, ridge=0.1).fit(rows[:240], labels[:240])
    wanted = LogisticRegression(C=10.0, tol=1e-8, max_iter=5000).fit(rows[:240], labels[:240])
    np.testing.assert_allclose(model.predict_proba(rows[240:]), wanted.predict_proba(rows[240:]), atol=0.01)
    # a weight of two is the same as two rows
    weights = 1 + (np.arange(240) % 2)
    weighted = model.fit(rows[:240], labels[:240], sample_weight=weights).predict_proba(rows[240:])
    wanted.fit(rows[:240], labels[:240], sample_weight=weights)
    np.testing.assert_allclose(weighted, wanted.predict_proba(rows[240:]), atol=0.01)


def test_the_estimate_of_its_memory_is_generous(clusters):
    configs = [affine(seed=seed, ridge=ridge) for seed in range(2) for ridge in (0.1, 1.0, 10.0)]
    features = DeviceFeatures.load(clusters, torch.device("cpu"))
    splits = [draw_split(clusters.labels, clusters.splits, clusters.class_names, config) for config in configs]

    def train():
        for _ in TrialBatch(clusters, features, configs, splits).train():
            pass

    peak = peak_bytes(train, torch.device("cpu"))
    assert peak < len(configs) * scheduling.estimate(features, configs, splits, 4)
