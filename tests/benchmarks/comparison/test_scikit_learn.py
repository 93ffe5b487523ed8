import numpy as np
import pytest

from benchmarks.comparison.cells import parse_cell
from benchmarks.comparison.contenders import splits_of
from benchmarks.comparison.scikit_learn import SCIKIT_LEARN, ScikitLearnClassifier, fit_scikit_learn
from tests.conftest import make_clusters
from ulfine_fast.cache.io.errors import InputError


@pytest.fixture(scope="module")
def easy():
    return make_clusters(noise=0.1)


@pytest.fixture(scope="module")
def split(easy):
    return splits_of(parse_cell("folder=/made:20:reversed", 5), easy, [0])[0]


@pytest.mark.parametrize("method", SCIKIT_LEARN)
def test_clusters_far_apart_are_separated(easy, split, method):
    metrics = fit_scikit_learn(ScikitLearnClassifier(method), easy, split)
    assert metrics["balanced_accuracy"] == 1
    assert metrics["pseudo_label_precision"] == 1
    assert metrics["val"]["accuracy"] == 1
    assert metrics["seconds"] > 0


def test_metrics_are_those_of_the_estimator_itself(clusters):
    [split] = splits_of(parse_cell("folder=/made:20:reversed", 5), clusters, [0])
    classifier = ScikitLearnClassifier("sklearn_self_training", threshold=0.6, balanced=True)
    features = np.asarray(clusters.plain, np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    rows = np.concatenate([split.labeled, split.unlabeled])
    visible = np.where(np.isin(rows, split.labeled), clusters.labels[rows], -1)
    own = classifier.build().fit(features[rows], visible)
    metrics = fit_scikit_learn(classifier, clusters, split)
    right = own.predict(features[split.test]) == clusters.labels[split.test]
    assert metrics["accuracy"] == pytest.approx(right.mean())
    confidence = own.predict_proba(features[split.unlabeled]).max(axis=1)
    assert metrics["pseudo_label_rate"] == pytest.approx((confidence >= 0.6).mean(), abs=0.02)


def test_hidden_labels_are_not_used(clusters):
    [split] = splits_of(parse_cell("folder=/made:20:consistent", 5), clusters, [0])
    classifier = ScikitLearnClassifier("sklearn_label_spreading")
    kept = clusters.labels.copy()
    try:
        before = fit_scikit_learn(classifier, clusters, split)["accuracy"]
        clusters.labels[split.unlabeled] = 0
        assert fit_scikit_learn(classifier, clusters, split)["accuracy"] == before
    finally:
        clusters.labels[:] = kept


def test_a_class_without_a_label_is_never_guessed(easy, split):
    lacking = type(split)(
        split.labeled[easy.labels[split.labeled] != 2], split.unlabeled, split.val, split.test, split.class_order
    )
    metrics = fit_scikit_learn(ScikitLearnClassifier("sklearn_label_spreading"), easy, lacking)
    assert metrics["per_class_accuracy"][2] == 0


def test_settings_reach_the_estimator():
    built = ScikitLearnClassifier("sklearn_self_training", threshold=0.9, inverse_penalty=3.0, balanced=True).build()
    assert built.threshold == 0.9
    assert (built.estimator.C, built.estimator.class_weight) == (3.0, "balanced")
    built = ScikitLearnClassifier("sklearn_label_spreading", neighbors=3, alpha=0.5).build()
    assert (built.n_neighbors, built.alpha) == (3, 0.5)


def test_unknown_methods_are_refused():
    with pytest.raises(InputError, match="sklearn_self_training"):
        ScikitLearnClassifier("sklearn_nothing").build()
