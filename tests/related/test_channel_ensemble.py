from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.conftest import make_clusters
from tests.methods.slow import best, cross_entropy, logits_of, mean, softmax
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig, readable
from ulfine_fast.engine.fit import fit, fit_many
from ulfine_fast.exports.graphs import Scorer
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.related.channel_ensemble.channels import channel_logits, low_bias, low_variance
from ulfine_fast.runs.run import Run

METHODS = ("channel_fixmatch", "channel_freematch", "channel_ulfine")
FAST = {"n1": 20, "m1": 30, "gamma_l": 4.0, "gamma_u": 4.0, "steps": 30, "eval_every": 15}
OFF = {"low_bias": 0.0, "low_variance": 0.0}
HEADS = 3


def moved(world, **values):
    """A world whose heads are apart."""
    trials, method, state, batch = world(ensemble_heads=HEADS, **values)
    state.parameters["linear"] += 0.2 * torch.randn(state.parameters["linear"].shape)
    return trials, method, state, batch


def slow_heads(state, features):
    """Logits of every head, for one trial's rows: lists by head, row and class."""
    result = []
    for weights, channels in zip(state["linear"], state["channels"], strict=True):
        result.append(logits_of(normalize(features * channels), normalize(weights * channels)))
    return result


def at(state, t):
    return {name: tensor[t].detach() for name, tensor in state.tensors.items()}


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_fixmatchs_losses_are_means_over_heads_with_the_ensembles_pseudo_labels(world, threshold):
    values = {"threshold": threshold, "lambda_u": 0.7, "low_bias": 0.3, "low_variance": 0.4, "dim": 12}
    trials, method, state, batch = moved(world, method="channel_fixmatch", **values)
    losses = method.losses(trials, state, batch)
    for t in range(2):
        own, labels = at(state, t), batch.labels[t].tolist()
        heads = slow_heads(own, batch.labeled[t])
        labeled = [cross_entropy(head[b], y) for head in heads for b, y in enumerate(labels)]
        assert losses.labeled[t].item() == pytest.approx(mean(labeled), rel=1e-4)
        easy, hard = slow_heads(own, batch.weak[t]), slow_heads(own, batch.strong[t])
        total = 0.0
        for b in range(8):
            sure, k = best(softmax([mean(head[b][c] for head in easy) for c in range(3)]))
            assert losses.pseudo.labels[t, b].item() == k
            total += sum(cross_entropy(head[b], k) for head in hard) * (sure >= threshold)
        assert losses.unlabeled[t].item() == pytest.approx(0.7 * total / 8 / HEADS, rel=1e-4)
    heads = [
        channel_logits(rows, state.parameters["linear"], state.memory["channels"], trials.values["scale"])
        for rows in (batch.labeled, batch.strong)
    ]
    terms = 0.4 * low_variance(heads[0], batch.labels) + 0.3 * low_bias(heads[1], losses.pseudo.labels)
    torch.testing.assert_close(losses.regularizer, terms)


@pytest.mark.parametrize("name", METHODS)
def test_the_prediction_is_the_mean_of_heads_that_each_see_their_channels(world, name):
    trials, method, state, batch = moved(world, method=name, dim=12, **readable(name, {"predict_from": "linear"}))
    result = method.logits(trials, state.tensors, batch.labeled)
    for t in range(2):
        heads = slow_heads(at(state, t), batch.labeled[t])
        for b in range(6):
            wanted = [mean(head[b][k] for head in heads) for k in range(3)]
            assert result[t, b].tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_ulfine_fuses_every_head_with_the_one_similarity_head(world):
    trials, method, state, batch = moved(world, method="channel_ulfine", dim=12, align="none", eta=0.25)
    result = method.pseudo_logits(trials, state.tensors, batch.weak)
    for t in range(2):
        heads = slow_heads(at(state, t), batch.weak[t])
        text = logits_of(batch.weak[t], normalize(state.parameters["prototypes"][t]))
        for b in range(8):
            wanted = [0.25 * mean(head[b][k] for head in heads) + 0.75 * text[b][k] for k in range(3)]
            assert result[t, b].tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("extra", [{}, {"orthogonality": "features"}])
def test_identical_heads_train_as_one_head_does(name, extra):
    """The control: nothing of an ensemble's gain may be a hidden learning rate."""
    cache, values = make_clusters(), {**FAST, **OFF, **readable(name, extra)}
    same = FitConfig(**values, method=name, ensemble_heads=4, ensemble_fraction=1.0)
    many = fit(cache, same, device="cpu", progress=False)
    single = same.with_method(name.removeprefix("channel_"))
    one = fit(cache, single, device="cpu", progress=False, engine="specification")
    for weights in many.tensors["linear"]:
        torch.testing.assert_close(weights, one.tensors["linear"], rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(many.tensors["adapter.up"], one.tensors["adapter.up"], rtol=2e-2, atol=2e-4)
    # it has moved, so that the comparison says something
    assert one.tensors["adapter.up"].abs().max() > 2e-3


@pytest.mark.parametrize("name", METHODS)
def test_terms_pull_errors_apart_and_the_ensemble_to_its_labels(world, name):
    for term in ("low_bias", "low_variance"):
        others = readable(name, {"lambda_o": 0.0, "fairness": 0.0})
        trials, method, state, batch = moved(world, method=name, dim=12, **{**OFF, term: 1.0}, **others)
        before = method.losses(trials, state, batch).regularizer.detach()
        weights = state.parameters["linear"].requires_grad_(True)
        method.losses(trials, state, batch).regularizer.sum().backward()
        with torch.no_grad():
            weights -= 1e-3 * weights.grad
        assert (method.losses(trials, state, batch).regularizer < before).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_trial_does_not_notice_its_neighbours(name):
    values = {**FAST, "method": name, "ensemble_heads": 3}
    configs = [FitConfig(**values, seed=seed, ensemble_fraction=fraction) for seed, fraction in ((0, 0.3), (1, 0.8))]
    together = fit_many(make_clusters(), configs, device="cpu", progress=False)
    alone = fit(make_clusters(), configs[1], device="cpu", progress=False)
    for key, tensor in alone.tensors.items():
        assert torch.equal(together[1].tensors[key], tensor)
    assert torch.equal(alone.tensors["channels"].sum(-1), torch.full((3,), round(0.8 * 16.0)))


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_saved_read_and_exported_with_its_heads(name, tmp_path):
    cache = make_clusters()
    run = fit(cache, FitConfig(**FAST, method=name, ensemble_heads=2), device="cpu", progress=False)
    again = Run.load(run.save(tmp_path / "run"))
    rows = cache.plain[:7]
    assert (again.logits(rows) == run.logits(rows)).all()
    scored = Scorer(run)(torch.from_numpy(rows.astype("float32")))
    torch.testing.assert_close(scored, torch.from_numpy(run.predict_proba(rows)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_without_unlabelled_images_the_labelled_term_is_left(world, name):
    trials, method, state, batch = moved(
        world, method=name, low_bias=1.0, low_variance=1.0, **readable(name, {"lambda_o": 0.0})
    )
    losses = method.losses(trials, state, replace(batch, weak=None, strong=None, positions=None))
    assert losses.unlabeled.tolist() == [0, 0]
    heads = channel_logits(batch.labeled, state.parameters["linear"], state.memory["channels"], trials.values["scale"])
    torch.testing.assert_close(losses.regularizer, low_variance(heads, batch.labels))


def test_other_methods_refuse_an_ensemble():
    with pytest.raises(InputError, match="method flexmatch does not read ensemble_heads, which channel_fixmatch"):
        FitConfig(method="flexmatch", ensemble_heads=2)
