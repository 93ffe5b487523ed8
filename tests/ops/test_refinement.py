from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from ulfine_fast.ops.refinement import prune, refine


def case(seed, trials=2, rows=12, classes=3):
    torch.manual_seed(seed)
    probabilities = torch.softmax(2 * torch.randn(trials, rows, classes), -1).double()
    totals = rows * torch.softmax(torch.randn(trials, classes), -1).double()
    return probabilities, torch.ones(trials, rows, dtype=torch.bool), totals


@pytest.mark.parametrize("seed", range(5))
def test_rows_and_columns_sum_as_they_must(seed):
    probabilities, present, totals = case(seed, rows=40, classes=5)
    result = refine(probabilities, present, totals)
    torch.testing.assert_close(result.sum(-1), torch.ones(2, 40).double())
    torch.testing.assert_close(result.sum(1), totals, rtol=1e-4, atol=1e-4)


def test_it_is_the_minimum_of_the_published_problem():
    probabilities, present, totals = case(1, trials=1, rows=5)
    p, c = probabilities[0].numpy(), totals[0].numpy() * 1.0
    weight = 1 / -(p * np.log(p)).sum(1)

    def value(flat):
        x = flat.reshape(p.shape)
        return (weight[:, None] * x * np.log(np.maximum(x, 1e-300) / p)).sum()

    rows = [{"type": "eq", "fun": lambda x, n=n: x.reshape(p.shape)[n].sum() - 1} for n in range(5)]
    # the last column follows from the others
    columns = [{"type": "eq", "fun": lambda x, k=k: x.reshape(p.shape)[:, k].sum() - c[k]} for k in range(2)]
    start = np.tile(c / c.sum(), (5, 1)).ravel()
    best = minimize(
        value, start, bounds=[(1e-9, 1)] * 15, constraints=rows + columns, method="SLSQP", options={"maxiter": 500}
    )
    assert best.success
    np.testing.assert_allclose(refine(probabilities, present, totals)[0].numpy(), best.x.reshape(p.shape), atol=2e-3)


def test_probabilities_that_have_the_totals_stay():
    probabilities, present, _ = case(2)
    result = refine(probabilities, present, probabilities.sum(1))
    torch.testing.assert_close(result, probabilities)


def test_unsure_rows_move_more():
    probabilities = torch.tensor([[[0.99, 0.01], [0.6, 0.4], [0.99, 0.01]]]).double()
    result = refine(probabilities, torch.ones(1, 3, dtype=torch.bool), torch.tensor([[2.0, 1.0]]).double())
    moved = (result - probabilities).abs().amax(-1)[0]
    assert moved[1] > 5 * moved[0]


def test_padding_and_neighbours_change_nothing():
    probabilities, present, totals = case(3)
    padded = torch.cat([probabilities, torch.softmax(torch.randn(2, 4, 3), -1).double()], 1)
    there = torch.cat([present, torch.zeros(2, 4, dtype=torch.bool)], 1)
    keep = torch.tensor([1.0, 2.0]).double()
    for function in (refine, lambda p, there, c: prune(p, there, c, keep)):
        result = function(padded, there, totals)
        torch.testing.assert_close(result[:, :12], function(probabilities, present, totals))
    torch.testing.assert_close(refine(padded[:1], there[:1], totals[:1])[0], refine(padded, there, totals)[0])
    assert refine(padded, there, totals)[:, 12:].abs().max() == 0


def test_pruning_by_hand():
    probabilities = torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]])
    result = prune(probabilities, torch.ones(1, 4, dtype=torch.bool), torch.tensor([[2.0, 2.0]]), torch.tensor([1.0]))
    # class 0 keeps its rows 0 and 3, class 1 its rows 2 and 1; the rest is all but nothing
    torch.testing.assert_close(result.argmax(-1), torch.tensor([[0, 1, 1, 0]]))
    assert result.amax(-1).min() > 0.999
    wide = prune(probabilities, torch.ones(1, 4, dtype=torch.bool), torch.tensor([[2.4, 1.6]]), torch.tensor([9.0]))
    torch.testing.assert_close(wide, probabilities, atol=1e-4, rtol=1e-4)
