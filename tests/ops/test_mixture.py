from __future__ import annotations

import numpy as np
import pytest
import torch

from ulfine_fast.ops.clustering import cosines
from ulfine_fast.ops.mixture import (
    Metric,
    Scatter,
    inverse_root,
    leading_directions,
    products,
    sums,
    view_scatter,
    whitening,
)

T, N, S, K, D = 2, 40, 2, 3, 5


def rows(seed=0, count=N):
    """Rows in double precision whose scatter is far from round, and of full rank where there are enough."""
    torch.manual_seed(seed)
    mixing = 3 * torch.eye(D, dtype=torch.double) + torch.randn(T, D, D, dtype=torch.double)
    return torch.randn(T, count, D, dtype=torch.double) @ mixing + 3.0


def all_present(count=N):
    return torch.ones(T, count, dtype=torch.bool)


def values(number):
    return torch.full((T,), number, dtype=torch.double)


def whitened_by(result, present, nuisance, shrinkage, weight):
    """The whitening of rows in memory."""
    return whitening(Scatter.of([(result, present)]), nuisance, shrinkage, weight)


def memberships():
    torch.manual_seed(1)
    return torch.softmax(2 * torch.randn(T, N, S, K, dtype=torch.double), -1)


def clustered():
    """Whitened rows of clear classes, their soft memberships, and the metric inside the classes."""
    soft = memberships()
    # rows drift with their first candidate's class, so that the scatter between classes is worth removing
    lifted = rows() + 4 * soft[:, :, 0] @ torch.randn(T, K, D, dtype=torch.double)
    white = whitened_by(lifted, all_present(), None, values(0.0), values(0.0))(lifted)
    metric = Metric.within(sums(soft, white), soft.sum(1), values(float(N)))
    return white, soft, metric


def explicit(metric, t, s):
    """The metric of one candidate as a matrix (D, D)."""
    factors = metric.factors[t, s].numpy()
    return np.eye(D) + factors.T @ factors


def slow_within(white, soft):
    """Scatter of rows (n, D) around the means of classes they belong to by halves (n, K), pair by pair."""
    scatter = np.zeros((D, D))
    for k in range(K):
        mean = sum(w * x for w, x in zip(soft[:, k], white, strict=True)) / soft[:, k].sum()
        for w, x in zip(soft[:, k], white, strict=True):
            scatter += w * np.outer(x - mean, x - mean) / len(white)
    return scatter


def test_products_and_sums_are_loops_over_rows_and_classes():
    result, vectors = rows(), torch.randn(T, S, K, D, dtype=torch.double)
    inner, totals, soft = products(result, vectors), sums(memberships(), result), memberships()
    for t in range(T):
        for s in range(S):
            for k in range(K):
                wanted = torch.stack([x @ vectors[t, s, k] for x in result[t]])
                torch.testing.assert_close(inner[t, :, s, k], wanted)
                total = sum(soft[t, i, s, k] * result[t, i] for i in range(N))
                torch.testing.assert_close(totals[t, s, k], total)


@pytest.mark.parametrize("width", [1, 7, N])
def test_scatter_is_the_covariance_whatever_the_parts(width):
    result, present = rows(), all_present()
    present[1, 30:] = False
    scatter = Scatter.of(zip(result.split(width, 1), present.split(width, 1), strict=True))
    for t in range(T):
        kept = result[t, present[t]].numpy()
        assert scatter.count[t] == len(kept)
        np.testing.assert_allclose(scatter.mean[t, 0].numpy(), kept.mean(0))
        np.testing.assert_allclose(scatter.covariance[t].numpy(), np.cov(kept.T, bias=True), atol=1e-12)


def test_scatter_far_from_the_origin_keeps_its_digits():
    result = rows().float()
    far = Scatter.of([(result + 1000.0, all_present())])
    torch.testing.assert_close(far.covariance, Scatter.of([(result, all_present())]).covariance, rtol=0.01, atol=0.02)


@pytest.mark.parametrize("padded", [False, True])
def test_whitening_gives_unit_scatter(padded):
    result, present = rows(), all_present()
    if padded:
        present[1, 30:] = False
        result[1, 30:] = 1e3
    white = whitened_by(result, present, None, values(0.0), values(0.0))(result)
    for t in range(T):
        kept = white[t, present[t]].numpy()
        np.testing.assert_allclose(kept.mean(0), 0, atol=1e-9)
        # the floor under the shrinkage takes a little
        np.testing.assert_allclose(kept.T @ kept / len(kept), np.eye(D), atol=0.01)
        assert np.trace(kept.T @ kept / len(kept)) < D


@pytest.mark.parametrize(("shrink", "weight"), [(0.0, 0.0), (0.3, 0.0), (0.1, 2.0)])
def test_the_map_is_a_root_of_the_inverse_scatter(shrink, weight):
    result, nuisance = rows(), torch.eye(D, dtype=torch.double).repeat(T, 1, 1) * torch.arange(1, D + 1)
    space = whitened_by(result, all_present(), nuisance, values(shrink), values(weight))
    for t in range(T):
        scatter = np.cov(result[t].numpy().T, bias=True)
        trace = np.trace(scatter)
        whole = scatter + max(shrink, 1e-4) * trace / D * np.eye(D)
        whole += weight * trace * nuisance[t].numpy() / np.trace(nuisance[t].numpy())
        root = space.map[t].numpy()
        np.testing.assert_allclose(root @ root.T, np.linalg.inv(whole), rtol=1e-5, atol=1e-8)


def test_much_shrinkage_only_scales():
    result = rows()
    white = whitened_by(result, all_present(), None, values(1e9), values(0.0))(result)
    centred = result - result.mean(1, keepdim=True)
    ratio = white.norm(dim=-1) / centred.norm(dim=-1)
    for t in range(T):
        torch.testing.assert_close(ratio[t], ratio[t, 0].expand(N), rtol=1e-6, atol=0)
    torch.testing.assert_close(white, centred * ratio.unsqueeze(-1), rtol=1e-5, atol=1e-9)


def test_directions_that_views_change_count_less():
    result = rows()
    moved = torch.zeros(T, D, D, dtype=torch.double)
    moved[:, 0, 0] = 1.0
    before, after = (whitened_by(result, all_present(), moved, values(0.0), values(w)) for w in (0.0, 100.0))
    along = torch.zeros(T, 1, D, dtype=torch.double)
    along[..., 0] = 1.0
    assert ((along @ after.map).norm(dim=-1) < 0.2 * (along @ before.map).norm(dim=-1)).all()


def test_fewer_rows_than_dimensions_have_a_whitening():
    result = rows(count=3).float()
    space = whitened_by(result, all_present(3), None, values(0.0).float(), values(0.0).float())
    assert torch.isfinite(space(result)).all()
    assert space(result).norm(dim=-1).max() < 3


def test_view_scatter_is_a_loop_over_images_and_views():
    torch.manual_seed(2)
    views, present = torch.randn(T, 6, 3, D, dtype=torch.double), all_present(6)
    present[1, 4:] = False
    result = view_scatter([(views[:, :2], present[:, :2]), (views[:, 2:], present[:, 2:])])
    for t in range(T):
        wanted, images = np.zeros((D, D)), [i for i in range(6) if present[t, i]]
        for i in images:
            mean = views[t, i].numpy().mean(0)
            for view in views[t, i].numpy():
                wanted += np.outer(view - mean, view - mean) / (3 * len(images))
        np.testing.assert_allclose(result[t].numpy(), wanted, atol=1e-12)


def test_view_scatter_of_no_rows_and_of_one_view_is_zero():
    views = torch.randn(T, 6, 3, D)
    assert (view_scatter([(views, torch.zeros(T, 6, dtype=torch.bool))]) == 0).all()
    assert view_scatter([(views[:, :, :1], all_present(6))]).abs().max() == 0


def test_the_metric_is_the_inverse_of_the_scatter_inside_classes():
    white, soft, metric = clustered()
    for t in range(T):
        whole = white[t].numpy().T @ white[t].numpy() / N
        for s in range(S):
            # what shrinkage put into the whole scatter lies inside the classes too
            within = slow_within(white[t].numpy(), soft[t, :, s].numpy()) + np.eye(D) - whole
            # a thousandth of the scatter between classes is kept against rounding
            np.testing.assert_allclose(explicit(metric, t, s), np.linalg.inv(within), rtol=0.02, atol=0.02)


def test_classes_that_hold_all_the_scatter_leave_a_finite_metric():
    corners = torch.eye(K).repeat(1, 4, 1)  # rows are their class
    flat = torch.ones(1, 12, dtype=torch.bool)
    white = whitened_by(corners, flat, None, torch.zeros(1), torch.zeros(1))(corners)
    hard = corners.unsqueeze(2)
    metric = Metric.within(sums(hard, white), hard.sum(1), torch.tensor([12.0]))
    assert torch.isfinite(metric.factors).all()
    own = cosines(white, metric.unit(sums(hard, white)), metric)
    torch.testing.assert_close(own[0, :, 0].argmax(-1), corners[0].argmax(-1))


def test_a_class_without_rows_changes_nothing():
    white, soft, _ = clustered()
    soft[..., 0] = 0
    metric = Metric.within(sums(soft, white), soft.sum(1), values(float(N)))
    without = Metric.within(sums(soft, white)[:, :, 1:], soft.sum(1)[..., 1:], values(float(N)))
    for t in range(T):
        for s in range(S):
            np.testing.assert_allclose(explicit(metric, t, s), explicit(without, t, s), atol=1e-9)


def test_more_classes_than_dimensions_have_the_same_metric():
    torch.manual_seed(3)
    white, soft = rows(), torch.softmax(2 * torch.randn(T, N, S, 3 * D, dtype=torch.double), -1)
    white = whitened_by(white, all_present(), None, values(0.0), values(0.0))(white)
    mass = soft.sum(1)
    metric = Metric.within(sums(soft, white), mass, values(float(N)))
    assert metric.factors.shape == (T, S, D, D)
    for t in range(T):
        for s in range(S):
            means = sums(soft, white)[t, s].numpy() / np.sqrt(mass[t, s].numpy()[:, None] * N)
            wanted = np.linalg.inv(np.eye(D) - 0.999 * means.T @ means)
            np.testing.assert_allclose(explicit(metric, t, s), wanted, rtol=0.02, atol=0.02)


def test_lengths_products_and_cosines_are_the_explicit_ones():
    white, soft, metric = clustered()
    centers = metric.unit(sums(soft, white))
    result, inverse = cosines(white, centers, metric), metric.inverse_lengths(white)
    for t in range(T):
        for s in range(S):
            matrix, x, c = explicit(metric, t, s), white[t].numpy(), centers[t, s].numpy()
            length = np.sqrt(np.einsum("nd,de,ne->n", x, matrix, x))
            np.testing.assert_allclose(1 / inverse[t, :, s].numpy(), length, rtol=1e-6)
            np.testing.assert_allclose(metric.times(centers)[t, s].numpy(), c @ matrix, atol=1e-9)
            np.testing.assert_allclose(np.einsum("kd,de,ke->k", c, matrix, c), 1, rtol=1e-6)
            np.testing.assert_allclose(result[t, :, s].numpy(), x @ matrix @ c.T / length[:, None], atol=1e-6)
    assert result.abs().max() <= 1 + 1e-6


def test_the_flat_metric_is_the_plain_cosine():
    white, soft, _ = clustered()
    metric = Metric.flat(S, white)
    centers = metric.unit(sums(soft, white))
    wanted = torch.einsum("tnd,tskd->tnsk", white / white.norm(dim=-1, keepdim=True), centers)
    torch.testing.assert_close(cosines(white, centers, metric), wanted)


def test_linear_functions_are_the_same_of_whitened_rows():
    result, weights = rows(), torch.randn(T, S, K, D, dtype=torch.double)
    space = whitened_by(result, all_present(), None, values(0.1), values(0.0))
    moved, offsets = space.linear(weights)
    torch.testing.assert_close(products(space(result), moved) + offsets.unsqueeze(1), products(result, weights))


def test_a_zero_vector_stays_zero():
    _, _, metric = clustered()
    assert (metric.unit(torch.zeros(T, S, K, D, dtype=torch.double)) == 0).all()


def test_a_trial_alone_is_the_same_as_among_others():
    white, soft, metric = clustered()
    alone = Metric.within(sums(soft[:1], white[:1]), soft[:1].sum(1), values(float(N))[:1])
    torch.testing.assert_close(alone.factors, metric.factors[:1])
    torch.testing.assert_close(alone.inverse_lengths(white[:1]), metric.inverse_lengths(white)[:1])


@pytest.mark.parametrize("size", [1, 10, 100, 384])
def test_the_inverse_root_also_after_the_threads_were_set(size):
    torch.manual_seed(0)
    rows = torch.randn(5, 2 * size, size)
    matrices = rows.transpose(1, 2) @ rows / (2 * size) + 0.1 * torch.eye(size)
    # batched LU of some libraries fails from here on
    torch.set_num_threads(torch.get_num_threads())
    root = inverse_root(matrices)
    assert torch.equal(root, root.tril())
    whole = root.transpose(1, 2) @ root @ matrices
    torch.testing.assert_close(whole, torch.eye(size).expand(5, -1, -1), atol=1e-3, rtol=0)


def test_what_is_not_finite_spoils_no_neighbour():
    matrices = torch.eye(3).repeat(2, 1, 1)
    matrices[0, 1, 1] = float("nan")
    root = inverse_root(matrices)
    assert not torch.isfinite(root[0]).all()
    assert torch.equal(root[1], torch.eye(3))


def test_leading_directions_span_the_leading_eigenvectors():
    made = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2, 12, 12, generator=made)).Q
    values = torch.tensor([9.0, 7.0, 5.0] + [0.5] * 9)
    covariance = basis @ torch.diag(values) @ basis.transpose(1, 2)
    directions = leading_directions(covariance, 3)
    torch.testing.assert_close(directions.transpose(1, 2) @ directions, torch.eye(3).expand(2, 3, 3), atol=1e-5, rtol=0)
    wanted = basis[:, :, :3] @ basis[:, :, :3].transpose(1, 2)
    torch.testing.assert_close(directions @ directions.transpose(1, 2), wanted, atol=1e-3, rtol=0)


def test_lengths_have_gradients():
    """Adaptation to a stream differentiates through the clusters' cosines."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    metric = Metric(torch.randn(2, 5, 2, 4, generator=generator, dtype=torch.float64))
    assert torch.autograd.gradcheck(metric.inverse_lengths, (rows,))
