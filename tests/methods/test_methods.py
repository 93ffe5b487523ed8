"""Losses, pseudo-labels and memories of each method against the formulas written out row by row."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.methods.slow import cross_entropy, softmax
from ulfine_fast.config import FitConfig, per_trial_options, readable
from ulfine_fast.core.types import Batch, Trials
from ulfine_fast.methods.registry import method_of
from ulfine_fast.ops.prototypes import normalize

T, B, U, K, D = 2, 6, 8, 3, 5


def world(seed=0, **values):
    """Two trials, their method, its first state and one batch, in float64 where a formula is compared."""
    torch.manual_seed(seed)
    usual = {"adapter": "none", "scale": 8.0, "tau": 1.0, "threshold": 0.5}
    config = FitConfig(**{**readable(values["method"], usual), **values})
    hyper = {name: torch.full((T,), float(getattr(config, name))) for name in per_trial_options(config)}
    prior = torch.softmax(torch.randn(T, K), -1)
    prototypes = normalize(torch.randn(K, D)).repeat(T, 1, 1)
    trials = Trials(config, hyper, torch.tensor([1, 2]), prototypes, torch.log(prior))
    method = method_of(config)
    batch = Batch(
        normalize(torch.randn(T, B, D)),
        torch.randint(K, (T, B)),
        normalize(torch.randn(T, U, D)),
        normalize(torch.randn(T, U, D)),
    )
    return trials, method, method.start(trials), batch


def cosines(features, weights, scale):
    return [[scale * torch.nn.functional.cosine_similarity(x, w, dim=0).item() for w in weights] for x in features]


def slow_fixmatch(weak, strong, threshold, shift=None):
    """Mean over the batch of the cross-entropy of rows whose weak view is sure."""
    total = 0.0
    for easy, hard in zip(weak, strong, strict=True):
        probabilities = softmax(easy)
        if max(probabilities) >= threshold:
            total += cross_entropy(hard, probabilities.index(max(probabilities)), shift)
    return total / len(weak)


def slow_labeled(logits, labels, log_prior):
    shift = log_prior.tolist()
    return sum(cross_entropy(row, int(y), shift) for row, y in zip(logits, labels, strict=True)) / len(labels)


def test_zero_shot_is_the_nearest_prototype():
    trials, method, state, batch = world(method="zero_shot")
    logits = method.logits(trials, state.tensors, batch.labeled)
    wanted = (batch.labeled @ trials.prototypes.transpose(1, 2)).argmax(-1)
    assert torch.equal(logits.argmax(-1), wanted)
    assert not method.trains


def test_a_linear_probe_starts_as_zero_shot():
    trials, method, state, batch = world(method="linear_probe")
    _, zero, start, _ = world(method="zero_shot")
    torch.testing.assert_close(
        method.logits(trials, state.tensors, batch.labeled), zero.logits(trials, start.tensors, batch.labeled)
    )


@pytest.mark.parametrize("name", ["linear_probe", "lightweight"])
def test_labelled_loss_is_the_adjusted_cross_entropy(name):
    trials, method, state, batch = world(method=name)
    losses = method.losses(trials, state, batch)
    for t in range(T):
        logits = cosines(batch.labeled[t], state.tensors["linear"][t], 8.0)
        wanted = slow_labeled(logits, batch.labels[t], trials.log_prior[t])
        assert losses.labeled[t].item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.8, 1.0])
def test_lightweights_unlabelled_loss_is_fixmatchs(threshold):
    trials, method, state, batch = world(method="lightweight", threshold=threshold, lambda_u=0.7)
    losses = method.losses(trials, state, batch)
    for t in range(T):
        weak = cosines(batch.weak[t], state.tensors["linear"][t], 8.0)
        strong = cosines(batch.strong[t], state.tensors["linear"][t], 8.0)
        wanted = 0.7 * slow_fixmatch(weak, strong, threshold)
        assert losses.unlabeled[t].item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_no_unlabelled_images_no_unlabelled_loss():
    for name in ("lightweight", "ulfine"):
        trials, method, state, batch = world(method=name)
        losses = method.losses(trials, state, replace(batch, weak=None, strong=None))
        assert losses.unlabeled.tolist() == [0, 0]
        assert losses.pseudo is None


def test_ulfines_losses_are_both_heads_adjusted_by_their_priors():
    trials, method, state, batch = world(
        method="ulfine", align="none", eta=0.3, tau_u=1.5, lambda_u=1.0, threshold=0.6, lambda_o=0.2
    )
    with torch.no_grad():
        # heads apart from each other, so that fusion matters
        state.parameters["linear"].add_(0.3 * torch.randn(T, K, D))
    state.memory["prior"] = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]])
    losses = method.losses(trials, state, batch)
    for t in range(T):
        heads = [state.tensors[name][t] for name in ("linear", "prototypes")]
        labeled = [slow_labeled(cosines(batch.labeled[t], w, 8.0), batch.labels[t], trials.log_prior[t]) for w in heads]
        assert losses.labeled[t].item() == pytest.approx(sum(labeled), rel=1e-4)
        weak = [cosines(batch.weak[t], w, 8.0) for w in heads]
        fused = [[0.3 * a + 0.7 * b for a, b in zip(*rows, strict=True)] for rows in zip(*weak, strict=True)]
        shift = [1.5 * math.log(p) for p in state.memory["prior"][t].tolist()]
        unlabeled = [slow_fixmatch(fused, cosines(batch.strong[t], w, 8.0), 0.6, shift) for w in heads]
        assert losses.unlabeled[t].item() == pytest.approx(sum(unlabeled), rel=1e-3, abs=1e-5)
        gram = heads[1] @ heads[1].T
        penalty = ((gram - torch.eye(K)) ** 2).mean().item()
        assert losses.regularizer[t].item() == pytest.approx(0.2 * penalty, rel=1e-4)


def test_ulfines_memory_follows_the_published_update():
    trials, method, state, batch = world(method="ulfine", mu=0.5, rho=0.9, visual_momentum=0.8)
    before = state.tensors["prototypes"].detach().clone()
    losses = method.losses(trials, state, batch)
    method.after_step(trials, state, batch, losses)
    for t in range(T):
        prior = 0.9 / K + 0.1 * losses.pseudo.probabilities[t].mean(0)
        torch.testing.assert_close(state.memory["prior"][t], prior / prior.sum())
        for k in range(K):
            members = batch.labeled[t][batch.labels[t] == k]
            if not len(members):
                torch.testing.assert_close(state.tensors["prototypes"][t, k], before[t, k])
                continue
            visual = torch.nn.functional.normalize(members.mean(0), dim=0)
            alpha = 0.5 * prior[k] / prior.max()
            wanted = torch.nn.functional.normalize((1 - alpha) * before[t, k] + alpha * visual, dim=0)
            torch.testing.assert_close(state.tensors["prototypes"][t, k].detach(), wanted, rtol=1e-4, atol=1e-5)


def test_without_paf_the_prototypes_get_no_gradient_and_do_not_move():
    trials, method, state, batch = world(method="ulfine", paf=False, mu=0.9)
    for tensor in state.parameters.values():
        tensor.requires_grad_(True)
    losses = method.losses(trials, state, batch)
    (losses.labeled + losses.unlabeled + losses.regularizer).sum().backward()
    assert state.parameters["prototypes"].grad.abs().max() == 0
    assert state.parameters["linear"].grad.abs().max() > 0
    method.after_step(trials, state, batch, losses)
    torch.testing.assert_close(state.tensors["prototypes"].detach(), trials.prototypes)


def test_without_dlf_pseudo_labels_are_the_linear_heads():
    trials, method, state, batch = world(method="ulfine", dlf=False, eta=0.0)
    state.parameters["linear"] = torch.randn(T, K, D)
    logits = method.pseudo_logits(trials, state.tensors, batch.weak)
    wanted = (batch.weak @ normalize(state.parameters["linear"]).transpose(1, 2)).argmax(-1)
    assert torch.equal(logits.argmax(-1), wanted)


@pytest.mark.parametrize("head", ["linear", "similarity"])
def test_predictions_from_one_head(head):
    trials, method, state, batch = world(method="ulfine", predict_from=head)
    state.parameters["linear"] = torch.randn(T, K, D)
    weights = state.tensors["linear" if head == "linear" else "prototypes"]
    wanted = 8.0 * batch.weak @ normalize(weights).transpose(1, 2)
    torch.testing.assert_close(method.logits(trials, state.tensors, batch.weak), wanted)


def test_the_orthogonality_reaches_the_adapter_through_features():
    trials, method, state, batch = world(
        method="ulfine", orthogonality="features", adapter="residual", mu=0.9, lambda_o=1
    )
    assert "prototypes" in state.memory
    for tensor in state.parameters.values():
        tensor.requires_grad_(True)
    losses = method.losses(trials, state, batch)
    losses.regularizer.sum().backward()
    assert state.parameters["adapter.up"].grad.abs().max() > 0


def test_the_prototypes_of_the_feature_path_carry_no_gradient():
    trials, method, state, batch = world(method="ulfine", orthogonality="features")
    method.after_step(trials, state, batch, method.losses(trials, state, batch))
    assert not state.tensors["prototypes"].requires_grad


@pytest.mark.parametrize("alpha", ["pseudo-label", "constant"])
@pytest.mark.parametrize("prior", ["soft", "hard"])
@pytest.mark.parametrize("align", ["standardize", "max-ratio", "none"])
def test_every_switch_gives_finite_losses(alpha, prior, align):
    trials, method, state, batch = world(method="ulfine", alpha=alpha, prior=prior, align=align, adapter="residual")
    losses = method.losses(trials, state, batch)
    method.after_step(trials, state, batch, losses)
    assert torch.isfinite(losses.labeled + losses.unlabeled + losses.regularizer).all()
    torch.testing.assert_close(state.memory["prior"].sum(-1), torch.ones(T))
