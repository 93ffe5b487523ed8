"""Classes without validation images: what is missing is said before a trial is trained."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import unit
from ulfine_fast import FeatureCache, InputError
from ulfine_fast.search import trial_batches

PROBE = {"method": "linear_probe", "steps": 4, "eval_every": 4, "lr": {"low": 0.01, "high": 0.1}}


def images(*counts, val=()):
    """A cache of classes c0, c1, ... with so many labelled images each, five for testing, and some for validation."""
    random = np.random.default_rng(0)
    labels, splits = [], []
    for split, numbers in (("train", counts), ("val", val), ("test", [5] * len(counts))):
        for k, number in enumerate(numbers):
            labels += [k] * number
            splits += [split] * number
    means = random.normal(size=(len(counts), 16))
    features = unit(means[labels] + 0.5 * random.normal(size=(len(labels), 16))).astype(np.float16)
    names = [f"c{k}" for k in range(len(counts))]
    ids = [str(row) for row in range(len(labels))]
    return FeatureCache.from_arrays(features, np.array(labels), class_names=names, splits=splits, ids=ids)


@pytest.mark.parametrize(
    ("counts", "options", "words"),
    [
        ((20, 10, 1), {"metrics": ["few"]}, "has few on validation: there is no validation image of class 'c2'; label"),
        ((20, 10, 1), {"metrics": ["ece", "few"]}, "no trial has few on validation"),
        ((20, 10, 1), {"metrics": ["many_shot"]}, "no class is in that group; choose another --metric"),
        ((1, 1, 1), {}, "val_fraction = 0.1 takes none of a class with 3 labelled images or fewer, and no class has"),
        ((3, 2, 1), {"metrics": ["accuracy"]}, "there are no validation images to judge by"),
        ((20, 10, 0), {}, "class 'c2' has no labelled training image"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_trained(search, monkeypatch, counts, options, words):
    monkeypatch.setattr(trial_batches, "fit_many", None)
    with pytest.raises(InputError, match=words):
        search(PROBE, images(*counts), **options)


def test_another_metric_may_be_chosen_then(search):
    with pytest.raises(InputError, match="no trial has few on validation"):
        search(PROBE, images(20, 10, 1), metrics=["few"], trials=2)
    result = search(PROBE, images(20, 10, 1), trials=2)
    assert result.warnings == [
        "there is no validation image of class 'c2' (1 labelled), so balanced_accuracy counts 2 of 3 classes; "
        "label more than 3 images of a class"
    ]


def test_a_metric_over_all_images_leaves_no_class_out(search, tmp_path):
    cache = images(20, 10, 1)
    assert search(PROBE, cache, trials=2, metrics=["accuracy"]).warnings == []
    full = search(PROBE, images(20, 10, 4), trials=2, out=tmp_path / "full")
    assert full.warnings == []


def test_a_cache_with_validation_images_of_its_own(search):
    result = search(PROBE, images(9, 9, 9, 9, 9, 9, val=(4, 0, 0, 0, 0, 2)), trials=2)
    assert result.warnings == [
        "there is no validation image of class 'c1', 'c2', 'c3' and 1 more (9 labelled), so balanced_accuracy counts "
        "2 of 6 classes; give the split images of every class for validation"
    ]
