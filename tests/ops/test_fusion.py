from __future__ import annotations

import pytest
import torch

from ulfine_fast.ops.fusion import align, fuse

RULES = ["standardize", "max-ratio", "none"]


def slow_align(linear, similarity, rule):
    """One row at a time."""
    out = torch.zeros_like(linear)
    for t in range(linear.shape[0]):
        for b in range(linear.shape[1]):
            row, other = linear[t, b], similarity[t, b]
            if rule == "standardize":
                deviation = ((row - row.mean()) ** 2).mean() ** 0.5
                target = ((other - other.mean()) ** 2).mean() ** 0.5
                out[t, b] = (row - row.mean()) / deviation * target + other.mean()
            elif rule == "max-ratio":
                out[t, b] = row * other.abs().max() / row.abs().max()
            else:
                out[t, b] = row
    return out


@pytest.mark.parametrize("rule", RULES)
def test_align_equals_the_slow_one(rule):
    torch.manual_seed(0)
    linear, similarity = 7 * torch.randn(2, 3, 5).double(), torch.randn(2, 3, 5).double()
    torch.testing.assert_close(
        align(linear, similarity, rule), slow_align(linear, similarity, rule), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("rule", RULES)
def test_align_keeps_the_order_of_classes(rule):
    torch.manual_seed(1)
    linear, similarity = torch.randn(2, 6, 9), torch.randn(2, 6, 9)
    assert torch.equal(align(linear, similarity, rule).argsort(-1), linear.argsort(-1))


def test_standardized_rows_have_the_similarity_rows_moments():
    torch.manual_seed(2)
    similarity = torch.randn(1, 4, 8)
    result = align(100 * torch.randn(1, 4, 8) + 3, similarity, "standardize")
    torch.testing.assert_close(result.mean(-1), similarity.mean(-1))
    torch.testing.assert_close(result.std(-1), similarity.std(-1))


def test_eta_moves_each_trial_from_one_head_to_the_other():
    torch.manual_seed(3)
    linear, similarity = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    result = fuse(linear, similarity, torch.tensor([0.0, 1.0, 0.25]), "none")
    torch.testing.assert_close(result[0], similarity[0])
    torch.testing.assert_close(result[1], linear[1])
    torch.testing.assert_close(result[2], 0.25 * linear[2] + 0.75 * similarity[2])


@pytest.mark.parametrize("rule", RULES)
def test_one_class_and_constant_rows_stay_finite(rule):
    assert torch.isfinite(align(torch.ones(1, 2, 1), torch.ones(1, 2, 1), rule)).all()
    assert torch.isfinite(align(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), rule)).all()
