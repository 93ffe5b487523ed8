"""Small worlds in which methods are compared with formulas written out row by row."""

from __future__ import annotations

import pytest
import torch

from ulfine_fast.config import FitConfig, per_trial_options, readable
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.types import Batch, Pool, Trials
from ulfine_fast.methods.registry import method_of
from ulfine_fast.ops.prototypes import normalize


def trials_of(config, prototypes, log_prior, seeds=None):
    """Trials (T, K, D) that all have the values of one config."""
    count = len(prototypes)
    hyper = {name: torch.full((count,), float(getattr(config, name))) for name in per_trial_options(config)}
    return Trials(config, hyper, torch.arange(count) if seeds is None else seeds, prototypes, log_prior)


def pool_of(features, labeled, labels, unlabeled, present):
    """A pool over plain features (n, D), without views."""
    empty = torch.zeros(0, 1, features.shape[1])
    device = DeviceFeatures(features, empty, 1, torch.full((len(features),), -1))
    return Pool(device, torch.tensor(labeled), torch.tensor(labels), torch.tensor(unlabeled), torch.tensor(present))


@pytest.fixture
def world():
    """Build two trials of three classes, their method, its state and one batch of random unit features."""

    def make(seed=0, count=2, classes=3, dim=5, labeled=6, unlabeled=8, pool=20, **values):
        torch.manual_seed(seed)
        usual = {"adapter": "none", "scale": 8.0, "tau": 1.0, "threshold": 0.5}
        config = FitConfig(**{**readable(values["method"], usual), **values})
        log_prior = torch.log_softmax(torch.randn(count, classes), -1)
        trials = trials_of(config, normalize(torch.randn(classes, dim)).repeat(count, 1, 1), log_prior)
        batch = Batch(
            normalize(torch.randn(count, labeled, dim)),
            torch.randint(classes, (count, labeled)),
            normalize(torch.randn(count, unlabeled, dim)),
            normalize(torch.randn(count, unlabeled, dim)),
            torch.randint(pool, (count, unlabeled)),
        )
        method = method_of(config)
        return trials, method, method.start(trials), batch

    return make


def filled(world, method, **values):
    """A world whose method has read five labelled images for the first trial and three for the second; its pool too."""
    trials, chosen, state, batch = world(method=method, **values)
    features = normalize(torch.randn(12, 5))
    pool = pool_of(
        features, [[0, 1, 2, 3, 4], [5, 6, 7, 0, 0]], [[0, 1, 1, 2, 0], [2, 2, 1, -1, -1]], [[8], [9]], [[True], [True]]
    )
    trials.log_prior[:] = torch.log(torch.tensor([[0.4, 0.4, 0.2], [1e-8, 1 / 3, 2 / 3]]))
    chosen.refresh(trials, state, pool, 0)
    return trials, chosen, state, batch, pool
