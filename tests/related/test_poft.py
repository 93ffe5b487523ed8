from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.conftest import make_clusters
from tests.methods.slow import best, cross_entropy, logits_of, mean, softmax
from ulfine_fast import fit, fit_many
from ulfine_fast.core.types import Inputs

D, K = 5, 3


def with_texts(world, **values):
    """A world whose class names have two prompts, as long as the logit scale."""
    trials, method, state, batch = world(**{"reference_scale": 0.5, **values})
    texts = 4.0 * torch.nn.functional.normalize(torch.randn(2, K, D), dim=-1)
    trials = dataclasses.replace(trials, inputs=Inputs(shared={"references": texts}))
    return trials, method, state, batch


def log_g(trials, row, label):
    """Mean log-likelihood of a label by both prompts, their logits halved."""
    return mean(math.log(softmax((0.5 * text @ row).tolist())[label]) for text in trials.inputs.shared["references"])


def test_the_loss_row_by_row(world):
    trials, method, state, batch = with_texts(world, method="poft")
    result = method.losses(trials, state, batch)
    for t in range(2):
        shift, total = trials.log_prior[t].tolist(), 0.0
        for row, x, y in zip(
            logits_of(batch.labeled[t], trials.prototypes[t]), batch.labeled[t], batch.labels[t].tolist(), strict=True
        ):
            total += math.log1p(math.exp(cross_entropy(row, y, shift) + log_g(trials, x, y)))
        assert result.labeled[t].item() == pytest.approx(total / 6, rel=1e-4)
        assert result.unlabeled[t] == result.regularizer[t] == 0


def test_references_that_know_nothing_weigh_nothing(world):
    trials, method, state, batch = with_texts(world, method="poft", poft_form="weighted", reference_scale=0.0)
    plain, probe, start, _ = world(method="linear_probe")
    torch.testing.assert_close(method.losses(trials, state, batch).labeled, probe.losses(plain, start, batch).labeled)


def test_without_texts_the_start_is_the_reference(world):
    trials, method, state, batch = world(method="poft", tau=0.0, reference_scale=1.0)
    # p and g are the same before the first step, so that each row is a coin
    torch.testing.assert_close(method.losses(trials, state, batch).labeled, torch.full((2,), math.log(2)))


@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_fixmatchs_pseudo_labels_by_preference(world, threshold):
    trials, method, state, batch = with_texts(world, method="preference_fixmatch", threshold=threshold, lambda_u=1.0)
    result = method.losses(trials, state, batch)
    for t in range(2):
        head, total = trials.prototypes[t], 0.0
        for x, easy, hard in zip(
            batch.weak[t], logits_of(batch.weak[t], head), logits_of(batch.strong[t], head), strict=True
        ):
            sure, k = best(softmax(easy))
            if sure >= threshold:
                total += math.log1p(math.exp(cross_entropy(hard, k) + log_g(trials, x, k)))
        assert result.unlabeled[t].item() == pytest.approx(total / 8, rel=1e-4, abs=1e-6)


def test_fixmatch_has_its_quick_step_for_the_published_loss_alone(world):
    steps = {}
    for name in ("fixmatch", "preference_fixmatch"):
        trials, method, state, _ = world(method=name)
        steps[name] = method.fused(trials, state)
    assert steps["fixmatch"] is not None
    assert steps["preference_fixmatch"] is None


@pytest.mark.parametrize("form", ["preference", "equal", "weighted"])
def test_good_references_see_through_wrong_labels(quick, form):
    cache = make_clusters(classes=6, text_noise=0.3, noise=0.7)
    probe, poft = (
        fit(cache, quick(lr=0.1, steps=60, label_noise=0.5, val_fraction=0.0, **values))
        for values in ({"method": "linear_probe"}, {"method": "poft", "poft_form": form, "reference_scale": 0.1})
    )
    assert poft.metrics["balanced_accuracy"] > probe.metrics["balanced_accuracy"] + 0.05


def test_pseudo_labels_by_preference_alone_and_among_others(clusters, quick):
    configs = [
        quick(method="preference_fixmatch", pseudo_loss="equal", threshold=0.3, seed=s, steps=15) for s in (0, 4)
    ]
    together, alone = fit_many(clusters, configs), fit(clusters, configs[1])
    np.testing.assert_allclose(together[1].test_probabilities, alone.test_probabilities, atol=1e-5)
    plain = fit(clusters, configs[1].with_method("fixmatch"))
    assert not np.allclose(plain.test_probabilities, alone.test_probabilities, atol=1e-3)
