from __future__ import annotations

import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import ulfine_fast
from ulfine_fast import FeatureCache, FitConfig, fit
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.data.splits import Split
from ulfine_fast.estimator import (
    FeatureClassifier,
    FixMatchClassifier,
    LinearProbeClassifier,
    ULFineClassifier,
    ULFinePlusClassifier,
)
from ulfine_fast.methods import registry

EXAMPLES = Path(__file__).parents[1] / "docs/examples"


@parametrize_with_checks([ULFineClassifier(steps=20), LinearProbeClassifier(steps=20), FixMatchClassifier(steps=20)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    """Standardised digits (600, 64), classes, and y with 40 known."""
    features, labels = load_digits(return_X_y=True)
    features = StandardScaler().fit_transform(features)[:600]
    labels = labels[:600]
    y = labels.copy()
    y[40:] = -1
    return features, labels, y


# -- none of the classes, and sets of them


@pytest.fixture(scope="module")
def without_two():
    """Standardised digits, their classes, y with 30 of each class but eight and nine, and which rows are new."""
    features, labels = load_digits(return_X_y=True)
    # in the data's own order, one writer follows the other
    order = np.random.default_rng(0).permutation(len(labels))
    features, labels = StandardScaler().fit_transform(features)[order], labels[order]
    y = np.full(len(labels), -1)
    for k in range(8):
        y[np.flatnonzero(labels == k)[:30]] = k
    new = np.arange(len(labels)) >= 900
    return features, labels, y, new


def test_rows_of_no_class_are_rejected_and_sets_hold_the_class(without_two):
    features, labels, y, new = without_two
    trained = ~new & (labels < 8)
    model = ULFinePlusClassifier().fit(features[trained], y[trained])
    known, unknown = new & (labels < 8), new & (labels >= 8)
    predicted = model.predict(features[new], reject=0.05)
    plain = model.predict(features[new])
    assert ((predicted == plain) | (predicted == -1)).all()
    assert (model.predict(features[known], reject=0.05) == -1).mean() < 0.12
    assert (model.predict(features[unknown], reject=0.2) == -1).mean() > (
        model.predict(features[known], reject=0.2) == -1
    ).mean() + 0.1
    sets = model.predict_sets(features[known], coverage=0.9)
    assert sets.shape == (known.sum(), 8)
    assert 0.85 < sets[np.arange(known.sum()), labels[known]].mean() < 0.99
    wide = model.predict_sets(features[known], coverage=0.99).sum(1)
    assert (wide >= sets.sum(1)).all()


@pytest.mark.parametrize(
    ("classes", "rejected"),
    [(["a", "bb"], "-1"), ([3, 7], -1), (np.array([3, 7], np.uint8), -1), (np.array(["a", "b"], object), "-1")],
)
def test_rejected_rows_are_marked_as_rows_without_a_class_are(digits, classes, rejected):
    features, labels, _ = digits
    kept = labels < 2
    y = np.asarray(classes)[labels[kept]]
    model = LinearProbeClassifier(steps=20, val_fraction=0.5).fit(features[kept], y)
    found = model.predict(features, reject=0.1)
    assert set(found[(found != classes[0]) & (found != classes[1])]) == {rejected}
    assert (found[kept] == y).mean() > 0.8


def test_what_cannot_be_rejected_is_said(digits):
    features, labels, _ = digits
    kept = labels < 2
    model = LinearProbeClassifier(steps=5).fit(features[kept], labels[kept])
    for call in (lambda: model.predict(features, reject=0.1), lambda: model.predict_sets(features)):
        with pytest.raises(InputError, match=r"held no labels out.*val_fraction above 0"):
            call()
    signs = np.where(labels[kept] == 0, -1, 1)
    model = LinearProbeClassifier(steps=5, val_fraction=0.2).fit(features[kept], signs)
    with pytest.raises(InputError, match="a class is called -1, which marks rejected rows"):
        model.predict(features, reject=0.1)


# -- what scikit-learn does with classifiers


def test_pipeline_search_and_cross_validation(digits):
    features, labels, _ = digits
    pipeline = make_pipeline(StandardScaler(), LinearProbeClassifier(steps=30))
    assert cross_val_score(pipeline, features[:200], labels[:200], cv=3).mean() > 0.8
    search = GridSearchCV(ULFineClassifier(steps=20), {"lr": [1e-6, 0.05], "mu": [np.float64(0.01)]}, cv=2)
    search.fit(features[:200], labels[:200])
    assert search.best_params_["lr"] == 0.05


def test_clone_and_set_params():
    one = ULFineClassifier(steps=7, mu=0.2)
    other = clone(one)
    assert other.get_params() == one.get_params()
    assert other.set_params(lr=0.5).lr == 0.5
    assert "method" not in one.get_params()
    assert FeatureClassifier().get_params()["method"] == FitConfig().method == "ulfine_plus"
    assert set(FitConfig(method="ulfine").to_dict()) > set(one.get_params()) - {
        "text_features",
        "device",
        "random_state",
    }
    with pytest.raises(TypeError, match="no parameter 'stepz'"):
        ULFineClassifier(stepz=3)


def test_files(digits, tmp_path):
    features, labels, _ = digits
    model = ULFineClassifier(steps=10).fit(features[:100], labels[:100])
    joblib.dump(model, tmp_path / "model.joblib")
    for again in (joblib.load(tmp_path / "model.joblib"), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(again.predict_proba(features), model.predict_proba(features))


def test_importing_the_package_imports_neither_torch_nor_sklearn():
    code = "import sys, ulfine_fast; assert not {'torch', 'sklearn'} & set(sys.modules); ulfine_fast.ULFineClassifier"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"ULFineClassifier", "FeatureClassifier"} <= set(ulfine_fast.__all__)


# -- what the classes are


@pytest.mark.parametrize("marker", [-1, "-1", None, float("nan")])
def test_classes_of_any_type(digits, marker):
    features, _labels, y = digits
    names = np.array([f"digit {k}" for k in range(10)], dtype=object)
    texts = np.array([marker if k < 0 else names[k] for k in y], dtype=object)
    named = ULFinePlusClassifier().fit(features, texts)
    numbered = ULFinePlusClassifier().fit(features, y)
    assert named.classes_.tolist() == sorted(names)
    assert np.array_equal(named.predict(features), names[numbered.predict(features)])


def test_unlabelled_rows_help(digits):
    features, labels, y = digits
    alone = LinearProbeClassifier().fit(features[:40], y[:40]).score(features[40:], labels[40:])
    together = ULFinePlusClassifier().fit(features, y).score(features[40:], labels[40:])
    assert together > alone + 0.03


def test_two_classes_called_minus_one_and_one(digits):
    features, labels, _ = digits
    rows = labels < 2
    y = np.where(labels[rows] == 1, 1, -1)
    model = LinearProbeClassifier(steps=50).fit(features[rows], y)
    assert model.classes_.tolist() == [-1, 1]
    assert model.decision_function(features[rows]).shape == (rows.sum(),)
    assert model.score(features[rows], y) > 0.95


def test_fewer_than_two_classes_are_refused(digits):
    features, _, _ = digits
    with pytest.raises(InputError, match="at least two classes, got 1 class"):
        ULFineClassifier(steps=1).fit(features[:9], np.zeros(9))


# -- weights


@pytest.mark.parametrize("method", ["linear_probe", "ulfine", "fixmatch", "ulfine_plus"])
def test_a_weight_of_two_is_two_rows(digits, method):
    features, _, y = digits
    rows = np.r_[:40, 40:90]
    weights = np.random.default_rng(0).integers(0, 4, len(rows))
    weights[:10] = 1
    many = np.repeat(rows, weights)
    model = FeatureClassifier(method=method, steps=15)
    weighted = clone(model).fit(features[rows], y[rows], sample_weight=weights).predict_proba(features)
    repeated = clone(model).fit(features[many][::-1], y[many][::-1]).predict_proba(features)
    np.testing.assert_allclose(weighted, repeated, atol=1e-6)


def test_fractional_weights_move_the_model(digits):
    features, labels, _ = digits
    weights = np.where(labels[:100] == 3, 20.5, 0.5)
    model = LinearProbeClassifier(steps=200, tau=0.0)
    plain = clone(model).fit(features[:100], labels[:100]).predict_proba(features)[:, 3].mean()
    heavy = clone(model).fit(features[:100], labels[:100], sample_weight=weights).predict_proba(features)[:, 3].mean()
    assert heavy > 1.05 * plain
    with pytest.raises(ValueError, match="non-zero"):
        model.fit(features[:100], labels[:100], sample_weight=np.zeros(100))


# -- texts, views, validation


def test_texts_are_what_prototypes_start_from(digits):
    features, labels, y = digits
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    texts = np.stack([unit[labels == k].mean(0) for k in range(10)])
    zero_shot = FeatureClassifier(method="zero_shot", text_features=texts, steps=1).fit(features, y)
    wanted = (unit @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T).argmax(1)
    assert np.array_equal(zero_shot.predict(features), wanted)
    partial = texts.copy()
    partial[4] = np.nan
    mixed = FeatureClassifier(method="zero_shot", text_features=partial[:, None], steps=1).fit(features, y)
    partial[4] = unit[:40][y[:40] == 4].mean(0)
    partial /= np.linalg.norm(partial, axis=1, keepdims=True)
    assert np.array_equal(mixed.predict(features), (unit @ partial.T).argmax(1))
    with pytest.raises(InputError, match=r"text_features must be \(10, 64\)"):
        ULFineClassifier(text_features=texts[:3]).fit(features, y)


def test_it_is_the_engines_own_fit(digits):
    """Sorted rows and a given split make the same run as the package's `fit`."""
    features, _labels, y = digits
    model = ULFineClassifier(steps=20, random_state=3).fit(features, y)
    cache = FeatureCache.from_arrays(
        features.astype(np.float32),
        y,
        class_names=list("0123456789"),
        weak=features[:, None].astype(np.float32),
        strong=features[:, None].astype(np.float32),
    )
    order = np.lexsort(np.column_stack([np.arange(600)]).T)
    content = np.ascontiguousarray(np.column_stack([y, features + 0.0]))
    order = np.argsort(content.view(f"V{content.shape[1] * 8}")[:, 0], kind="stable")
    split = Split(order[y[order] >= 0], order[y[order] < 0], np.empty(0, int), np.empty(0, int), np.arange(10))
    run = fit(cache, FitConfig(method="ulfine", steps=20, seed=3, eval_every=20), split=split, progress=False)
    np.testing.assert_allclose(model.decision_function(features), run.logits(features), atol=1e-4)


def test_views_are_used(digits):
    features, _, y = digits
    noise = np.random.default_rng(0).standard_normal((600, 2, 64))
    one = FixMatchClassifier(steps=20).fit(features, y, strong=features[:, None] + noise)
    assert not np.allclose(
        one.predict_proba(features), FixMatchClassifier(steps=20).fit(features, y).predict_proba(features)
    )


def test_validation_rows_fit_the_temperature(digits):
    features, labels, _ = digits
    model = LinearProbeClassifier(steps=100, val_fraction=0.3).fit(features[:400], labels[:400])
    assert model.run_.metrics["temperature"] != 1.0
    assert np.allclose(model.predict_proba(features).sum(1), 1)
    with pytest.raises(InputError, match=r"val_fraction must be between 0 and 0.5, got 0.9"):
        LinearProbeClassifier(val_fraction=0.9).fit(features, labels)


def test_random_state(digits):
    features, _, y = digits
    fits = [
        ULFineClassifier(steps=10, random_state=seed).fit(features, y).predict_proba(features) for seed in (1, 1, 2)
    ]
    assert np.array_equal(fits[0], fits[1])
    assert not np.array_equal(fits[0], fits[2])
    drawn = ULFineClassifier(steps=2, random_state=np.random.RandomState(0)).fit(features, y)
    assert drawn.run_.config.seed == np.random.RandomState(0).randint(2**31 - 1)


@pytest.mark.parametrize("method", registry.names())
def test_every_method_fits_and_predicts(digits, method):
    features, _labels, y = digits
    if method == "proportions":
        with pytest.raises(InputError, match="starts from texts of the classes"):
            FeatureClassifier(method=method, bag_size=4).fit(features[:200], y[:200])
        return
    model = FeatureClassifier(method=method, steps=5).fit(features[:200], y[:200])
    assert model.predict_proba(features[200:230]).shape == (30, 10)
    assert set(model.predict(features)) <= set(range(10))


def test_example(capsys):
    runpy.run_path(str(EXAMPLES / "estimator.py"))
    said = capsys.readouterr().out
    alone, together = (float(line.split(": ")[1]) for line in said.splitlines()[:2])
    assert 0.6 < alone < together


def test_missing_labels_of_every_type_are_unknown(digits):
    import pandas as pd
    import pyarrow as pa

    features, labels = digits[0][:60], digits[1][:60] % 3
    numbers = [None if row % 4 == 3 else int(label) for row, label in enumerate(labels)]
    texts = [None if number is None else f"digit {number}" for number in numbers]
    mask = [number is None for number in numbers]
    wanted = LinearProbeClassifier(steps=5).fit(features, [-1 if number is None else number for number in numbers])
    cases = [pd.Series(values, dtype=kind) for values, kind in ((texts, "string"), (numbers, "Int64"))]
    cases += [pd.Series(values, dtype="category") for values in (texts, numbers)]
    cases += [pa.array(texts), pa.array(numbers), np.ma.MaskedArray(labels, mask=mask)]
    for y in cases:
        fitted = LinearProbeClassifier(steps=5).fit(features, y)
        assert fitted.classes_.tolist() in ([0, 1, 2], ["digit 0", "digit 1", "digit 2"])
        assert np.array_equal(fitted.decision_function(features), wanted.decision_function(features))


def test_masked_features_are_refused(digits):
    masked = np.ma.MaskedArray(digits[0], mask=False)
    masked[0, 0] = np.ma.masked
    with pytest.raises(InputError, match="X has 1 masked value"):
        LinearProbeClassifier().fit(masked, digits[1])
