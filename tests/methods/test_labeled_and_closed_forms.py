"""Supervised methods, CLIP-style ones, graphs and mixtures inside the engine."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import make_clusters
from ulfine_fast import fit, fit_many
from ulfine_fast.config import readable
from ulfine_fast.data.splits import draw_split
from ulfine_fast.runs.run import Run

METHODS = [
    "lift",
    "lift_head",
    "finessl",
    "tip_adapter",
    "tip_adapter_f",
    "knn",
    "label_propagation",
    "gmm",
    "ss_text_u",
    "otter",
    "stata",
    "otfusion",
    "clip_adapter",
    "cross_modal",
    "loft",
    "cross_entropy",
    "class_balanced",
    "ldam",
    "poft",
]


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_alone_and_among_others_gives_the_same(clusters, quick, method):
    # other counts, so that the trial in the middle is padded in both roles
    configs = [
        quick(method=method, seed=s, n1=n1, m1=m1, steps=20) for s, n1, m1 in [(0, 30, 30), (5, 20, 12), (9, 25, 20)]
    ]
    together, alone = fit_many(clusters, configs), fit(clusters, configs[1])
    np.testing.assert_allclose(together[1].test_probabilities, alone.test_probabilities, atol=1e-5)
    assert together[1].metrics["balanced_accuracy"] == alone.metrics["balanced_accuracy"]
    assert together[1].metrics["pseudo_label_precision"] == alone.metrics["pseudo_label_precision"]


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_run_predicts_what_the_fit_did(clusters, quick, tmp_path, method):
    run = fit(clusters, quick(method=method, steps=20))
    loaded = Run.load(run.save(tmp_path / "run"))
    rows = [clusters.ids.index(name) for name in run.test_ids]
    result = loaded.predict_proba(np.asarray(clusters.plain[rows], dtype=np.float32))
    np.testing.assert_allclose(result, run.test_probabilities, atol=1e-4)


# labels tell `otter` no more than the class prior
@pytest.mark.parametrize("method", [method for method in METHODS if method != "otter"])
def test_it_beats_a_text_that_knows_little(quick, method):
    cache = make_clusters(classes=6, text_noise=2.0, noise=0.7)
    tuned = {"cache_weight": 10.0, "anchor": 0.05, "labeled_weight": 10.0, "adapter_scale": 0.5, "lr": 0.1}
    zero, other = (fit(cache, quick(method=m, **readable(m, tuned))) for m in ("zero_shot", method))
    assert other.metrics["balanced_accuracy"] > zero.metrics["balanced_accuracy"] + 0.05


@pytest.mark.parametrize("method", METHODS)
def test_it_fits_without_unlabelled_images(clusters, quick, method):
    run = fit(clusters, quick(method=method, m1=0, steps=20))
    assert np.isfinite(run.test_probabilities).all()


@pytest.mark.parametrize("method", METHODS)
def test_hidden_labels_change_nothing(quick, method):
    config, cache, blind = quick(method=method, steps=20), make_clusters(), make_clusters()
    split = draw_split(cache.labels, cache.splits, cache.class_names, config)
    blind.labels[split.unlabeled] = (blind.labels[split.unlabeled] + 1) % 4
    seen, unseen = (fit(data, config, split=split) for data in (cache, blind))
    np.testing.assert_array_equal(seen.test_probabilities, unseen.test_probabilities)


@pytest.mark.parametrize("method", METHODS)
def test_the_best_evaluation_can_be_kept(clusters, quick, method):
    run = fit(clusters, quick(method=method, select="best", steps=20, eval_every=5, val_fraction=0.3))
    assert np.isfinite(run.test_probabilities).all()
