from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ulfine_fast.ops.clustering import Evidence, Schedule, fit_clusters
from ulfine_fast.ops.mixture import whitening
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.ops.transport import transport

K, D, LABELED, UNLABELED = 3, 8, 15, 400
PRIOR = torch.tensor([0.6, 0.3, 0.1])


def schedule(trials=1, **values):
    values = {"sharpness_start": 5.0, "sharpness_end": 15.0, "prior_pseudo_count": 0.0, **values}
    per_trial = {name: torch.full((trials,), value) for name, value in values.items() if isinstance(value, float)}
    return Schedule(**{"rounds": 8, "steps": 3, "held_rounds": 2, **values, **per_trial})


def gaussians(candidates=1, start=(0.1, 0.3, 0.6), seed=0):
    """Round clusters of unequal size, five labelled rows of each that weigh ten, and a prior the wrong way round."""
    torch.manual_seed(seed)
    labels = torch.arange(LABELED) % K
    truth = torch.multinomial(PRIOR, UNLABELED, replacement=True)
    rows = torch.eye(K, D)[torch.cat([labels, truth])] + 0.2 * torch.randn(1, LABELED + UNLABELED, D)
    present = torch.ones(1, LABELED + UNLABELED, dtype=torch.bool)
    white = whitening(rows, present, None, torch.zeros(1), torch.zeros(1))(rows)
    label_weights = 10 * F.one_hot(labels, K).float().view(1, LABELED, 1, K)
    evidence = Evidence(
        white[:, :LABELED],
        label_weights.repeat(1, 1, candidates, 1),
        white[:, LABELED:],
        torch.ones(1, UNLABELED, dtype=torch.bool),
        torch.zeros(1, UNLABELED, candidates, K),
        torch.tensor(start).repeat(1, candidates, 1),
    )
    return evidence, truth


def right(clusters, truth):
    """Fraction of the unlabelled rows that the first candidate puts into their class."""
    return float((clusters.probabilities[0, :, 0].argmax(-1) == truth).float().mean())


def with_probe(evidence):
    """Anchored by the cosines with the labelled rows' own class means."""
    means = normalize(evidence.label_weights[:, :, 0].transpose(1, 2) @ evidence.labeled)
    cosine = normalize(evidence.unlabeled) @ means.transpose(1, 2)
    return replace(evidence, anchor=cosine.unsqueeze(2).expand_as(evidence.anchor))


@pytest.mark.parametrize("seed", range(4))
def test_clusters_and_their_prior_are_found_from_a_wrong_start(seed):
    evidence, truth = gaussians(seed=seed)
    clusters = fit_clusters(with_probe(evidence), schedule())
    assert right(clusters, truth) > 0.97
    counts = torch.bincount(truth, minlength=K) / UNLABELED
    torch.testing.assert_close(clusters.prior[0, 0], counts, rtol=0, atol=0.03)


def test_the_metric_forgets_what_varies_inside_classes():
    evidence, truth = gaussians()
    fitted = fit_clusters(with_probe(evidence), schedule())
    flat = fit_clusters(with_probe(evidence), schedule(rounds=1, steps=24))
    assert flat.metric.factors.abs().max() == 0
    assert right(fitted, truth) > right(flat, truth) + 0.1


def test_a_prior_held_throughout_is_the_start_and_the_mean_probability():
    evidence, _ = gaussians(start=(0.2, 0.5, 0.3))
    evidence = with_probe(evidence)
    clusters = fit_clusters(evidence, schedule(held_rounds=8, sharpness_start=2.0, sharpness_end=2.0))
    torch.testing.assert_close(clusters.prior, evidence.prior)
    torch.testing.assert_close(clusters.probabilities.mean(1), evidence.prior, rtol=0, atol=1e-3)


def test_a_large_pseudo_count_keeps_the_starting_prior():
    evidence, _ = gaussians()
    clusters = fit_clusters(with_probe(evidence), schedule(prior_pseudo_count=1e4))
    torch.testing.assert_close(clusters.prior, evidence.prior, rtol=0, atol=1e-3)


def test_no_class_vanishes():
    evidence, _ = gaussians()
    against = replace(evidence, anchor=evidence.anchor - torch.tensor([0.0, 0.0, 1e3]))
    clusters = fit_clusters(against, schedule())
    assert clusters.prior[0, 0, 2] == pytest.approx(1e-3, rel=0.01)
    torch.testing.assert_close(clusters.prior.sum(-1), torch.ones(1, 1))


def test_a_large_anchor_decides_alone():
    evidence, _ = gaussians()
    torch.manual_seed(9)
    anchor = 1e4 * torch.randn(1, UNLABELED, 1, K)
    clusters = fit_clusters(replace(evidence, anchor=anchor), schedule(held_rounds=0))
    torch.testing.assert_close(clusters.probabilities, torch.softmax(anchor, -1))


def test_the_first_probabilities_are_the_anchors_on_the_starting_prior():
    evidence, _ = gaussians()
    evidence = with_probe(evidence)
    clusters = fit_clusters(evidence, schedule(rounds=0))
    torch.testing.assert_close(
        clusters.probabilities, transport(evidence.anchor, evidence.prior.log(), evidence.present)
    )


def test_without_an_anchor_the_first_probabilities_are_the_start():
    evidence, _ = gaussians()
    clusters = fit_clusters(evidence, schedule(rounds=0))
    torch.testing.assert_close(clusters.probabilities, evidence.prior.unsqueeze(1).expand_as(clusters.probabilities))


def test_without_an_anchor_labels_alone_name_the_clusters():
    evidence, truth = gaussians(start=(1 / 3, 1 / 3, 1 / 3))
    assert right(fit_clusters(evidence, schedule()), truth) > 0.97


def slow_step(evidence, plan, kappa, prior):
    """One EM round of the only candidate under the flat metric, in plain tensors of one trial."""
    rows = F.normalize(evidence.unlabeled[0], dim=-1)
    labeled = F.normalize(evidence.labeled[0], dim=-1)
    centers = torch.stack(
        [
            sum(w * x for w, x in zip(plan[:, k], rows, strict=True))
            + sum(w * x for w, x in zip(evidence.label_weights[0, :, 0, k], labeled, strict=True))
            for k in range(K)
        ]
    )
    cosine = rows @ F.normalize(centers, dim=-1).T
    return torch.softmax(kappa * cosine + evidence.anchor[0, :, 0] + prior.log(), -1)


def test_steps_are_expectation_and_maximisation():
    evidence, _ = gaussians()
    short = replace(
        evidence,
        unlabeled=evidence.unlabeled[:, :30],
        present=evidence.present[:, :30],
        anchor=2 * torch.randn(1, 30, 1, K),
    )
    clusters = fit_clusters(short, schedule(rounds=1, steps=2, held_rounds=0, prior_pseudo_count=0.5))
    plan = transport(short.anchor, short.prior.log(), short.present)[0, :, 0]
    prior = short.prior[0, 0]
    for _ in range(2):
        plan = slow_step(short, plan, 5.0, prior)
        prior = plan.mean(0) + 0.5 * short.prior[0, 0]
        prior = prior / prior.sum()
    torch.testing.assert_close(clusters.probabilities[0, :, 0], plan, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(clusters.prior[0, 0], prior, rtol=1e-4, atol=1e-5)


def test_sharpness_grows_by_a_factor_a_round():
    two = schedule(2, rounds=3, sharpness_start=4.0, sharpness_end=16.0)
    assert [two.sharpness(n).flatten().tolist() for n in range(3)] == [[4.0, 4.0], [8.0, 8.0], [16.0, 16.0]]
    assert schedule(1, rounds=1).sharpness(0).item() == 5.0


def padded(evidence, more):
    """The same evidence with rows of padding in both roles."""

    def longer(rows, value=0.0):
        tail = torch.full((rows.shape[0], more, *rows.shape[2:]), value, dtype=rows.dtype)
        return torch.cat([rows, tail], dim=1)

    return Evidence(
        longer(evidence.labeled, 7.0),
        longer(evidence.label_weights),
        longer(evidence.unlabeled),
        longer(evidence.present, False),
        longer(evidence.anchor, 3.0),
        evidence.prior,
    )


def test_a_trial_alone_is_the_same_as_padded_among_others():
    first, second = with_probe(gaussians()[0]), with_probe(gaussians(seed=1)[0])
    long = padded(first, 5)
    neighbour = padded(second, 5)
    both = Evidence(*(torch.cat([getattr(long, n), getattr(neighbour, n)]) for n in Evidence.__dataclass_fields__))
    together, alone = fit_clusters(both, schedule(2)), fit_clusters(first, schedule())
    torch.testing.assert_close(together.probabilities[:1, :UNLABELED], alone.probabilities, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together.prior[:1], alone.prior, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together.centers[:1], alone.centers, rtol=1e-3, atol=1e-3)
    assert (together.probabilities[:, UNLABELED:] == 0).all()


def test_candidates_do_not_see_what_was_left_out_of_them():
    evidence, _ = gaussians(candidates=2)
    evidence.label_weights[:, :3, 1] = 0  # the second candidate has no labels of the first rows
    evidence = replace(evidence, anchor=torch.randn(1, UNLABELED, 2, K))
    other = replace(evidence, label_weights=evidence.label_weights.clone())
    other.label_weights[:, :3, 0] = other.label_weights[:, :3, 0].roll(1, dims=-1)
    before, after = fit_clusters(evidence, schedule()), fit_clusters(other, schedule())
    torch.testing.assert_close(before.probabilities[:, :, 1], after.probabilities[:, :, 1], rtol=0, atol=1e-6)
    torch.testing.assert_close(before.centers[:, 1], after.centers[:, 1], rtol=0, atol=1e-6)
    assert not torch.allclose(before.centers[:, 0], after.centers[:, 0], atol=1e-4)


def test_candidates_of_other_starts_do_not_mix():
    evidence, _ = gaussians(candidates=2)
    evidence = replace(with_probe(evidence), prior=torch.tensor([[[0.1, 0.3, 0.6], [0.4, 0.3, 0.3]]]))
    both = fit_clusters(evidence, schedule(prior_pseudo_count=0.5))
    for s in range(2):
        one = Evidence(
            evidence.labeled,
            evidence.label_weights[:, :, s : s + 1],
            evidence.unlabeled,
            evidence.present,
            evidence.anchor[:, :, s : s + 1],
            evidence.prior[:, s : s + 1],
        )
        torch.testing.assert_close(
            fit_clusters(one, schedule(prior_pseudo_count=0.5)).probabilities,
            both.probabilities[:, :, s : s + 1],
            rtol=1e-3,
            atol=1e-4,
        )


def test_without_unlabelled_rows_the_centers_are_the_labelled_means():
    evidence, _ = gaussians()
    nothing = replace(
        evidence,
        unlabeled=torch.zeros(1, 1, D),
        present=torch.zeros(1, 1, dtype=torch.bool),
        anchor=torch.zeros(1, 1, 1, K),
    )
    clusters = fit_clusters(nothing, schedule(rounds=1))
    rows = F.normalize(evidence.labeled[0], dim=-1)
    wanted = torch.stack([rows[k::K].sum(0) for k in range(K)])
    torch.testing.assert_close(clusters.centers[0, 0], F.normalize(wanted, dim=-1))
    assert torch.isfinite(fit_clusters(nothing, schedule()).centers).all()


def test_cosines_of_new_rows_are_those_of_the_last_metric():
    evidence, truth = gaussians()
    clusters = fit_clusters(with_probe(evidence), schedule())
    result = clusters.cosines(evidence.unlabeled)
    assert result.shape == (1, UNLABELED, 1, K)
    assert result.abs().max() <= 1 + 1e-4
    assert (result[0, :, 0].argmax(-1) == truth).float().mean() > 0.95
