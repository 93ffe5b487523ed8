from __future__ import annotations

import math

import pytest
import torch

from ulfine_fast.ops.distributions import (
    aligned,
    distance_from_labeled,
    filled_prior,
    rank_thirds,
    rarity,
    reversed_ranks,
    symmetric_divergence,
)


def test_divergence_is_the_mean_of_both_directions():
    torch.manual_seed(0)
    one, other = torch.softmax(torch.randn(3, 5), -1), torch.softmax(torch.randn(3, 5), -1)
    result = symmetric_divergence(one, other)
    for t in range(3):
        pairs = list(zip(one[t].tolist(), other[t].tolist(), strict=True))
        wanted = sum(p * math.log(p / q) + q * math.log(q / p) for p, q in pairs) / 2
        assert result[t].item() == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(result, symmetric_divergence(other, one))
    assert symmetric_divergence(one, one).abs().max() < 1e-7


def test_an_empty_class_gives_a_finite_divergence():
    assert torch.isfinite(symmetric_divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]))).all()


def test_reversal_is_by_rank_and_not_by_position():
    prior = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.3, 0.5]])
    torch.testing.assert_close(reversed_ranks(prior), torch.tensor([[0.6, 0.1, 0.3], [0.5, 0.3, 0.2]]))
    torch.testing.assert_close(reversed_ranks(reversed_ranks(prior)), prior)


def test_distance_is_the_softmax_of_three_divergences():
    prior = torch.tensor([[0.7, 0.2, 0.1]])
    estimated = torch.tensor([[0.5, 0.2, 0.3]])
    uniform, reverse = torch.full((1, 3), 1 / 3), torch.tensor([[0.1, 0.2, 0.7]])
    powers = [math.exp(symmetric_divergence(estimated, anchor).item()) for anchor in (prior, uniform, reverse)]
    result = distance_from_labeled(estimated, prior)
    assert result.item() == pytest.approx(powers[0] / sum(powers), rel=1e-4)


def test_distance_at_the_anchors():
    steep = torch.softmax(torch.linspace(9, 0, 10), 0)[None]
    uniform = torch.full_like(steep, 0.1)
    same, even, reverse = (distance_from_labeled(x, steep).item() for x in (steep, uniform, reversed_ranks(steep)))
    assert same < 0.05
    assert same < even
    assert reverse > 0.9
    # where the labels are uniform all anchors are one
    assert distance_from_labeled(uniform, uniform).item() == pytest.approx(1 / 3, rel=1e-4)


def test_alignment_by_hand():
    probabilities = torch.tensor([[[0.5, 0.5], [0.8, 0.2]]])
    result = aligned(probabilities, torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(result, torch.tensor([[[0.25, 0.75], [4 / 7, 3 / 7]]]))
    same = aligned(probabilities, torch.tensor([[2.0, 2.0]]), torch.tensor([[0.3, 0.3]]))
    torch.testing.assert_close(same, probabilities)


def test_rarity_leaves_out_classes_without_labels():
    prior = torch.tensor([[0.8, 0.15, 0.05, 0.0], [0.25, 0.25, 0.25, 0.25]])
    result = rarity(prior.clamp(min=1e-8).log())
    torch.testing.assert_close(result, torch.tensor([[0.0625, 1 / 3, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))


def test_a_class_without_labels_gets_a_quarter_of_the_rarest():
    counts = torch.tensor([[8.0, 4.0, 0.0], [1.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    log_prior = torch.log((counts / counts.sum(1, keepdim=True).clamp(min=1)).clamp(min=1e-8))
    result = filled_prior(log_prior)
    torch.testing.assert_close(result[0], torch.tensor([8.0, 4.0, 1.0]) / 13)
    torch.testing.assert_close(result[1], torch.tensor([0.25, 0.25, 0.5]))
    torch.testing.assert_close(result[2], torch.full((3,), 1 / 3))


def test_thirds_go_by_rank():
    prior = torch.tensor([[0.1, 0.3, 0.05, 0.25, 0.2, 0.1]])
    assert rank_thirds(prior).tolist() == [[1, 0, 2, 0, 1, 2]]
    assert rank_thirds(torch.tensor([[0.2, 0.5, 0.3]])).tolist() == [[2, 0, 1]]
