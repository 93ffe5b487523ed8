from __future__ import annotations

import math

import pytest
import torch

from tests.methods.slow import softmax
from ulfine_fast.related.preference.losses import mean_log_likelihood, preferred

ROWS = torch.tensor([[0.2, 1.0, 3.0], [0.1, 0.1, 2.0]])
REFERENCE = torch.tensor([[-0.1, -2.0, -40.0], [-1.0, -0.3, -90.0]])
MASK = torch.tensor([[1.0, 0.0, 1.0], [0.5, 1.0, 0.0]])


def weights(form, rows=ROWS, mask=None):
    """What the gradient of each row is multiplied with."""
    rows = rows.clone().requires_grad_(True)
    preferred(rows, REFERENCE, form, mask).sum().backward()
    return rows.grad


def test_the_preference_by_hand():
    result = preferred(ROWS, REFERENCE, "preference")
    for loss, ce, log_g in zip(result.flatten(), ROWS.flatten().tolist(), REFERENCE.flatten().tolist(), strict=True):
        assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(ce + log_g))), rel=1e-5, abs=1e-7)


def test_its_gradient_is_a_fraction_of_cross_entropys():
    p, g = torch.exp(-ROWS), torch.exp(REFERENCE)
    torch.testing.assert_close(weights("preference"), g / (g + p))


@pytest.mark.parametrize("mask", [None, MASK])
def test_the_controls_weigh_one_on_average_over_what_counts(mask):
    p, g = torch.exp(-ROWS), torch.exp(REFERENCE)
    counts = torch.ones(2, 3) if mask is None else mask
    for form, wanted in (("equal", g / (g + p)), ("weighted", g)):
        level = (wanted * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True)
        torch.testing.assert_close(weights(form, mask=mask), wanted / level)


def test_nothing_that_counts_trains_nothing():
    for form in ("preference", "equal", "weighted"):
        result = preferred(ROWS, REFERENCE, form, torch.zeros(2, 3)) * torch.zeros(2, 3)
        assert torch.equal(result, torch.zeros(2, 3)), form


def test_references_that_rule_everything_out_leave_finite_losses():
    for form in ("preference", "equal", "weighted"):
        assert torch.isfinite(preferred(ROWS, REFERENCE - 1e4, form)).all()


def test_the_references_log_likelihood_by_hand():
    torch.manual_seed(0)
    heads, features = torch.randn(4, 2, 3, 5), torch.randn(2, 6, 5)
    labels = torch.randint(3, (2, 6))
    result = mean_log_likelihood(heads.unbind(0), torch.tensor([1.0, 0.3]), features, labels)
    for t in range(2):
        for b in range(6):
            each = [softmax(((1.0, 0.3)[t] * heads[j, t] @ features[t, b]).tolist())[labels[t, b]] for j in range(4)]
            assert result[t, b].item() == pytest.approx(sum(map(math.log, each)) / 4, rel=1e-4)


def test_one_reference_for_all_trials():
    torch.manual_seed(0)
    head, features, labels = torch.randn(3, 5), torch.randn(2, 6, 5), torch.randint(3, (2, 6))
    own = mean_log_likelihood([head.repeat(2, 1, 1)], torch.ones(2), features, labels)
    assert torch.equal(mean_log_likelihood([head], torch.ones(2), features, labels), own)
