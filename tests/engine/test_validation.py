"""Batched metrics beside those of one trial at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.engine import validation
from ulfine_fast.engine.fit import draw_splits
from ulfine_fast.engine.history import plain
from ulfine_fast.engine.trial_batch import TrialBatch
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.metrics.calibration import fit_temperature

NAMES = ["pseudo_label_rate", "pseudo_label_precision", "confidence_on_false"]
NAMES += [f"per_class_pseudo_label_{name}" for name in ("rate", "precision", "recall")]


@pytest.fixture(params=[1, 200, 1 << 20], ids="{} values a block".format)
def batch(request, clusters, quick, monkeypatch):
    """Trials of different splits, one of them shared, in blocks of one row, of a few, and in one."""
    monkeypatch.setattr(validation, "_VALUES", request.param)
    monkeypatch.setattr(validation, "_ROWS", 7 if request.param == 1 else 4096)
    configs = [
        quick(seed=s, split_seed=s // 2, n1=10 + 5 * s, val_fraction=0.1 * (s % 3), threshold=0.5) for s in range(5)
    ]
    splits = draw_splits(clusters, configs)
    made = TrialBatch(clusters, DeviceFeatures.load(clusters, torch.device("cpu")), configs, splits)
    torch.manual_seed(0)
    made.state.parameters["linear"] += 0.3 * torch.randn(5, 4, 16)
    return made


def logits_of(made, t, role, pseudo=False):
    """One trial's logits of its rows, without blocks or padding."""
    rows = torch.from_numpy(getattr(made.splits[t], role))[None]
    forward = made.method.pseudo_logits if pseudo else made.method.logits
    trials, tensors = made.inputs.trials.part(t, t + 1), made.state.part(t, t + 1).tensors
    return forward(trials, tensors, made.inputs.features.rows(rows))[0].numpy()


def test_accuracies_are_those_of_each_trial_alone(batch, clusters):
    result = batch._validation().accuracy(batch.inputs.val)
    for t, split in enumerate(batch.splits):
        if not len(split.val):
            assert np.isnan(result["balanced_accuracy"][t])
            continue
        wanted = metrics.classification(logits_of(batch, t, "val"), clusters.labels[split.val], np.ones(4))
        for name in ("accuracy", "balanced_accuracy"):
            assert plain(result[name][t]) == pytest.approx(wanted[name])


def test_health_is_that_of_each_trial_alone(batch, clusters):
    result = batch._validation().health(batch.inputs.unlabeled)
    for t, split in enumerate(batch.splits):
        probabilities = metrics.softmax(logits_of(batch, t, "unlabeled", pseudo=True))
        wanted = metrics.pseudo_label_health(probabilities, clusters.labels[split.unlabeled], 0.5, 4)
        for name in NAMES:
            assert plain(result[name][t]) == pytest.approx(wanted[name], abs=1e-6)


def test_health_of_a_sample_is_that_of_every_other_row(batch, clusters):
    longest = batch.inputs.unlabeled.index.shape[1]
    result = batch._validation().health(batch.inputs.unlabeled, most=-(-longest // 2))
    for t, split in enumerate(batch.splits):
        probabilities = metrics.softmax(logits_of(batch, t, "unlabeled", pseudo=True))[::2]
        wanted = metrics.pseudo_label_health(probabilities, clusters.labels[split.unlabeled[::2]], 0.5, 4)
        for name in NAMES:
            assert plain(result[name][t]) == pytest.approx(wanted[name], abs=1e-6)


def test_closing_metrics_are_those_of_each_trial_alone(batch, clusters):
    alone = {(t, role): logits_of(batch, t, role) for t in range(5) for role in ("val", "test")}
    batch._leave(dict.fromkeys(range(5), "done") | {1: "pruned"})
    runs = batch.finish()
    for t, (run, split) in enumerate(zip(runs, batch.splits, strict=True)):
        counts = np.array(run.metrics["class_counts"])
        labels = {role: clusters.labels[getattr(split, role)] for role in ("val", "test")}
        temperature = fit_temperature(alone[t, "val"], labels["val"])
        assert run.metrics["temperature"] == pytest.approx(temperature, rel=1e-4)
        wanted = metrics.classification(alone[t, "val"], labels["val"], counts, temperature)
        assert_equal_metrics(run.metrics["val"], wanted)
        wanted = metrics.classification(alone[t, "test"], labels["test"], counts, temperature)
        if t == 1:  # no trial that was dropped has seen the test split
            assert not wanted.keys() & run.metrics.keys()
            continue
        assert run.metrics["test_rows"] == len(labels["test"])
        assert_equal_metrics({name: run.metrics[name] for name in wanted}, wanted)
        probabilities = metrics.softmax(alone[t, "test"] / temperature)
        assert run.test_probabilities.dtype == np.float32
        np.testing.assert_allclose(run.test_probabilities, probabilities, rtol=1e-3, atol=1e-6)
        assert list(run.test_ids) == [clusters.ids[row] for row in split.test]


def assert_equal_metrics(result, wanted):
    assert list(result) == list(wanted)
    for name, value in wanted.items():
        assert result[name] == pytest.approx(value, abs=1e-5), name


def test_logits_are_in_the_order_of_the_rows(batch):
    result = batch._validation().logits(batch.inputs.test).numpy()
    for t, split in enumerate(batch.splits):
        np.testing.assert_allclose(result[t, : len(split.test)], logits_of(batch, t, "test"), atol=1e-4)


def test_finite_is_asked_of_each_trial():
    tensors = [torch.zeros(4, 3), torch.zeros(4, 2, 2)]
    tensors[0][1, 2], tensors[1][3, 0, 1] = float("inf"), float("nan")
    assert validation.finite(*tensors).tolist() == [True, False, True, False]
