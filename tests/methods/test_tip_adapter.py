from __future__ import annotations

import math

import pytest
import torch

from tests.methods.conftest import filled


def slow_logits(trials, pool, t, row, alpha, beta, tau):
    """The paper's formula for one row, with class weights against the long tail."""
    logits = [8.0 * float(row @ trials.prototypes[t, k]) for k in range(3)]
    labels = [label for label in pool.labels[t].tolist() if label >= 0]
    for i, label in enumerate(labels):
        weight = (len(labels) / (3 * labels.count(label))) ** tau
        affinity = math.exp(-beta * (1 - float(row @ pool.labeled[t, i])))
        logits[label] += alpha * weight * affinity
    return logits


@pytest.mark.parametrize("method", ["tip_adapter", "tip_adapter_f"])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_logits_are_the_papers(world, method, tau):
    trials, chosen, state, batch, pool = filled(world, method, cache_weight=2.0, cache_sharpness=3.0, tau=tau)
    result = chosen.logits(trials, state.tensors, batch.weak)
    for t in range(2):
        for row, logits in zip(batch.weak[t], result[t], strict=True):
            assert logits.tolist() == pytest.approx(
                slow_logits(trials, pool, t, row, 2.0, 3.0, tau), rel=1e-4, abs=1e-4
            )


def test_an_empty_weight_leaves_the_text_alone(world):
    trials, chosen, state, batch, _ = filled(world, "tip_adapter", cache_weight=0.0)
    wanted = 8.0 * batch.weak @ trials.prototypes.transpose(1, 2)
    torch.testing.assert_close(chosen.logits(trials, state.tensors, batch.weak), wanted)


def test_a_sharp_cache_gives_its_own_images_their_labels(world):
    trials, chosen, state, _, pool = filled(world, "tip_adapter", cache_weight=100.0, cache_sharpness=200.0)
    result = chosen.logits(trials, state.tensors, pool.labeled).argmax(-1)
    there = pool.labels >= 0
    assert torch.equal(result[there], pool.labels[there])


def test_only_f_trains_and_only_its_keys(world):
    _, plain, state, _, _ = filled(world, "tip_adapter")
    assert not plain.trains
    assert state.parameters == {}
    _, trained, state, _, _ = filled(world, "tip_adapter_f")
    assert trained.trains
    assert set(state.parameters) == {"keys"}
    assert set(state.memory) == {"prototypes", "values"}


def test_a_later_refresh_leaves_trained_keys_as_they_are(world):
    trials, chosen, state, _, pool = filled(world, "tip_adapter_f")
    state.parameters["keys"] = torch.randn_like(state.parameters["keys"])
    before = state.parameters["keys"].clone()
    chosen.refresh(trials, state, pool, 50)
    assert torch.equal(state.parameters["keys"], before)


def test_fs_loss_falls_along_its_gradient_and_padding_gets_none(world):
    trials, chosen, state, batch, _ = filled(world, "tip_adapter_f", cache_weight=3.0)
    keys = state.parameters["keys"].requires_grad_(True)
    before = chosen.losses(trials, state, batch).labeled
    before.sum().backward()
    assert keys.grad[1, 3:].abs().max() == 0
    with torch.no_grad():
        keys.sub_(0.1 * keys.grad)
        assert (chosen.losses(trials, state, batch).labeled < before).all()


def test_keys_that_training_made_long_do_not_overflow(world):
    trials, chosen, state, batch, _ = filled(world, "tip_adapter_f", cache_sharpness=50.0)
    state.parameters["keys"] = 1e3 * state.parameters["keys"]
    assert torch.isfinite(chosen.logits(trials, state.tensors, batch.weak)).all()
