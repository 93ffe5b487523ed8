from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import make_clusters
from ulfine_fast import FitConfig, fit_many
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.fused.cuda_graph import Captured
from ulfine_fast.engine import scheduling
from ulfine_fast.engine.fit import draw_splits
from ulfine_fast.engine.memory import peak_bytes
from ulfine_fast.engine.trial_batch import TrialBatch
from ulfine_fast.methods import ulfine_plus

CPU = torch.device("cpu")
SMALL = {"n1": 30, "gamma_l": 10, "gamma_u": 10, "steps": 4, "eval_every": 2}
ULFINE = {"method": "ulfine", **SMALL}


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Short probes need the same memory."""
    monkeypatch.setattr(ulfine_plus, "PROBE_STOPS", (1, 2, 3))


def prepared(cache, configs):
    return DeviceFeatures.load(cache, CPU), configs, draw_splits(cache, configs)


def train_batch(cache, features, configs, splits):
    """All that fit_many does with one trial batch, but for reading the test split."""
    for _ in TrialBatch(cache, features, configs, splits).train():
        pass


@pytest.mark.parametrize("method", ["ulfine", "linear_probe", "ulfine_plus", "flexmatch"])
def test_two_thousand_trials_stay_within_the_budget(clusters, monkeypatch, method):
    """The measured peak of the largest trial batch is below a budget that a part of the trials fill."""
    configs = [FitConfig(**SMALL, method=method, seed=s, split_seed=s % 3, rank=1 + s % 8) for s in range(2000)]
    features, configs, splits = prepared(clusters, configs)
    room = 5 << 20
    monkeypatch.setattr(scheduling, "budget", lambda device: room)
    batches = scheduling.schedule(clusters, features, configs, splits, range(2000), "auto")
    assert sorted(i for batch in batches for i in batch) == list(range(2000))
    largest = max(batches, key=len)
    assert 20 < len(largest) < 500
    chosen = [configs[i] for i in largest], [splits[i] for i in largest]
    peak = peak_bytes(lambda: train_batch(clusters, features, *chosen), CPU)
    assert room / 4 < peak < room


def test_the_estimate_that_spares_the_measuring_is_generous(clusters):
    for method in (
        "ulfine",
        "ulfine_plus",
        "linear_probe",
        "label_propagation",
        "gmm",
        "otfusion",
        "finessl",
        "daso",
        "cossl",
    ):
        inputs = prepared(clusters, [FitConfig(**SMALL, method=method, seed=s) for s in range(2)])
        peak = peak_bytes(lambda inputs=inputs: train_batch(clusters, *inputs), CPU)
        assert peak < 2 * scheduling.estimate(*inputs, 4), method


def test_a_budget_for_nothing_still_lets_one_trial_through(clusters, monkeypatch):
    inputs = prepared(clusters, [FitConfig(**ULFINE, seed=s) for s in range(3)])
    monkeypatch.setattr(scheduling, "budget", lambda device: 0)
    assert scheduling.schedule(clusters, *inputs, range(3), "auto") == [[0], [1], [2]]


def test_trial_batches_are_of_even_size(clusters, monkeypatch):
    inputs = prepared(clusters, [FitConfig(**ULFINE, seed=s) for s in range(7)])
    monkeypatch.setattr(scheduling, "trials_that_fit", lambda *args: 3)
    assert scheduling.schedule(clusters, *inputs, range(7), "auto") == [[0, 1], [2, 3], [4, 5, 6]]
    assert scheduling.schedule(clusters, *inputs, [1, 5], "auto") == [[1, 5]]


def test_ranks_share_a_group_and_trials_without_unlabelled_images_have_their_own(clusters):
    configs = [
        FitConfig(**ULFINE, rank=3),
        FitConfig(**ULFINE, rank=9),
        FitConfig(**{**ULFINE, "m1": 0}, shape="uniform"),
    ]
    _, configs, splits = prepared(clusters, configs)
    assert scheduling.group(configs, splits, range(3)) == [[0, 1], [2]]


def test_the_largest_trial_has_the_most_of_everything(clusters):
    configs = [
        FitConfig(**{**ULFINE, "n1": 40}, rank=3, val_fraction=0.4),
        FitConfig(**{**ULFINE, "n1": 10}, rank=9, select="best", feature_noise=0.2),
    ]
    _, configs, splits = prepared(clusters, configs)
    config, split = scheduling.largest(configs, splits)
    assert (config.rank, config.select, config.feature_noise) == (9, "best", 0.2)
    for role in ("labeled", "unlabeled", "val", "test"):
        assert len(getattr(split, role)) == max(len(getattr(one, role)) for one in splits)


@pytest.mark.parametrize("method", ["ulfine", "ulfine_plus"])
def test_measuring_changes_no_result(clusters, monkeypatch, method):
    configs = [FitConfig(**SMALL, method=method, seed=s) for s in range(3)]
    whole = fit_many(clusters, configs)
    monkeypatch.setattr(scheduling, "estimate", lambda *args: 1 << 60)
    for one, other in zip(whole, fit_many(clusters, configs), strict=True):
        np.testing.assert_array_equal(one.test_probabilities, other.test_probabilities)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_a_rehearsal_on_a_gpu_records_a_step(clusters, monkeypatch):
    graphs = []
    record = Captured._record

    def noted(self, *inputs):
        record(self, *inputs)
        graphs.append(self.graph)

    monkeypatch.setattr(Captured, "_record", noted)
    config = FitConfig(**{**SMALL, "steps": 20, "eval_every": 20}, method="ulfine")
    features = DeviceFeatures.load(clusters, torch.device("cuda"))
    TrialBatch(clusters, features, [config], draw_splits(clusters, [config])).rehearse()
    assert [graph is not None for graph in graphs] == [True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_the_measured_peak_on_a_gpu_is_that_of_its_allocator():
    device = torch.device("cuda")
    assert peak_bytes(lambda: make_clusters() and torch.zeros(1 << 20, device=device), device) == 4 << 20
