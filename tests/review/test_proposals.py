"""Which images are proposed, on data of which it is known what is missing."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import make_clusters
from ulfine_fast.review.estimates import gain_per_label
from ulfine_fast.review.proposals import outcome, pool_classes, propose
from ulfine_fast.review.quick import quick_fit

NONE = np.zeros(0, dtype=np.int64)


@pytest.fixture(scope="module")
def started():
    """Four overlapping classes, the last one rare: two labels, ten unlabelled images; the cache and rows of both."""
    cache = make_clusters(noise=1.2, text_noise=0.8, train=80)
    rows = [np.flatnonzero((cache.splits == "train") & (cache.labels == k)) for k in range(4)]
    labeled = np.concatenate([of_class[:count] for of_class, count in zip(rows, (20, 20, 20, 2), strict=True)])
    pool = np.concatenate([of_class[20:count] for of_class, count in zip(rows, (80, 80, 80, 30), strict=True)])
    return cache, labeled, pool


def test_rare_classes_come_first(started):
    cache, labeled, pool = started
    fit = quick_fit(cache, labeled, NONE)
    proposal = propose(cache.plain, fit, pool)
    assert len(set(proposal.rows.tolist())) == 20
    assert set(proposal.rows.tolist()) <= set(pool.tolist())
    share = (cache.labels[pool] == 3).mean()
    assert (cache.labels[proposal.rows] == 3).mean() > 2 * share
    assert proposal.classes.sum() == pytest.approx(20, abs=1e-3)
    assert 0 < proposal.gain < 1


def test_updates_of_rank_one_are_those_of_the_definition(started):
    """Chosen images, one by one, by the criterion computed afresh each time, in float64."""
    cache, labeled, pool = started
    fit = quick_fit(cache, labeled, NONE)
    rows = cache.plain.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    p = fit.probabilities.astype(np.float64)
    v = (p * (1 - p)).sum(1) + 0.02
    members, prior = pool_classes(fit.probabilities[pool])
    gains = gain_per_label(fit) / gain_per_label(fit).max()
    ordered = np.sort(p[pool], axis=1)
    doubt = 1 - (ordered[:, -1] - ordered[:, -2]) + 1e-4
    w = v[pool] * (members @ (gains / prior))
    wanted = (rows[pool] * w[:, None]).T @ rows[pool]
    precision = np.eye(rows.shape[1]) + (rows[labeled] * v[labeled, None]).T @ rows[labeled]
    chosen = []
    for _ in range(6):
        before = np.trace(np.linalg.inv(precision) @ wanted)
        more = [precision + doubt[i] * np.outer(rows[row], rows[row]) for i, row in enumerate(pool)]
        reduced = np.array([before - np.trace(np.linalg.inv(matrix) @ wanted) for matrix in more])
        worth = np.where(np.isin(pool, chosen), -1, reduced * (members @ gains))
        best = int(worth.argmax())
        chosen.append(int(pool[best]))
        precision = more[best]
    assert propose(cache.plain, fit, pool, 6).rows.tolist() == chosen


def test_the_class_prior_of_a_pool_is_estimated():
    """Of classes that overlap, one is a tenth as frequent as the fit takes it to be."""
    random = np.random.default_rng(0)
    truth = np.array([0.6, 0.35, 0.05])
    labels = random.choice(3, 4000, p=truth)
    values = random.normal(labels * 1.5)
    likelihoods = np.exp(-0.5 * (values[:, None] - 1.5 * np.arange(3)) ** 2)
    even = (likelihoods / likelihoods.sum(1, keepdims=True)).astype(np.float32)
    members, prior = pool_classes(even)
    assert abs(even.mean(0) - truth).max() > 0.1
    np.testing.assert_allclose(prior, truth, atol=0.03)
    np.testing.assert_allclose(members.sum(1), 1, atol=1e-5)


def test_of_copies_one_is_proposed(started):
    cache, labeled, pool = started
    features = cache.plain.copy()
    fit = quick_fit(cache, labeled, NONE)
    first = propose(features, fit, pool, 1).rows[0]
    copies = pool[:30]
    features[copies] = features[first]
    fit.probabilities[copies] = fit.probabilities[first]
    chosen = propose(features, fit, pool, 10).rows
    assert np.isin(chosen, [*copies, first]).sum() <= 3


def test_the_proposal_beats_chance(started):
    """Twenty labels more, over several rounds of chance."""
    cache, labeled, pool = started
    test = cache.splits == "test"

    def accuracy(more):
        fit = quick_fit(cache, np.sort(np.concatenate([labeled, more])), NONE)
        return (fit.probabilities[test].argmax(1) == cache.labels[test]).mean()

    random = np.random.default_rng(0)
    chance = np.mean([accuracy(random.choice(pool, 20, replace=False)) for _ in range(5)])
    assert accuracy(propose(cache.plain, quick_fit(cache, labeled, NONE), pool).rows) > chance


def test_few_images_and_none(started):
    cache, labeled, pool = started
    fit = quick_fit(cache, labeled, NONE)
    assert sorted(propose(cache.plain, fit, pool[:3]).rows) == pool[:3].tolist()
    empty = propose(cache.plain, fit, NONE)
    assert (len(empty.rows), empty.gain) == (0, 0.0)


def test_an_outcome_counts_what_came(started):
    cache, labeled, pool = started
    before = quick_fit(cache, labeled, NONE)
    proposal = propose(cache.plain, before, pool, 5)
    after = quick_fit(cache, np.sort(np.concatenate([labeled, proposal.rows[:4], pool[-2:]])), NONE)
    answers = np.array([0, 0, 3, 3, -1])
    came = outcome(proposal, after, answers)
    assert came.classes.tolist() == [2, 0, 0, 2]
    assert came.none == 1
    assert came.labels == len(set(proposal.rows[:4]) | set(pool[-2:]))
    assert came.gained.labels == len(before.held_out()[0])
