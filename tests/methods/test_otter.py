from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from tests.methods.conftest import pool_of, trials_of
from tests.methods.pools import K, clustered, plan_of, rows_of
from ulfine_fast.config import FitConfig
from ulfine_fast.methods.otter import shifted_prior
from ulfine_fast.methods.registry import method_of
from ulfine_fast.ops.prototypes import normalize


def zero_shot(trials, pool):
    return torch.log_softmax(8.0 * pool.unlabeled @ trials.prototypes.transpose(1, 2), -1)


def test_near_no_entropy_the_plan_is_the_cheapest_assignment():
    torch.manual_seed(0)
    features = normalize(torch.randn(44, 5))
    config = FitConfig(method="otter", scale=8.0, label_prior="labeled", transport_entropy=0.02)
    # labelled frequencies 1/2, 1/4, 1/4: of 40 images, 20, 10 and 10
    trials = trials_of(config, normalize(torch.randn(1, K, 5)), torch.log(torch.tensor([[0.5, 0.25, 0.25]])))
    pool = pool_of(features, [[0, 1, 2, 3]], [[0, 0, 1, 2]], [list(range(4, 44))], [[True] * 40])
    method = method_of(config)
    state = method.start(trials)
    method.refresh(trials, state, pool, 0)
    plan = plan_of(trials, method, state, pool)[0]

    columns = [0] * 20 + [1] * 10 + [2] * 10
    cost = -zero_shot(trials, pool)[0].numpy()
    _, chosen = linear_sum_assignment(cost[:, columns])
    wanted = np.array(columns)[chosen]
    cheapest = cost[np.arange(40), wanted].mean()
    assert (plan.argmax(-1).numpy() == wanted).mean() >= 0.95  # the last scalings leave an image or two undecided
    assert float((plan * torch.from_numpy(cost)).sum(-1).mean()) == pytest.approx(cheapest, rel=0.02)
    np.testing.assert_allclose(plan.mean(0), [0.5, 0.25, 0.25], atol=0.01)
    # the zero-shot classifier has other frequencies
    assert (np.bincount(cost.argmin(1), minlength=K) != [20, 10, 10]).any()


def test_with_its_own_prior_the_plan_is_zero_shot():
    trials, method, state, pool = clustered("otter", label_prior="own", transport_entropy=1.0)
    plan = plan_of(trials, method, state, pool)
    for t in range(2):
        known = pool.present[t]
        torch.testing.assert_close(plan[t, known], zero_shot(trials, pool)[t, known].exp(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("label_prior", "wanted"), [("uniform", [1, 1, 1]), ("labeled", [2, 1, 1])])
def test_classes_get_the_prior_that_was_asked_for(label_prior, wanted):
    trials, method, state, pool = clustered("otter", label_prior=label_prior, transport_entropy=0.5)
    mean = plan_of(trials, method, state, pool)[0].mean(0)
    torch.testing.assert_close(mean, torch.tensor(wanted) / sum(wanted), rtol=0, atol=5e-3)


def test_new_images_are_judged_without_the_prior():
    trials, method, state, pool = clustered("otter", label_prior="labeled", transport_entropy=1.0)
    difference = method.pseudo_logits(trials, state.tensors, pool.unlabeled) - method.logits(
        trials, state.tensors, pool.unlabeled
    )
    torch.testing.assert_close(torch.softmax(difference[0, 0], -1), torch.tensor([0.5, 0.25, 0.25]))


def test_known_confusions_give_the_true_prior():
    confusion = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.2, 0.3, 0.5]], dtype=torch.double)
    truth = torch.tensor([[0.1, 0.3, 0.6]], dtype=torch.double)
    start = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.double)
    observed = truth @ confusion
    exact = shifted_prior(confusion.unsqueeze(0), observed, start, torch.tensor([1e-9]).double())
    torch.testing.assert_close(exact, truth, rtol=0, atol=1e-5)
    held = shifted_prior(confusion.unsqueeze(0), observed, start, torch.tensor([1e6]).double())
    torch.testing.assert_close(held, start, rtol=0, atol=1e-5)
    # the shrunk one is where the gradient of the objective is zero
    shrunk = shifted_prior(confusion.unsqueeze(0), observed, start, torch.tensor([0.1]).double())[0]
    gradient = confusion @ (confusion.T @ shrunk - observed[0]) + 0.1 * (shrunk - start[0])
    torch.testing.assert_close(gradient, gradient.mean().expand(3), rtol=0, atol=2e-3)


def test_the_estimate_reads_the_labelled_images():
    trials, _, state, pool = clustered("otter", prior_shrinkage=1e-3)
    for t in range(2):
        labeled, labels, unlabeled = rows_of(pool, t)
        texts = trials.prototypes[t].double()
        probabilities = torch.softmax(8.0 * labeled @ texts.T, -1)
        confusion = torch.eye(K).double()
        for k in set(labels):
            confusion[k] = torch.stack([probabilities[i] for i, label in enumerate(labels) if label == k]).mean(0)
        start = torch.tensor([[0.5, 0.25, 0.25], [1 / 9, 4 / 9, 4 / 9]][t]).double()
        observed = torch.softmax(8.0 * unlabeled @ texts.T, -1).mean(0)
        wanted = start + torch.linalg.solve(
            confusion @ confusion.T + 1e-3 * torch.eye(K), confusion @ (observed - confusion.T @ start)
        )
        wanted = wanted.clamp(min=0.01 / K)
        torch.testing.assert_close(
            state.memory["log_target"][t].exp().double(), wanted / wanted.sum(), rtol=1e-3, atol=1e-4
        )


def test_without_unlabelled_images_it_is_zero_shot():
    trials, method, state, pool = clustered("otter", present=[[False] * 10] * 2)
    torch.testing.assert_close(method.logits(trials, state.tensors, pool.unlabeled), zero_shot(trials, pool))
