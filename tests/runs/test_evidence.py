from __future__ import annotations

import json

import pytest

from tests.conftest import make_clusters
from ulfine_fast import FeatureCache, FitConfig, fit
from ulfine_fast.runs.evidence import evidence_lines

NAMES = [f"class {k}" for k in range(12)]
METRICS = {
    "held_out": 80.0,
    "gain_unlabeled": [0.031, 0.004, 0.056],
    "gain_text": [0.002, -0.003, 0.007],
    "weight_of_probe": 0.1,
    "no_class": 212.0,
    "estimated_prior": [0.3, 0.2, 0.1, *[0.05] * 6, 0.04, 0.03, 0.03],
}


def test_a_line_for_each_thing_that_was_measured():
    assert evidence_lines([METRICS], NAMES) == [
        "evidence on 80 held-out labels, points of balanced accuracy: unlabelled images +3.1 [0.4, 5.6]; "
        "text +0.2 [-0.3, 0.7]",
        "estimated classes of the unlabelled images: class 0 30.0%, class 1 20.0%, class 2 10.0%, ..., "
        "class 9 4.0%, class 10 3.0%, class 11 3.0%",
        "212 unlabelled images fit no class",
    ]


def test_seeds_are_averaged():
    other = {**METRICS, "gain_unlabeled": [0.051, 0.024, 0.076], "gain_text": [None, None, None], "no_class": 210.0}
    lines = evidence_lines([METRICS, other], NAMES)
    assert lines[0].endswith("unlabelled images +4.1 [1.4, 6.6]; text +0.2 [-0.3, 0.7], mean of 2 seeds")
    assert lines[-1] == "211 unlabelled images fit no class"


def test_too_few_labels_say_so():
    lines = evidence_lines([{**METRICS, "held_out": 12.0}], NAMES)
    assert lines[0] == "evidence: 12 held-out labels are too few to say what unlabelled images are worth"
    nothing = {**METRICS, "gain_unlabeled": [None] * 3, "gain_text": None}
    assert "too few" in evidence_lines([nothing], NAMES)[0]


def test_a_fall_back_to_the_probe_is_named():
    lines = evidence_lines([{**METRICS, "weight_of_probe": 0.93}], NAMES)
    assert lines[1] == "fell back to the labelled-only probe (weight 0.93): the clusters do not follow the classes"


def test_methods_that_measure_nothing_have_no_line():
    assert evidence_lines([{"accuracy": 0.5}], NAMES) == []


def test_a_fit_names_its_evidence(tmp_path):
    cache = make_clusters(noise=1.5, train=100, test=60)
    run = fit(cache, FitConfig(method="ulfine_plus", n1=20, gamma_l=10, m1=80, gamma_u=1, shape="uniform"))
    saved = json.loads((run.save(tmp_path / "run") / "metrics.json").read_text())
    mean, low, high = saved["gain_unlabeled"]
    assert low <= mean <= high
    assert 20 <= saved["held_out"] <= len(run.split["labeled"])
    assert sum(saved["estimated_prior"]) == pytest.approx(1.0)
    # the true prior is even
    assert max(abs(p - 0.25) for p in saved["estimated_prior"]) < 0.12
    assert 0 <= saved["no_class"] < 0.2 * 320
    assert len(evidence_lines([saved], cache.class_names)) >= 3


def test_images_of_an_unknown_class_fit_none():
    cache = make_clusters(classes=5, noise=0.6, train=100, test=20, text=False)
    labels = [int(label) if label < 4 else -1 for label in cache.labels]
    mixed = FeatureCache.from_arrays(
        cache.plain,
        labels,
        weak=cache.views("weak"),
        strong=cache.views("strong"),
        splits=[
            "unlabeled" if label < 0 and split == "train" else split
            for label, split in zip(labels, cache.splits, strict=True)
        ],
    )
    run = fit(mixed, FitConfig(method="ulfine_plus", labeled_fraction=0.3))
    # a hundred images of the fifth class are unlabelled
    assert 30 < run.metrics["no_class"] < 130
