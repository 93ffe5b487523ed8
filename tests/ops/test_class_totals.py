from __future__ import annotations

import pytest
import torch

from ulfine_fast.ops import clustering
from ulfine_fast.ops.class_totals import class_totals, label_weights
from ulfine_fast.ops.clustering import RowChunks

T, N, D, K = 2, 9, 4, 3


def problem():
    torch.manual_seed(2)
    rows = torch.randn(T, N, D, dtype=torch.double)
    weights = torch.rand(T, N, K, dtype=torch.double)
    present = torch.ones(T, N, dtype=torch.bool)
    present[1, 6:] = False
    return rows, weights, present


def totals_of(rows, weights, present):
    like = rows.new_zeros(T, K, D)
    return class_totals(RowChunks.of(rows, present), lambda position, _: weights[:, position], like)


@pytest.mark.parametrize("together", [2, 100])
def test_totals_are_sums_row_by_row(monkeypatch, together):
    monkeypatch.setattr(clustering, "_CHUNK_VALUES", together * T * D)
    monkeypatch.setattr(clustering, "_LEAST_ROWS", 1)
    rows, weights, present = problem()
    result = totals_of(rows, weights, present)
    for t in range(T):
        for k in range(K):
            members = [(weights[t, i, k], rows[t, i]) for i in range(N) if present[t, i]]
            torch.testing.assert_close(result.mass[t, k], sum(w for w, _ in members))
            torch.testing.assert_close(result.sums[t, k], sum(w * x for w, x in members))
            torch.testing.assert_close(result.squares[t, k], sum(w * x * x for w, x in members))


def test_totals_add_up_and_scale_by_trial_and_class():
    rows, weights, present = problem()
    factor = torch.rand(T, K, dtype=torch.double)
    combined = totals_of(rows, weights, present) + totals_of(rows, weights, present) * factor
    wanted = totals_of(rows, weights * (1 + factor.unsqueeze(1)), present)
    for name in ("mass", "sums", "squares"):
        torch.testing.assert_close(getattr(combined, name), getattr(wanted, name))


def test_a_label_is_a_weight_of_one_and_padding_has_none():
    rows, _, present = problem()
    labels = torch.tensor([[0, 1, 2, 2, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 2, -1, -1, -1]])
    like = rows.new_zeros(T, K, D)
    result = class_totals(RowChunks.of(rows, present), label_weights(labels, K), like)
    assert result.mass.tolist() == [[6, 1, 2], [2, 3, 1]]
    torch.testing.assert_close(result.sums[0, 2], rows[0, 2] + rows[0, 3])
