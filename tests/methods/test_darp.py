from __future__ import annotations

from dataclasses import replace

import torch

from tests.methods.conftest import pool_of
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.ops.refinement import prune, refine


def with_pool(world, step, **values):
    """DARP's world with a pool of 20 images, seen at a step of 100; two are padding in the first trial."""
    trials, method, state, batch = world(method="darp", steps=100, **values)
    present = [[True] * 18 + [False] * 2, [True] * 20]
    rows = normalize(torch.randn(20, 5))
    pool = pool_of(rows, [[0]] * 2, [[0]] * 2, [list(range(20)), list(range(19, -1, -1))], present)
    method.refresh(trials, state, pool, step)
    return trials, method, state, replace(batch, positions=batch.positions % 18), pool


def test_late_pseudo_labels_are_those_of_the_table(world):
    trials, method, state, batch, pool = with_pool(world, 50, threshold=0.6)
    raw = torch.softmax(method.logits(trials, state.tensors, pool.unlabeled), -1)
    totals = trials.log_prior.exp() * torch.tensor([[18.0], [20.0]])
    wanted = refine(prune(raw, pool.present, totals, torch.full((2,), 2.0)), pool.present, totals)
    torch.testing.assert_close(method.pool_probabilities(trials, state), wanted)
    torch.testing.assert_close(wanted.sum(1), totals, rtol=1e-2, atol=1e-2)
    losses = method.losses(trials, state, batch)
    for t in range(2):
        for i, position in enumerate(batch.positions[t].tolist()):
            assert losses.pseudo.labels[t, i] == wanted[t, position].argmax()
            assert losses.pseudo.mask[t, i] == float(wanted[t, position].max() >= 0.6)


def test_early_pseudo_labels_are_fixmatchs(world):
    trials, method, state, batch, pool = with_pool(world, 39, tau=0.0)
    plain, other, start, _ = world(method="fixmatch")
    result, wanted = method.losses(trials, state, batch), other.losses(plain, start, batch)
    torch.testing.assert_close(result.unlabeled, wanted.unlabeled)
    torch.testing.assert_close(result.labeled, wanted.labeled)
    raw = torch.softmax(method.logits(trials, state.tensors, pool.unlabeled), -1)
    torch.testing.assert_close(method.pool_probabilities(trials, state), raw)


def test_each_trial_has_its_own_start(world):
    trials, method, state, _, pool = with_pool(world, 0)
    trials.values["darp_start"] = torch.tensor([0.2, 0.8])
    method.refresh(trials, state, pool, 50)
    assert state.scratch["late"].tolist() == [True, False]
