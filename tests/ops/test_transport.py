from __future__ import annotations

import math

import pytest
import torch

from ulfine_fast.ops import transport as module
from ulfine_fast.ops.transport import class_potentials, held, transport

T, N, S, K = 2, 7, 2, 3


def problem(seed=0):
    torch.manual_seed(seed)
    scores = 2 * torch.randn(T, N, S, K, dtype=torch.double)
    log_prior = torch.log_softmax(torch.randn(T, S, K, dtype=torch.double), -1)
    present = torch.ones(T, N, dtype=torch.bool)
    present[1, 5:] = False
    return scores, log_prior, present


def slow_transport(scores, prior, rounds):
    """Column and row scaling of one candidate's plan, entry by entry."""
    plan = [[math.exp(z) for z in row] for row in scores.tolist()]
    plan = [[p / sum(row) for p in row] for row in plan]
    for _ in range(rounds):
        totals = [sum(row[k] for row in plan) for k in range(len(prior))]
        plan = [[p * len(plan) * q / total for p, q, total in zip(row, prior, totals, strict=True)] for row in plan]
        plan = [[p / sum(row) for p in row] for row in plan]
    return torch.tensor(plan, dtype=torch.double)


@pytest.mark.parametrize("rounds", [0, 1, 10])
def test_the_plan_is_what_scaling_in_turn_gives(rounds):
    scores, log_prior, present = problem()
    plan = transport(scores, log_prior, present, rounds)
    for t in range(T):
        for s in range(S):
            wanted = slow_transport(scores[t, present[t], s], log_prior[t, s].exp().tolist(), rounds)
            torch.testing.assert_close(plan[t, present[t], s], wanted)


def test_rows_sum_to_one_and_columns_reach_the_prior():
    scores, log_prior, present = problem()
    plan = transport(scores, log_prior, present, 300)
    torch.testing.assert_close(plan.sum(-1), torch.ones(T, N, S, dtype=torch.double))
    for t in range(T):
        torch.testing.assert_close(plan[t, present[t]].mean(0), log_prior[t].exp(), rtol=1e-6, atol=1e-8)


def test_ten_rounds_are_near_enough_for_mild_scores():
    scores, log_prior, present = problem()
    plan = transport(0.3 * scores, log_prior, present)
    torch.testing.assert_close(plan[0].mean(0), log_prior[0].exp(), rtol=0, atol=1e-3)


def test_padding_has_no_weight():
    scores, log_prior, present = problem()
    loud = scores.clone()
    loud[1, 5:] = 1e4
    plan, same = transport(scores, log_prior, present), transport(loud, log_prior, present)
    torch.testing.assert_close(plan[1, :5], same[1, :5], rtol=0, atol=0)
    cut = transport(scores[1:, :5], log_prior[1:], present[1:, :5])
    torch.testing.assert_close(plan[1:, :5], cut)


def test_rows_without_preference_get_the_prior():
    _, log_prior, present = problem()
    plan = transport(torch.zeros(T, N, S, K, dtype=torch.double), log_prior, present)
    torch.testing.assert_close(plan, log_prior.exp().unsqueeze(1).expand_as(plan))


def test_a_prior_that_the_scores_already_have_changes_nothing():
    scores, _, present = problem()
    probabilities = torch.softmax(scores, -1)
    mean = torch.stack([probabilities[t, present[t]].mean(0) for t in range(T)])
    torch.testing.assert_close(transport(scores, mean.log(), present), probabilities)


def test_a_trial_alone_among_others_and_the_candidates_apart():
    scores, log_prior, present = problem()
    plan = transport(scores, log_prior, present)
    torch.testing.assert_close(transport(scores[:1], log_prior[:1], present[:1]), plan[:1])
    one = transport(scores[:, :, 1:], log_prior[:, 1:], present)
    torch.testing.assert_close(one, plan[:, :, 1:])


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_trial_without_rows_stays_finite(kind):
    scores, log_prior, present = problem()
    present[0] = False
    assert torch.isfinite(transport(scores.to(kind), log_prior.to(kind), present)).all()


def test_sharp_scores_stay_finite():
    scores, log_prior, present = problem()
    plan = transport(200 * scores.float(), log_prior.float(), present, 50)
    assert torch.isfinite(plan).all()
    torch.testing.assert_close(plan.sum(-1), torch.ones(T, N, S))


def in_parts(scores, present, size):
    """What :func:`class_potentials` reads, for scores (T, N, K)."""
    return lambda: [(scores[:, i : i + size], present[:, i : i + size]) for i in range(0, scores.shape[1], size)]


@pytest.mark.parametrize("size", [2, 100])
def test_potentials_of_rows_in_parts_make_the_same_plan(size):
    scores, log_prior, present = problem()
    potential = class_potentials(in_parts(scores[:, :, 0], present, size), log_prior[:, 0], 10)
    plan = torch.softmax(scores[:, :, 0] + potential.unsqueeze(1), -1)
    torch.testing.assert_close(plan, transport(scores, log_prior, present, 10)[:, :, 0])


def test_potentials_go_on_from_where_they_were():
    scores, log_prior, present = problem()
    parts = in_parts(scores[:, :, 0], present, 3)
    first = class_potentials(parts, log_prior[:, 0], 4)
    torch.testing.assert_close(
        class_potentials(parts, log_prior[:, 0], 6, first), class_potentials(parts, log_prior[:, 0], 10)
    )


def test_a_trial_without_rows_keeps_its_potentials():
    scores, log_prior, present = problem()
    present[0] = False
    start = torch.randn(T, K, dtype=torch.double)
    potential = class_potentials(in_parts(scores[:, :, 0], present, 3), log_prior[:, 0], 5, start)
    assert torch.equal(potential[0], start[0])
    assert torch.isfinite(potential).all()
    assert not torch.equal(potential[1], start[1])


@pytest.mark.parametrize(("most", "made"), [(T * N * K, 1), (T * N * K - 1, 3)])
def test_parts_are_made_once_where_they_are_few(monkeypatch, most, made):
    scores, _, present = problem()
    calls = []

    def parts():
        calls.append(1)
        yield from in_parts(scores[:, :, 0], present, 3)()

    monkeypatch.setattr(module, "HELD_VALUES", most)
    again = held(parts)
    for _ in range(2):
        torch.testing.assert_close(torch.cat([part for part, _ in again()], 1), scores[:, :, 0])
    assert len(calls) == made
