from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ulfine_fast.ops import clustering
from ulfine_fast.ops.clustering import Evidence, RowChunks, Schedule, fit_clusters
from ulfine_fast.ops.mixture import Scatter, whitening
from ulfine_fast.ops.prototypes import normalize

K, D, LABELED, UNLABELED = 3, 8, 15, 400
PRIOR = torch.tensor([0.6, 0.3, 0.1])


def schedule(trials=1, **values):
    values = {"sharpness_start": 5.0, "sharpness_end": 15.0, "prior_pseudo_count": 0.0, **values}
    per_trial = {name: torch.full((trials,), value) for name, value in values.items() if isinstance(value, float)}
    return Schedule(**{"rounds": 8, "steps": 3, "held_rounds": 2, **values, **per_trial})


def gaussians(start=(0.1, 0.3, 0.6), seed=0):
    """Round clusters of unequal size, five labelled rows of each that weigh ten, and a prior the wrong way round."""
    torch.manual_seed(seed)
    labels = torch.arange(LABELED) % K
    truth = torch.multinomial(PRIOR, UNLABELED, replacement=True)
    rows = torch.eye(K, D)[torch.cat([labels, truth])] + 0.2 * torch.randn(1, LABELED + UNLABELED, D)
    present = torch.ones(1, LABELED + UNLABELED, dtype=torch.bool)
    white = whitening(Scatter.of([(rows, present)]), None, torch.zeros(1), torch.zeros(1))(rows)
    evidence = Evidence(
        labeled=white[:, :LABELED],
        labels=labels.unsqueeze(0),
        label_weights=torch.full((1, LABELED, 1), 10.0),
        unlabeled=RowChunks.of(white[:, LABELED:], torch.ones(1, UNLABELED, dtype=torch.bool)),
        heads=torch.zeros(1, 1, K, D),
        offsets=torch.zeros(1, 1, K),
        prior=torch.tensor([[start]]),
    )
    return evidence, truth


def rows_of(evidence):
    """All unlabelled rows (T, N, D)."""
    return evidence.unlabeled.rows(0, evidence.unlabeled.present.shape[1])


def anchors(evidence):
    """Logits of the linear classifiers (T, N, J, K)."""
    return torch.einsum("tnd,tjkd->tnjk", rows_of(evidence), evidence.heads) + evidence.offsets.unsqueeze(1)


def probabilities(evidence, clusters, kappa):
    """Of the unlabelled rows' classes, by the clusters of a fit with one head (T, N, C, K)."""
    scores = kappa * clusters.cosines(rows_of(evidence)) + anchors(evidence) + clusters.prior.log().unsqueeze(1)
    return torch.softmax(scores, -1)


def right(evidence, clusters, truth):
    """Fraction of the unlabelled rows that the first candidate puts into their class."""
    return float((probabilities(evidence, clusters, 15.0)[0, :, 0].argmax(-1) == truth).float().mean())


def with_probe(evidence):
    """Anchored by the labelled rows' own class means."""
    means = torch.stack([evidence.labeled[0, k::K].mean(0) for k in range(K)])
    return replace(evidence, heads=0.3 * normalize(means).view(1, 1, K, D))


@pytest.mark.parametrize("seed", range(4))
def test_clusters_and_their_prior_are_found_from_a_wrong_start(seed):
    evidence, truth = gaussians(seed=seed)
    evidence = with_probe(evidence)
    clusters = fit_clusters(evidence, schedule())
    assert right(evidence, clusters, truth) > 0.97
    counts = torch.bincount(truth, minlength=K) / UNLABELED
    torch.testing.assert_close(clusters.prior[0, 0], counts, rtol=0, atol=0.03)


def test_the_metric_forgets_what_varies_inside_classes():
    evidence, truth = gaussians()
    evidence = with_probe(evidence)
    fitted = fit_clusters(evidence, schedule())
    flat = fit_clusters(evidence, schedule(rounds=1, steps=24))
    assert flat.metric.factors.numel() == 0
    assert right(evidence, fitted, truth) > right(evidence, flat, truth) + 0.1


def test_a_prior_held_throughout_is_the_start_and_the_mass_of_the_clusters():
    evidence, _ = gaussians(start=(0.2, 0.5, 0.3))
    evidence = with_probe(evidence)
    clusters = fit_clusters(evidence, schedule(held_rounds=8, sharpness_start=2.0, sharpness_end=2.0))
    torch.testing.assert_close(clusters.prior, evidence.prior)
    unlabeled = clusters.mass - LABELED / K
    torch.testing.assert_close(unlabeled / UNLABELED, evidence.prior, rtol=0, atol=1e-3)


def test_a_large_pseudo_count_keeps_the_starting_prior():
    evidence, _ = gaussians()
    clusters = fit_clusters(with_probe(evidence), schedule(prior_pseudo_count=1e4))
    torch.testing.assert_close(clusters.prior, evidence.prior, rtol=0, atol=1e-3)


@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
def test_no_class_vanishes_and_a_long_tail_keeps_its_ratio(classes):
    mass = 100.0 ** -torch.linspace(0, 1, classes).view(1, 1, classes)
    mass[..., 0] += mass.sum() * 0.2
    count = torch.tensor([1000])
    mass = 1000 * mass / mass.sum()
    prior = clustering._estimated_prior(mass, count, torch.zeros_like(mass), torch.zeros(1))
    # a ratio of a hundred is no reason to lift a class, whatever their number
    torch.testing.assert_close(prior, mass / 1000, rtol=0.02, atol=0)
    mass[..., -1] = 0
    lost = clustering._estimated_prior(mass, count, torch.zeros_like(mass), torch.zeros(1))
    assert float(lost[..., -1]) == pytest.approx(0.01 / classes, rel=0.05)
    torch.testing.assert_close(lost.sum(-1), torch.ones(1, 1))


def test_a_large_anchor_decides_alone():
    evidence, _ = gaussians()
    torch.manual_seed(9)
    evidence = replace(evidence, heads=1e4 * torch.randn(1, 1, K, D))
    clusters = fit_clusters(evidence, schedule(held_rounds=0))
    own = torch.bincount(anchors(evidence)[0, :, 0].argmax(-1), minlength=K)
    torch.testing.assert_close(clusters.mass[0, 0], own + LABELED / K, rtol=0.02, atol=0)


def slow_transport(scores, prior, rounds):
    """Sinkhorn's iterations on a dense plan of one trial: columns to the prior, rows to one."""
    plan = np.exp(scores - scores.max(1, keepdims=True))
    plan = plan / plan.sum(1, keepdims=True)
    for _ in range(rounds):
        plan = plan * (prior * len(plan) / plan.sum(0))
        plan = plan / plan.sum(1, keepdims=True)
    return plan


def test_the_first_probabilities_are_the_anchors_on_the_starting_prior():
    evidence, _ = gaussians()
    evidence = with_probe(evidence)
    clusters = fit_clusters(evidence, schedule(rounds=0))
    start = anchors(evidence)[0, :, 0].double().numpy() + evidence.prior[0, 0].log().numpy()
    plan = slow_transport(start, evidence.prior[0, 0].double().numpy(), 7)
    np.testing.assert_allclose(clusters.mass[0, 0].numpy(), plan.sum(0) + LABELED / K, rtol=1e-4)
    np.testing.assert_allclose(plan.mean(0), evidence.prior[0, 0].numpy(), atol=1e-3)
    labeled = torch.stack([evidence.labeled[0, k::K].sum(0) for k in range(K)]).numpy()
    wanted = plan.T @ rows_of(evidence)[0].numpy() + labeled
    np.testing.assert_allclose(clusters.scatter[0, 0].numpy(), wanted, rtol=1e-3, atol=1e-2)


def test_without_an_anchor_the_first_probabilities_are_the_start():
    evidence, _ = gaussians()
    clusters = fit_clusters(evidence, schedule(rounds=0))
    torch.testing.assert_close(clusters.mass - LABELED / K, UNLABELED * evidence.prior)


def test_without_an_anchor_labels_alone_name_the_clusters():
    evidence, truth = gaussians(start=(1 / 3, 1 / 3, 1 / 3))
    assert right(evidence, fit_clusters(evidence, schedule()), truth) > 0.97


def slow_centers(evidence, plan):
    """Unit class sums under the flat metric, of rows at length one, one trial and candidate."""
    rows = F.normalize(rows_of(evidence)[0], dim=-1)
    labeled = F.normalize(evidence.labeled[0], dim=-1)
    centers = []
    for k in range(K):
        total = sum(w * x for w, x in zip(plan[:, k], rows, strict=True))
        for i, x in enumerate(labeled):
            if evidence.labels[0, i] == k:
                total = total + evidence.label_weights[0, i, 0] * x
        centers.append(total)
    return F.normalize(torch.stack(centers), dim=-1)


def test_steps_are_expectation_and_maximisation():
    evidence, _ = gaussians()
    rows = rows_of(evidence)[:, :30]
    short = replace(
        evidence,
        unlabeled=RowChunks.of(rows, torch.ones(1, 30, dtype=torch.bool)),
        heads=0.5 * torch.randn(1, 1, K, D),
        offsets=torch.randn(1, 1, K),
    )
    clusters = fit_clusters(short, schedule(rounds=1, steps=2, held_rounds=0, prior_pseudo_count=0.5))
    anchor = anchors(short)[0, :, 0]
    start = short.prior[0, 0]
    # transport onto the prior, and its potentials for the first step
    log_weights = start.log()
    for _ in range(8):
        plan = torch.softmax(anchor + log_weights, -1)
        log_weights = log_weights + (start * 30).log() - plan.sum(0).log()
    for _ in range(2):
        cosine = F.normalize(rows[0], dim=-1) @ slow_centers(short, plan).T
        plan = torch.softmax(5.0 * cosine + anchor + log_weights, -1)
        prior = plan.mean(0) + 0.5 * start
        prior = prior / prior.sum()
        log_weights = prior.log()
    torch.testing.assert_close(clusters.prior[0, 0], prior, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clusters.centers[0, 0], slow_centers(short, plan), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(clusters.mass[0, 0], plan.sum(0) + LABELED / K, rtol=1e-4, atol=1e-4)


def test_sharpness_grows_by_a_factor_a_round():
    two = schedule(2, rounds=3, sharpness_start=4.0, sharpness_end=16.0)
    assert [two.sharpness(n).flatten().tolist() for n in range(3)] == [[4.0, 4.0], [8.0, 8.0], [16.0, 16.0]]
    assert schedule(1, rounds=1).sharpness(0).item() == 5.0


@pytest.mark.parametrize("values", [1, 64 * K, 1 << 30])
def test_chunks_change_nothing(monkeypatch, values):
    evidence, _ = gaussians()
    evidence = with_probe(evidence)
    whole = fit_clusters(evidence, schedule())
    monkeypatch.setattr(clustering, "_CHUNK_VALUES", values)
    monkeypatch.setattr(clustering, "_LEAST_ROWS", 7)
    parts = fit_clusters(evidence, schedule())
    torch.testing.assert_close(parts.centers, whole.centers, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(parts.prior, whole.prior, rtol=1e-3, atol=1e-4)


def longer(values, more, value=0):
    """A tensor (T, n, ...) with rows of padding."""
    tail = torch.full((values.shape[0], more, *values.shape[2:]), value, dtype=values.dtype)
    return torch.cat([values, tail], dim=1)


def padded(evidence, more):
    """The same evidence with rows of padding in both roles."""
    return replace(
        evidence,
        labeled=longer(evidence.labeled, more, 7.0),
        labels=longer(evidence.labels, more, -1),
        label_weights=longer(evidence.label_weights, more),
        unlabeled=RowChunks.of(longer(rows_of(evidence), more, 3.0), longer(evidence.unlabeled.present, more, False)),
    )


def beside(first, second):
    """Two trials as one evidence."""
    names = ("labeled", "labels", "label_weights", "heads", "offsets", "prior")
    both = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names}
    present = torch.cat([first.unlabeled.present, second.unlabeled.present])
    return Evidence(**both, unlabeled=RowChunks.of(torch.cat([rows_of(first), rows_of(second)]), present))


def test_a_trial_alone_is_the_same_as_padded_among_others():
    first, second = with_probe(gaussians()[0]), with_probe(gaussians(seed=1)[0])
    together = fit_clusters(beside(padded(first, 5), padded(second, 5)), schedule(2))
    alone = fit_clusters(first, schedule())
    torch.testing.assert_close(together.prior[:1], alone.prior, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together.centers[:1], alone.centers, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together.mass[:1], alone.mass, rtol=1e-3, atol=1e-2)


def two_fits(evidence):
    """The second fit has no labels of the first rows, and another head; the second start is another prior."""
    weights = evidence.label_weights.repeat(1, 1, 2)
    weights[:, :3, 1] = 0
    torch.manual_seed(4)
    prior = torch.tensor([[[0.1, 0.3, 0.6], [0.4, 0.3, 0.3]]])
    return replace(
        evidence,
        label_weights=weights,
        heads=0.3 * torch.randn(1, 2, K, D),
        offsets=torch.zeros(1, 2, K),
        prior=prior.repeat(1, 2, 1),
    )


def test_fits_do_not_see_what_was_left_out_of_them():
    evidence = two_fits(gaussians()[0])
    labels = evidence.labels.clone()
    labels[:, :3] = labels[:, :3].roll(1, dims=1)
    before, after = fit_clusters(evidence, schedule()), fit_clusters(replace(evidence, labels=labels), schedule())
    torch.testing.assert_close(before.centers[:, 2:], after.centers[:, 2:], rtol=0, atol=1e-6)
    assert not torch.allclose(before.centers[:, :2], after.centers[:, :2], atol=1e-4)


def test_fits_and_starts_do_not_mix():
    evidence = two_fits(gaussians()[0])
    together = fit_clusters(evidence, schedule(prior_pseudo_count=0.5))
    for c, (j, s) in enumerate(itertools.product(range(2), range(2))):
        one = replace(
            evidence,
            label_weights=evidence.label_weights[:, :, j : j + 1],
            heads=evidence.heads[:, j : j + 1],
            offsets=evidence.offsets[:, j : j + 1],
            prior=evidence.prior[:, s : s + 1],
        )
        alone = fit_clusters(one, schedule(prior_pseudo_count=0.5))
        torch.testing.assert_close(alone.centers[:, 0], together.centers[:, c], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(alone.prior[:, 0], together.prior[:, c], rtol=1e-3, atol=1e-4)


def test_clusters_of_a_sample_go_on_with_all_rows():
    evidence, truth = gaussians()
    evidence = with_probe(evidence)
    present = evidence.unlabeled.present
    sample = replace(evidence, unlabeled=RowChunks.of(rows_of(evidence)[:, :250], present[:, :250]))
    late = schedule(rounds=2, sharpness_start=15.0)
    clusters = fit_clusters(evidence, late, start=fit_clusters(sample, schedule()))
    assert right(evidence, clusters, truth) > 0.97
    counts = torch.bincount(truth, minlength=K) / UNLABELED
    torch.testing.assert_close(clusters.prior[0, 0], counts, rtol=0, atol=0.03)
    whole = fit_clusters(evidence, schedule())
    torch.testing.assert_close(clusters.centers, whole.centers, rtol=0, atol=0.1)


def test_the_fraction_done_is_reported():
    seen = []
    fit_clusters(gaussians()[0], schedule(rounds=2, steps=3), report=seen.append)
    assert seen == pytest.approx([i / 6 for i in range(1, 7)])


def test_without_unlabelled_rows_the_centers_are_the_labelled_means():
    evidence, _ = gaussians()
    nothing = replace(evidence, unlabeled=RowChunks.of(torch.zeros(1, 1, D), torch.zeros(1, 1, dtype=torch.bool)))
    clusters = fit_clusters(nothing, schedule(rounds=1))
    rows = F.normalize(evidence.labeled[0], dim=-1)
    wanted = torch.stack([rows[k::K].sum(0) for k in range(K)])
    torch.testing.assert_close(clusters.centers[0, 0], F.normalize(wanted, dim=-1))
    assert torch.isfinite(fit_clusters(nothing, schedule()).centers).all()


def test_cosines_of_new_rows_are_those_of_the_last_metric():
    evidence, truth = gaussians()
    clusters = fit_clusters(with_probe(evidence), schedule())
    result = clusters.cosines(rows_of(evidence))
    assert result.shape == (1, UNLABELED, 1, K)
    assert result.abs().max() <= 1 + 1e-4
    assert (result[0, :, 0].argmax(-1) == truth).float().mean() > 0.95
