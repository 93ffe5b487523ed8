"""Both stages row by row, and fits that see no image's own label."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import make_clusters
from tests.methods.slow import cross_entropy, logits_of, mean, softmax
from ulfine_fast import FitConfig, fit, fit_many
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.types import Inputs, Pool
from ulfine_fast.data.splits import draw_split
from ulfine_fast.engine.inputs import trial_inputs
from ulfine_fast.methods.registry import method_of
from ulfine_fast.related.label_proportions.bags import Bags, PaddedBags, draw_bags
from ulfine_fast.related.label_proportions.method import BagBatch

G, M, K, D = 2, 3, 3, 5


def bagged(world, **values):
    """A world whose labelled rows are two bags of three, the second bag's last image missing."""
    trials, method, state, batch = world(method="proportions", labeled=G * M, **values)
    present = torch.ones(2, G, M, dtype=torch.bool)
    present[:, 1, 2] = False
    proportions = torch.softmax(torch.randn(2, G, K), -1)
    positions = torch.tensor([[1, 0], [2, 2]])
    state.scratch["late"] = torch.tensor([False, True])
    state.scratch["labels"] = torch.randint(K, (2, 3, M))
    bag_batch = BagBatch(
        labeled=batch.labeled,
        labels=torch.full((2, G * M), -1),
        bag_positions=positions,
        present=present,
        proportions=proportions,
    )
    return trials, method, state, bag_batch


def test_stage_one_is_the_proportions_cross_entropy_and_stage_two_the_labels(world):
    trials, method, state, batch = bagged(world, mixup=0, reverse_weight=0.3)
    result = method.losses(trials, state, batch).labeled
    rows = logits_of(batch.labeled[0], trials.prototypes[0])
    total = 0.0
    for g, size in enumerate((3, 2)):
        bag = [softmax(row) for row in rows[g * M : g * M + size]]
        proportions = batch.proportions[0, g].tolist()
        total -= sum(rho * math.log(mean(p[k] for p in bag)) for k, rho in enumerate(proportions))
    assert result[0].item() == pytest.approx(total / 2, rel=1e-4)
    rows, labels = logits_of(batch.labeled[1], trials.prototypes[1]), state.scratch["labels"][1, 2].tolist()
    each = []
    for i, label in [(0, labels[0]), (1, labels[1]), (2, labels[2]), (3, labels[0]), (4, labels[1])]:
        wrong = 1 - softmax(rows[i])[label]
        each.append(cross_entropy(rows[i], label) - 0.3 * wrong * math.log(1e-4))
    assert result[1].item() == pytest.approx(mean(each), rel=1e-4)


def test_mixed_images_lie_between_two_present_ones_and_so_do_their_targets(world):
    trials, method, state, batch = bagged(world, mixup=2)
    present = batch.present.flatten(1)
    targets = torch.eye(G * M).repeat(2, 1, 1)
    seen = []
    for step in range(40):
        state.scratch["step"] = torch.full((2,), step)
        rows, weights = method._mixed(trials, state, batch.labeled, targets, present)
        # an identity as targets shows which images were mixed and by which weight
        wanted = torch.nn.functional.normalize(weights @ batch.labeled, dim=-1)
        torch.testing.assert_close(rows, wanted)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, G * M))
        seen.append(weights)
    partners = torch.stack(seen) - torch.diag_embed(torch.stack(seen).diagonal(dim1=-2, dim2=-1))
    assert (partners.sum((0, 1, 2)) > 0).tolist() == present[0].tolist()
    kept = torch.stack(seen).diagonal(dim1=-2, dim2=-1)
    assert 0.4 < kept[kept < 1].mean() < 0.6


def test_labels_are_drawn_for_the_trials_in_stage_two(world):
    trials, method, state, _ = world(method="proportions", stage_one=0.5, steps=10)
    bags = Bags(("a", "b"), (np.arange(4), np.arange(4, 6)), np.array([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]))
    features = torch.nn.functional.normalize(torch.randn(6, D), dim=-1)
    device = DeviceFeatures(features, torch.zeros(0, 1, D), 1, torch.full((6,), -1))
    none = torch.zeros(2, 0, dtype=torch.int64)
    pool = Pool(device, none, none, none, none)
    padded = PaddedBags.pad([bags, bags], torch.device("cpu"))
    trials = dataclasses.replace(trials, inputs=Inputs(per_trial={"bags": padded}))
    trials.values["stage_one"] = torch.tensor([0.5, 0.9])
    method.refresh(trials, state, pool, 4)
    assert (state.scratch["late"].tolist(), state.scratch["labels"].sum().item()) == ([False, False], 0)
    method.refresh(trials, state, pool, 5)
    assert state.scratch["late"].tolist() == [True, False]
    labels = state.scratch["labels"][0].tolist()
    assert sorted(labels[0]) == [1, 1, 2, 2]
    assert labels[1][:2] == [0, 0]


def fitted(cache, quick, **values):
    common = {"method": "proportions", "bag_size": 8, "lr": 0.1, "steps": 60, "batch_labeled": 64, "n1": None}
    return fit(cache, quick(**common, **values), device="cpu", progress=False)


def with_bags(cache, config):
    """The split that the method trains on."""
    split = draw_split(cache.labels, cache.splits, cache.class_names, config)
    return method_of(config).prepare(cache, config, split)


def test_both_stages_learn_from_proportions_alone(quick):
    cache = make_clusters(classes=6, text_noise=1.5, noise=0.7)
    zero = fit(cache, quick(method="zero_shot", n1=None)).metrics["balanced_accuracy"]
    one, both = (fitted(cache, quick, stage_one=fraction).metrics["balanced_accuracy"] for fraction in (1.0, 0.6))
    assert min(one, both) > zero + 0.05


def test_no_label_is_read_beyond_the_proportions(quick):
    cache, config = make_clusters(), quick(method="proportions", bag_size=8, n1=None, steps=40, eval_every=10)
    split = with_bags(cache, config)
    blind = make_clusters()
    blind.labels[split.labeled] = (blind.labels[split.labeled] + 1) % 4
    seen, unseen = (fit(data, config, split=split, device="cpu") for data in (cache, blind))
    np.testing.assert_array_equal(seen.test_probabilities, unseen.test_probabilities)


def test_proportions_of_other_bags_hurt(quick):
    cache = make_clusters(classes=6, text_noise=1.5, noise=0.7)
    config = quick(method="proportions", lr=0.1, steps=60, batch_labeled=64, n1=None)
    split = draw_split(cache.labels, cache.splits, cache.class_names, config)
    bags = draw_bags(split.labeled, cache.labels[split.labeled], 8, 6, seed=0)
    wrong = replace(bags, proportions=np.roll(bags.proportions, 1, axis=0))
    right, shuffled = (
        fit(cache, config, split=replace(split, extra={"bags": own.to_list(cache.ids)})).metrics["balanced_accuracy"]
        for own in (bags, wrong)
    )
    assert right > shuffled + 0.1


def test_a_trial_alone_and_among_others_gives_the_same_to_the_bit(clusters, quick):
    common = {"method": "proportions", "steps": 30, "eval_every": 10, "n1": None}
    configs = [
        quick(**common, bag_size=size, seed=seed, stage_one=fraction, label_noise=noise)
        for size, seed, fraction, noise in [(8, 0, 0.6, 0.0), (5, 3, 0.3, 0.0), (8, 7, 0.3, 0.2)]
    ]
    together = fit_many(clusters, configs, device="cpu", progress=False)
    for run, config in zip(together, configs, strict=True):
        alone = fit(clusters, config, device="cpu", progress=False)
        assert torch.equal(run.tensors["linear"], alone.tensors["linear"])


def test_a_mini_batch_is_whole_bags_of_the_trials_own_images(clusters, quick):
    configs = [
        quick(method="proportions", bag_size=7, batch_labeled=32, n1=20, seed=seed, eval_every=10) for seed in (0, 1)
    ]
    splits = [with_bags(clusters, config) for config in configs]
    inputs = trial_inputs(clusters, DeviceFeatures.load(clusters, torch.device("cpu")), configs, splits)
    for _, batch in method_of(configs[0]).batches(inputs.batches(pairs=False)).draw(0, 3):
        assert batch.labeled.shape == (2, 4 * 7, 16)
        assert (batch.labels == -1).all()
        for t, split in enumerate(splits):
            bags = Bags.from_list(split.extra["bags"], clusters.row_of)
            for g, position in enumerate(batch.bag_positions[t].tolist()):
                rows = bags.members[position]
                assert batch.present[t, g].sum() == len(rows)
                np.testing.assert_allclose(batch.proportions[t, g], bags.proportions[position], rtol=1e-6)
                views = inputs.features.all_views(torch.from_numpy(rows))[:, :2]  # plain and weak
                own = batch.labeled[t].unflatten(0, (4, 7))[g, : len(rows)]
                assert ((own.unsqueeze(1) - views).abs().amax(-1).amin(1) < 1e-6).all()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "learns from bags and has none; give --bags and --proportions, or set bag_size"),
        ({"bag_size": -1}, "bag_size must be at least 0, got -1"),
        (
            {"bag_size": 4, "eval_every": 40},
            "none of every 40 steps comes between stage_one 0.6 and step 40; lower eval",
        ),
        ({"stage_one": 1.5}, "stage_one must be at most 1, got 1.5"),
        ({"bag_size": 4, "adapter": "adaptformer"}, "which this cache does not hold|takes no adapter"),
    ],
)
def test_what_is_missing_is_said(clusters, quick, values, words):
    with pytest.raises(InputError, match=words):
        fit(clusters, quick(method="proportions", **values))


def test_a_cache_without_texts_is_refused(quick):
    with pytest.raises(InputError, match="starts from texts of the classes, which this cache does not hold"):
        fit(make_clusters(text=False), quick(method="proportions", bag_size=4))


def test_ulfine_may_transport_its_pseudo_labels(world):
    trials, method, state, batch = world(method="ulfine", pseudo_labels="sinkhorn", threshold=0.4, sharpen=0.7)
    state.memory["prior"] = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]])
    pseudo = method.losses(trials, state, batch).pseudo
    logits = method.pseudo_logits(trials, state.tensors, batch.weak) / 0.7
    # P moves by what the model says, not by what P makes of it
    torch.testing.assert_close(pseudo.probabilities, torch.softmax(logits, -1))
    plan = pseudo.probabilities.detach().double()
    for _ in range(300):
        plan = plan * (8 * state.memory["prior"].double().unsqueeze(1) / plan.sum(1, keepdim=True))
        plan = plan / plan.sum(-1, keepdim=True)
    assert torch.equal(pseudo.labels, plan.argmax(-1))
    assert torch.equal(pseudo.mask, (plan.amax(-1) >= 0.4).float())
    assert 0 < pseudo.mask.mean() < 1


def test_ulfine_has_its_quick_step_for_its_own_pseudo_labels_alone(world, clusters, quick):
    for kind, quickly in (("argmax", True), ("sinkhorn", False)):
        trials, method, state, _ = world(method="ulfine", pseudo_labels=kind)
        assert (method.fused(trials, state) is not None) == quickly
    values = {"method": "ulfine", "steps": 30, "threshold": 0.3, "warmup": 0.1}
    plain, other = (fit(clusters, quick(**values, pseudo_labels=kind)) for kind in ("argmax", "sinkhorn"))
    assert not torch.equal(plain.tensors["linear"], other.tensors["linear"])
    assert FitConfig(method="ulfine").pseudo_labels == "argmax"
    configs = [quick(**values, pseudo_labels="sinkhorn", seed=seed) for seed in (5, 0)]
    among = fit_many(clusters, configs, device="cpu", progress=False)[1]
    assert torch.equal(among.tensors["linear"], other.tensors["linear"])
