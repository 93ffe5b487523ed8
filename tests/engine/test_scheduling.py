from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import make_clusters
from ulfine_fast import FitConfig, fit_many
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.engine import scheduling as passes
from ulfine_fast.engine.fit import _splits
from ulfine_fast.engine.memory import peak_bytes
from ulfine_fast.engine.trial_batch import Pass
from ulfine_fast.methods import ulfine_plus

CPU = torch.device("cpu")
SMALL = {"n1": 30, "gamma_l": 10, "gamma_u": 10, "steps": 4, "eval_every": 2}


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Short probes need the same memory."""
    monkeypatch.setattr(ulfine_plus, "_PROBE_STEPS", 3)


def prepared(cache, configs):
    return DeviceFeatures.load(cache, CPU), configs, _splits(cache, configs, None)


def pass_of(cache, features, configs, splits):
    """All that fit_many does with one pass, but for reading the test split."""
    one_pass = Pass(cache, features, configs, splits)
    for _ in one_pass.train():
        pass


@pytest.mark.parametrize("method", ["ulfine", "linear_probe", "ulfine_plus", "flexmatch"])
def test_two_thousand_trials_stay_within_the_budget(clusters, monkeypatch, method):
    """The measured peak of the largest pass that was cut is below a budget that a part of the trials fill."""
    configs = [FitConfig(**SMALL, method=method, seed=s, split_seed=s % 3, rank=1 + s % 8) for s in range(2000)]
    features, configs, splits = prepared(clusters, configs)
    room = 5 << 20
    monkeypatch.setattr(passes, "budget", lambda device: room)
    chunks = passes.cut(clusters, features, configs, splits, range(2000), "auto")
    assert sorted(i for chunk in chunks for i in chunk) == list(range(2000))
    chunk = max(chunks, key=len)
    assert 20 < len(chunk) < 500
    chosen = [configs[i] for i in chunk], [splits[i] for i in chunk]
    peak = peak_bytes(lambda: pass_of(clusters, features, *chosen), CPU)
    assert room / 4 < peak < room


def test_the_estimate_that_spares_the_measuring_is_generous(clusters):
    for method in ("ulfine", "ulfine_plus", "linear_probe", "label_propagation", "gmm", "finessl", "daso", "cossl"):
        given = prepared(clusters, [FitConfig(**SMALL, method=method, seed=s) for s in range(2)])
        peak = peak_bytes(lambda given=given: pass_of(clusters, *given), CPU)
        assert peak < 2 * passes.estimate(*given, 4), method


def test_a_budget_for_nothing_still_lets_one_trial_through(clusters, monkeypatch):
    given = prepared(clusters, [FitConfig(**SMALL, seed=s) for s in range(3)])
    monkeypatch.setattr(passes, "budget", lambda device: 0)
    assert passes.cut(clusters, *given, range(3), "auto") == [[0], [1], [2]]


def test_passes_are_even(clusters, monkeypatch):
    given = prepared(clusters, [FitConfig(**SMALL, seed=s) for s in range(7)])
    monkeypatch.setattr(passes, "trials_that_fit", lambda *given: 3)
    assert passes.cut(clusters, *given, range(7), "auto") == [[0, 1], [2, 3], [4, 5, 6]]
    assert passes.cut(clusters, *given, [1, 5], "auto") == [[1, 5]]


def test_ranks_share_a_group_and_trials_without_unlabelled_images_have_their_own(clusters):
    configs = [FitConfig(**SMALL, rank=3), FitConfig(**SMALL, rank=9), FitConfig(**{**SMALL, "m1": 0}, shape="uniform")]
    _, configs, splits = prepared(clusters, configs)
    assert passes.group(configs, splits, range(3)) == [[0, 1], [2]]


def test_the_largest_trial_has_the_most_of_everything(clusters):
    configs = [
        FitConfig(**{**SMALL, "n1": 40}, rank=3, val_fraction=0.4),
        FitConfig(**{**SMALL, "n1": 10}, rank=9, select="best", feature_noise=0.2),
    ]
    _, configs, splits = prepared(clusters, configs)
    config, split = passes.largest(configs, splits)
    assert (config.rank, config.select, config.feature_noise) == (9, "best", 0.2)
    for role in ("labeled", "unlabeled", "val", "test"):
        assert len(getattr(split, role)) == max(len(getattr(one, role)) for one in splits)


@pytest.mark.parametrize("method", ["ulfine", "ulfine_plus"])
def test_measuring_changes_no_result(clusters, monkeypatch, method):
    configs = [FitConfig(**SMALL, method=method, seed=s) for s in range(3)]
    whole = fit_many(clusters, configs)
    monkeypatch.setattr(passes, "estimate", lambda *given: 1 << 60)
    for one, other in zip(whole, fit_many(clusters, configs), strict=True):
        np.testing.assert_array_equal(one.test_probabilities, other.test_probabilities)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_the_measured_peak_on_a_gpu_is_that_of_its_allocator():
    device = torch.device("cuda")
    assert peak_bytes(lambda: make_clusters() and torch.zeros(1 << 20, device=device), device) == 4 << 20
