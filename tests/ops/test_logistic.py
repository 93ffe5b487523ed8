"""Batched logistic regressions against scikit-learn's, and against their own definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from ulfine_fast.ops import logistic
from ulfine_fast.ops.logistic import Stop, fit_affine, fit_cosine
from ulfine_fast.ops.prototypes import normalize

N, D, K = 150, 12, 4
FLOAT, DOUBLE = torch.float32, torch.float64


def world(dtype=DOUBLE, classes=K, noise=1.0, seed=0):
    """Unit rows around class means, beside a common direction as CLIP's have, and their long-tailed labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((N // 2 ** (k + 1) + 5,), k) for k in range(classes)])[:N]
    means = torch.randn(classes, D, generator=random, dtype=DOUBLE) + 3
    rows = normalize(means[labels] + noise * torch.randn(len(labels), D, generator=random, dtype=DOUBLE))
    return rows.to(dtype), labels


def objective(rows, labels, weights, ridge, fit, t):
    """The objective of trial t as its docstring defines it, in float64."""
    logits = rows.double() @ fit.weight[t].double().T + fit.bias[t].double()
    losses = F.cross_entropy(logits, labels, reduction="none")
    return float((weights[t].double() * losses).sum() + 0.5 * ridge[t].double() * fit.weight[t].double().square().sum())


def sklearn_loss(rows, labels, weights, penalty):
    """scikit-learn's minimum of the same objective."""
    model = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=20_000)
    model.fit(rows.double().numpy(), labels.numpy(), sample_weight=weights.double().numpy())
    logits = torch.from_numpy(model.decision_function(rows.double().numpy()))
    if logits.dim() == 1:
        losses = F.softplus(torch.where(labels == 1, -logits, logits))
    else:
        losses = F.cross_entropy(logits, labels, reduction="none")
    return float((weights.double() * losses).sum() + 0.5 * penalty * np.square(model.coef_).sum()), model


@pytest.mark.parametrize(("dtype", "tolerance", "close"), [(FLOAT, 1e-7, 1e-4), (DOUBLE, 1e-11, 1e-7)])
def test_affine_heads_have_the_loss_of_scikit_learn(dtype, tolerance, close):
    rows, labels = world(dtype)
    ridge = torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e3], dtype=dtype)
    balanced = (1 / labels.bincount().to(dtype))[labels] * len(labels) / K
    weights = torch.stack([torch.ones_like(balanced)] * 3 + [balanced] * 2)
    fit = fit_affine(rows, labels, weights, ridge, tolerance=tolerance)
    assert (fit.stop == Stop.CONVERGED).all()
    for t in range(len(ridge)):
        wanted, model = sklearn_loss(rows, labels, weights[t], float(ridge[t]))
        assert objective(rows, labels, weights, ridge, fit, t) == pytest.approx(wanted, rel=close)
        assert float(fit.objective[t]) == pytest.approx(wanted, rel=close)
        if dtype is DOUBLE:
            np.testing.assert_allclose(fit.weight[t].numpy(), model.coef_, rtol=0.02, atol=2e-3)


def test_two_classes_have_the_difference_of_scikit_learns_vector():
    rows, labels = world(classes=2)
    weights = torch.ones(1, len(rows), dtype=DOUBLE)
    fit = fit_affine(rows, labels, weights, torch.tensor([0.2], dtype=DOUBLE), tolerance=1e-12)
    wanted, model = sklearn_loss(rows, labels, weights[0], 0.1)
    np.testing.assert_allclose((fit.weight[0, 1] - fit.weight[0, 0]).numpy(), model.coef_[0], rtol=1e-3, atol=1e-4)
    assert float(fit.objective[0]) == pytest.approx(wanted, rel=1e-7)


def test_the_default_axes_change_nothing_but_the_number_of_steps():
    rows, labels = world()
    weights = torch.ones(1, len(rows), dtype=DOUBLE)
    ridge = torch.tensor([0.1], dtype=DOUBLE)
    plain = logistic.Axes(torch.zeros(D, dtype=DOUBLE), torch.eye(D, dtype=DOUBLE))
    one, other = (fit_affine(rows, labels, weights, ridge, axes=axes, tolerance=1e-9) for axes in (None, plain))
    torch.testing.assert_close(one.weight, other.weight, rtol=0.01, atol=0.01)
    assert one.steps < other.steps


def test_a_split_is_weights_of_zero():
    rows, labels = world()
    weights = (torch.rand(3, len(rows), generator=torch.Generator().manual_seed(1)) < 0.6).double()
    ridge = torch.tensor([0.3, 1.0, 3.0], dtype=DOUBLE)
    fit = fit_affine(rows, labels, weights, ridge, tolerance=1e-11)
    for t in range(3):
        kept = weights[t] > 0
        alone = fit_affine(rows[kept], labels[kept], weights[t : t + 1, kept], ridge[t : t + 1], tolerance=1e-11)
        torch.testing.assert_close(fit.weight[t], alone.weight[0], rtol=1e-3, atol=1e-4)


def test_offsets_are_in_training_alone():
    rows, labels = world()
    weights = torch.ones(2, len(rows), dtype=DOUBLE)
    prior = torch.log(labels.bincount() / len(labels)).double()
    offsets = torch.stack([torch.zeros_like(prior), 1.5 * prior])
    ridge = torch.full((2,), 1e9, dtype=DOUBLE)
    fit = fit_affine(rows, labels, weights, ridge, offsets=offsets, tolerance=1e-13)
    # without weights the bias and the offset together are the class frequencies
    torch.testing.assert_close(torch.log_softmax(fit.bias + offsets, 1), prior.expand(2, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cosine", [False, True])
def test_gradients_are_those_of_finite_differences(cosine):
    torch.manual_seed(3)
    rows, labels = world()
    trials = 2
    problem = logistic._Problem(
        rows=rows,
        columns=rows.T,
        labels=labels,
        weights=torch.rand(trials, len(rows), dtype=DOUBLE),
        offsets=torch.randn(trials, K, dtype=DOUBLE),
        penalty=torch.tensor([0.0, 0.7], dtype=DOUBLE).unsqueeze(1).expand(-1, D),
        scale=torch.tensor([3.0, 9.0], dtype=DOUBLE) if cosine else None,
        anchors=normalize(torch.randn(trials, K, D, dtype=DOUBLE)) if cosine else None,
    )
    index, parameters = torch.arange(trials), torch.randn(trials, K, D, dtype=DOUBLE)
    _, gradient = problem.evaluate(index, parameters, problem.products(parameters))
    direction = torch.randn_like(parameters)
    sides = [parameters + sign * 1e-5 * direction for sign in (1, -1)]
    above, below = (problem.evaluate(index, side, problem.products(side))[0] for side in sides)
    torch.testing.assert_close((above - below) / 2e-5, (gradient * direction).sum((1, 2)), rtol=1e-7, atol=1e-7)


def test_blocks_of_trials_change_nothing(monkeypatch):
    rows, labels = world()
    weights = torch.rand(5, len(rows), dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    ridge = torch.logspace(-2, 1, 5, dtype=DOUBLE)
    whole = fit_affine(rows, labels, weights, ridge)
    monkeypatch.setattr(logistic, "_VALUES", 2 * K * len(rows))
    torch.testing.assert_close(fit_affine(rows, labels, weights, ridge).weight, whole.weight)


@pytest.mark.parametrize("cosine", [False, True])
def test_trials_stop_by_themselves_and_do_not_see_their_neighbours(cosine):
    rows, labels = world()
    start = normalize(torch.randn(6, K, D, dtype=DOUBLE, generator=torch.Generator().manual_seed(5)))
    weights = torch.rand(6, len(rows), dtype=DOUBLE, generator=torch.Generator().manual_seed(6))
    ridge = torch.logspace(-3, 4, 6, dtype=DOUBLE)
    axes = logistic.principal_axes(rows)

    def fit(part):
        common = (rows, labels, weights[part], ridge[part])
        if cosine:
            scale = torch.full((len(ridge[part]),), 8.0, dtype=DOUBLE)
            return fit_cosine(*common, start[part], scale, axes=axes)
        return fit_affine(*common, axes=axes)

    together = fit(slice(0, 6))
    assert len(together.steps.unique()) >= 4
    for t in range(6):
        alone = fit(slice(t, t + 1))
        assert alone.steps.item() == together.steps[t]
        torch.testing.assert_close(alone.weight[0], together.weight[t], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(alone.bias[0], together.bias[t], rtol=1e-6, atol=1e-8)


PATH = torch.tensor([1e3, 1.0, 0.3, 0.1, 0.07, 0.01, 1e-3, 0.0], dtype=DOUBLE)


def test_trials_of_one_path_do_not_see_their_neighbours():
    rows, labels = world()
    weights = torch.ones(len(PATH), len(rows), dtype=DOUBLE)
    together = fit_affine(rows, labels, weights, PATH)
    for t in range(len(PATH)):
        alone = fit_affine(rows, labels, weights[:1], PATH[t : t + 1])
        assert alone.steps.item() == together.steps[t]
        torch.testing.assert_close(alone.weight[0], together.weight[t], rtol=1e-6, atol=1e-8)


def test_a_path_ends_in_the_same_minimum_in_fewer_steps(monkeypatch):
    rows, labels = world()
    ridge = PATH[PATH > 0]
    weights = torch.ones(len(ridge), len(rows), dtype=DOUBLE)
    along = fit_affine(rows, labels, weights, ridge, tolerance=1e-10)
    # of two stages, the weakest penalties start far from the last solution
    monkeypatch.setattr(logistic, "_MOST_STAGES", 2)
    short = fit_affine(rows, labels, weights, ridge, tolerance=1e-10)
    monkeypatch.setattr(logistic, "_FIRST", 1e-12)
    apart = fit_affine(rows, labels, weights, ridge, tolerance=1e-10)
    torch.testing.assert_close(along.objective, apart.objective, rtol=1e-7, atol=0)
    torch.testing.assert_close(short.objective, apart.objective, rtol=1e-7, atol=0)
    assert along.steps[-1] < 0.5 * apart.steps[-1]
    assert along.steps[-1] < short.steps[-1]


def test_paths_have_equal_weights_and_offsets():
    weights = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    offsets = torch.tensor([[0.0, -torch.inf], [0.0, 0.0], [0.0, -torch.inf], [0.0, -1.0]])
    path = logistic.paths(weights, offsets).tolist()
    assert path[0] == path[2]
    assert len(set(path)) == 3


def test_rows_of_one_class_are_fitted():
    rows, _ = world()
    labels = torch.zeros(len(rows), dtype=torch.int64)
    weights = torch.ones(2, len(rows), dtype=DOUBLE)
    fit = fit_affine(rows, labels, weights, torch.tensor([1.0, 1e-3], dtype=DOUBLE), classes=2)
    assert (fit.stop == Stop.CONVERGED).all()
    assert ((rows @ fit.weight[0].T + fit.bias[0]).argmax(1) == 0).all()


def test_a_class_without_rows_is_never_predicted_and_changes_nothing():
    rows, labels = world(classes=3)
    weights = torch.ones(1, len(rows), dtype=DOUBLE)
    ridge = torch.tensor([0.1], dtype=DOUBLE)
    with_it = fit_affine(rows, labels, weights, ridge, classes=4)
    without = fit_affine(rows, labels, weights, ridge)
    torch.testing.assert_close(with_it.weight[:, :3], without.weight)
    assert (with_it.weight[:, 3] == 0).all()
    logits = rows @ with_it.weight[0].T + with_it.bias[0]
    assert (logits.argmax(1) != 3).all()
    assert 0 < torch.softmax(logits, 1)[:, 3].mean() < 1e-7


def test_separable_rows_without_a_penalty_have_no_minimum():
    # ten rows of twelve dimensions can always be separated
    rows, labels = world()
    few = torch.arange(0, len(rows), len(rows) // 10)[:10]
    weights = torch.zeros(3, len(rows), dtype=DOUBLE)
    weights[:2, few] = 1
    weights[2] = 1
    fit = fit_affine(rows, labels, weights, torch.tensor([0.0, 1e-3, 1e-3], dtype=DOUBLE))
    assert fit.stop.tolist() == [Stop.SEPARABLE, Stop.CONVERGED, Stop.CONVERGED]
    right = (rows[few] @ fit.weight[0].T + fit.bias[0]).argmax(1) == labels[few]
    assert right.all()
    assert torch.isfinite(fit.weight).all()


def test_rows_that_are_not_separable_have_a_minimum_without_a_penalty():
    rows, labels = world(noise=4.0)
    weights = torch.ones(1, len(rows), dtype=DOUBLE)
    fit = fit_affine(rows, labels, weights, torch.zeros(1, dtype=DOUBLE), tolerance=1e-9)
    assert fit.stop.item() == Stop.CONVERGED
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=20_000).fit(rows.numpy(), labels.numpy())
    logits = torch.from_numpy(model.decision_function(rows.numpy()))
    assert float(fit.objective[0]) == pytest.approx(float(F.cross_entropy(logits, labels, reduction="sum")), rel=1e-4)


def test_the_most_steps_are_a_reason_to_stop():
    rows, labels = world()
    weights = torch.ones(2, len(rows), dtype=DOUBLE)
    fit = fit_affine(rows, labels, weights, torch.tensor([1e-4, 1e9], dtype=DOUBLE), most_steps=12)
    assert fit.stop.tolist() == [Stop.STEPS, Stop.CONVERGED]
    assert fit.steps[0] == 12
    assert fit.steps[1] < 12


def test_cosine_heads_are_at_a_minimum_between_their_start_and_the_labels():
    rows, labels = world()
    start = normalize(torch.randn(1, K, D, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))).repeat(3, 1, 1)
    weights = torch.ones(3, len(rows), dtype=DOUBLE)
    ridge, scale = torch.tensor([0.1, 10.0, 1e7], dtype=DOUBLE), torch.full((3,), 8.0, dtype=DOUBLE)
    fit = fit_cosine(rows, labels, weights, ridge, start, scale, tolerance=1e-12)

    def value(vectors):
        """The objective of its docstring."""
        unit = normalize(vectors)
        logits = scale.view(-1, 1, 1) * rows @ unit.transpose(1, 2)
        losses = torch.stack([F.cross_entropy(one, labels, reduction="sum") for one in logits])
        return losses + ridge * (1 - (unit * start).sum(-1)).sum(-1)

    vectors = fit.weight.clone().requires_grad_(True)
    values = value(vectors)
    [gradient] = torch.autograd.grad(values.sum(), vectors)
    torch.testing.assert_close(values.detach(), fit.objective)
    assert (gradient.norm(dim=(1, 2)) < 1e-3 * values.detach().clamp(min=1)).all()
    assert (values[:2] < 0.8 * value(start)[:2]).all()
    cosines = (fit.weight * start).sum(-1).mean(-1)
    assert cosines[0] < cosines[1] < cosines[2]
    assert cosines[2] == pytest.approx(1.0, abs=1e-6)
