from __future__ import annotations

import pytest
import torch

from ulfine_fast.ops.sgd import cosine_rate, sgd_step


def test_each_trial_follows_torchs_own_sgd():
    torch.manual_seed(0)
    rates, momenta, decays = [0.1, 0.01, 0.5], [0.9, 0.0, 0.5], [0.0, 0.1, 0.01]
    start = torch.randn(3, 4, 2)
    together = {"w": start.clone().requires_grad_(True)}
    velocity = {"w": torch.zeros_like(start)}
    alone = [start[t].clone().requires_grad_(True) for t in range(3)]
    optimizers = [
        torch.optim.SGD([alone[t]], lr=rates[t], momentum=momenta[t], weight_decay=decays[t]) for t in range(3)
    ]
    for _ in range(5):
        together["w"].square().sum().mul(1.5).backward()
        sgd_step(together, velocity, torch.tensor(rates), torch.tensor(momenta), torch.tensor(decays))
        for weight, optimizer in zip(alone, optimizers, strict=True):
            weight.square().sum().mul(1.5).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(together["w"].detach(), torch.stack([weight.detach() for weight in alone]))


def test_a_parameter_without_gradient_is_left_alone():
    weight = torch.ones(1, 2, requires_grad=True)
    sgd_step({"w": weight}, {"w": torch.zeros(1, 2)}, torch.ones(1), torch.zeros(1), torch.ones(1))
    assert weight.tolist() == [[1, 1]]


def test_the_cosine_falls_from_one_to_almost_zero():
    rates = [cosine_rate(step, 100) for step in range(100)]
    assert rates[0] == 1
    assert rates[50] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.001
    assert rates == sorted(rates, reverse=True)
