from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig
from ulfine_fast.methods.lift import lift_settings
from ulfine_fast.ops.losses import adjusted_cross_entropy


def test_the_loss_is_the_adjusted_cross_entropy_of_the_labelled_images_alone(world):
    trials, method, state, batch = world(method="lift", adapter="residual")
    assert not method.uses_unlabeled
    # the engine draws no unlabelled images for a method that uses none
    losses = method.losses(trials, state, replace(batch, weak=None, strong=None, positions=None))
    logits = 8.0 * batch.labeled @ trials.prototypes.transpose(1, 2)
    wanted = adjusted_cross_entropy(logits, batch.labels, trials.log_prior, torch.ones(2)).mean(-1)
    torch.testing.assert_close(losses.labeled, wanted, rtol=1e-4, atol=1e-5)
    assert losses.unlabeled.tolist() == losses.regularizer.tolist() == [0, 0]
    assert losses.pseudo is None


def test_it_trains_the_adapter_and_starts_from_the_text(world):
    trials, _, state, _ = world(method="lift", adapter="residual")
    assert torch.equal(state.parameters["linear"], trials.prototypes)
    assert {"adapter.down", "adapter.up"} <= set(state.parameters)


@pytest.mark.parametrize(
    ("classes", "layers", "rank"), [(100, 12, 4), (1000, 12, 32), (365, 12, 8), (10, 1, 4), (2, 3, 1)]
)
def test_published_ranks(classes, layers, rank):
    assert lift_settings(500, classes, layers)["rank"] == rank


@pytest.mark.parametrize(("labeled", "steps"), [(1, 10), (128, 10), (129, 20), (10_847, 850)])
def test_ten_epochs_in_steps(labeled, steps):
    assert lift_settings(labeled, 10)["steps"] == steps


def test_the_settings_are_a_legal_config():
    config = FitConfig(method="lift", **lift_settings(300, 10))
    assert (config.scale, config.tau, config.batch_labeled) == (25, 1, 128)


def test_settings_of_nothing_are_refused():
    with pytest.raises(InputError, match=r"at least 1, got \(0, 10, 1\)"):
        lift_settings(0, 10)
