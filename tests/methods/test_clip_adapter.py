from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ulfine_fast.ops.losses import adjusted_cross_entropy


@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
def test_logits_are_the_papers(world, ratio):
    trials, method, state, batch = world(method="clip_adapter", adapter_scale=ratio, rank=4)
    result = method.logits(trials, state.tensors, batch.weak)
    for t in range(2):
        for row, logits in zip(batch.weak[t], result[t], strict=True):
            bottleneck = F.relu(F.relu(row @ state.parameters["down"][t]) @ state.parameters["up"][t])
            blended = F.normalize(ratio * bottleneck + (1 - ratio) * row, dim=0)
            torch.testing.assert_close(logits, 8.0 * trials.prototypes[t] @ blended, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_adjusted_cross_entropy_of_these_logits(world):
    trials, method, state, batch = world(method="clip_adapter", rank=4)
    logits = method.logits(trials, state.tensors, batch.labeled)
    wanted = adjusted_cross_entropy(logits, batch.labels, trials.log_prior, torch.ones(2)).mean(-1)
    torch.testing.assert_close(method.losses(trials, state, batch).labeled, wanted)


def test_the_bottleneck_learns_and_the_text_stays(world):
    trials, method, state, batch = world(method="clip_adapter", rank=4, adapter_scale=0.2)
    for tensor in state.parameters.values():
        tensor.requires_grad_(True)
    method.losses(trials, state, batch).labeled.sum().backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in state.parameters.values())
    assert not state.memory["prototypes"].requires_grad


def test_weights_have_the_spread_of_a_linear_layer(world):
    _, _, state, _ = world(method="clip_adapter", dim=256, rank=64)
    assert state.parameters["down"].std().item() == pytest.approx((1 / (3 * 256)) ** 0.5, rel=0.05)
    assert state.parameters["up"].std().item() == pytest.approx((1 / (3 * 64)) ** 0.5, rel=0.05)
    assert not torch.equal(state.parameters["down"][0], state.parameters["down"][1])
