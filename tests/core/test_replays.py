"""Recorded steps: what a replay reads, and on a GPU whole fits of replays against the specification."""

from __future__ import annotations

import warnings

import pytest
import torch

import ulfine_fast.core.fused.step
from tests.conftest import make_clusters
from tests.core.test_fused_runs import compare, configs_of
from ulfine_fast import FitConfig, fit_many
from ulfine_fast.config import readable
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.fused.cuda_graph import Captured
from ulfine_fast.engine.fit import draw_splits
from ulfine_fast.engine.trial_batch import TrialBatch

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHORT = {"gamma_l": 4, "gamma_u": 4, "rank": 4, "threshold": 0.4, "batch_labeled": 16, "batch_unlabeled": 24}


class Reused(Captured):
    """Every call after the first reads its arguments from the memory of the first, as a replay does."""

    def __call__(self, function, *inputs):
        if not self.inputs:
            self.inputs = tuple(tensor.clone() for tensor in inputs)
        for recorded, current in zip(self.inputs, inputs, strict=True):
            recorded.copy_(current)
        function(*self.inputs)


@pytest.mark.parametrize(
    "values", [{"method": "linear_probe"}, {"method": "lightweight"}, {"method": "ulfine", "feature_noise": 0.2}]
)
def test_a_step_reads_nothing_but_its_arguments(monkeypatch, values):
    monkeypatch.setattr(ulfine_fast.core.fused.step, "Captured", Reused)
    compare(make_clusters(classes=5, dim=12), configs_of(**values))


@gpu
@pytest.mark.parametrize("size", [(3, 6, 60), (5, 384, 60), (1100, 33, 6)], ids="{0[0]} classes {0[1]} wide".format)
@pytest.mark.parametrize(
    "values",
    [{"method": "linear_probe"}, {"method": "lightweight"}, {"method": "ulfine"}, {"feature_noise": 0.2}],
    ids=str,
)
def test_replays_train_as_the_specification(monkeypatch, size, values):
    graphs = []
    record = Captured._record

    def noted(self, *arguments):
        record(self, *arguments)
        graphs.append(self.graph)

    monkeypatch.setattr(Captured, "_record", noted)
    classes, dim, train = size
    cache = make_clusters(classes=classes, dim=dim, train=train, test=2)
    options = {**SHORT, "n1": train // 3, "steps": 18, "eval_every": 6, "method": "ulfine", **values}
    options = readable(options["method"], options)
    configs = [FitConfig(**options, seed=seed, momentum=0.9 - seed / 5) for seed in range(3)]

    def drop(step, rows):
        return [1] if step == 6 else []

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = fit_many(cache, configs, device="cuda", engine="fused", watch=drop)
    slow = fit_many(cache, configs, device="cuda", engine="specification", watch=drop)
    # one recording of three trials, one of the two that are left
    assert [graph is not None for graph in graphs] == [True, True]
    for a, b in zip(fast, slow, strict=True):
        assert a.status == b.status
        assert a.history[-1]["loss"] == pytest.approx(b.history[-1]["loss"], rel=1e-3)
        for name, tensor in b.tensors.items():
            torch.testing.assert_close(a.tensors[name], tensor, rtol=1e-2, atol=1e-3)


@gpu
def test_nothing_waits_for_the_gpu_between_two_validations(clusters):
    config = FitConfig(method="ulfine", **SHORT, n1=30, steps=100)
    features = DeviceFeatures.load(clusters, torch.device("cuda"))
    batch = TrialBatch(clusters, features, [config] * 2, draw_splits(clusters, [config]) * 2)
    batch._refresh()
    stepper = batch._stepper()
    for _ in stepper.run(0, 50):
        pass
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in stepper.run(50, 100):
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
