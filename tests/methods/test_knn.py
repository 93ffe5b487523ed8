from __future__ import annotations

import math

import pytest
import torch

from tests.methods.conftest import filled


def slow_votes(pool, t, row, k, temperature, tau):
    """One row: the k nearest labelled images vote for their class."""
    labels = [label for label in pool.labels[t].tolist() if label >= 0]
    cosines = [float(row @ pool.labeled[t, i]) for i in range(len(labels))]
    votes = [0.0, 0.0, 0.0]
    for i in sorted(range(len(labels)), key=lambda i: -cosines[i])[:k]:
        weight = (len(labels) / (3 * labels.count(labels[i]))) ** tau
        votes[labels[i]] += weight * math.exp((max(cosines[i], 0.0) - 1) / temperature)
    return votes


@pytest.mark.parametrize(("k", "temperature", "tau"), [(1, 0.07, 0.0), (2, 0.5, 1.0), (3, 0.1, 0.5), (50, 0.07, 1.0)])
def test_votes_are_counted(world, k, temperature, tau):
    trials, chosen, state, batch, pool = filled(world, "knn", neighbors=k, vote_temperature=temperature, tau=tau)
    result = chosen.logits(trials, state.tensors, batch.weak).exp()
    for t in range(2):
        for row, votes in zip(batch.weak[t], result[t], strict=True):
            assert votes.tolist() == pytest.approx(slow_votes(pool, t, row, k, temperature, tau), rel=1e-3, abs=1e-9)


def test_a_labelled_image_is_its_own_nearest(world):
    trials, chosen, state, _, pool = filled(world, "knn", neighbors=1)
    result = chosen.logits(trials, state.tensors, pool.labeled).argmax(-1)
    assert result[0].tolist() == [0, 1, 1, 2, 0]
    assert result[1, :3].tolist() == [2, 2, 1]


def test_a_class_without_votes_has_a_finite_logit(world):
    trials, chosen, state, batch, _ = filled(world, "knn", neighbors=1)
    assert torch.isfinite(chosen.logits(trials, state.tensors, batch.weak)).all()
