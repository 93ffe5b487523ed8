"""The fused step against the specification: the same mini-batches through autograd, in float64, to the last digits."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch

import ulfine_fast.core.fused.blocks
import ulfine_fast.core.fused.step
from tests.conftest import make_clusters
from ulfine_fast import fit_many
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig, per_trial_options, readable
from ulfine_fast.core.batches import BatchSource, PaddedRows
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.types import State, Trials
from ulfine_fast.data.splits import draw_split, labeled_counts
from ulfine_fast.engine.steps import AutogradSteps, make_stepper
from ulfine_fast.methods import registry
from ulfine_fast.methods.registry import method_of
from ulfine_fast.ops.prototypes import normalize

STEPS = 12


@pytest.fixture(scope="module")
def cache():
    return make_clusters(classes=5, dim=12)


def configs_of(**values):
    """Three trials that differ in everything the fused step reads of a trial."""
    per_trial = {
        "lr": (0.05, 0.1, 0.2),
        "momentum": (0.9, 0.5, 0.0),
        "weight_decay": (0.0, 5e-4, 0.1),
        "warmup": (0.0, 0.5, 1.0),
        "threshold": (0.3, 0.9, 0.5),
        "scale": (5.0, 20.0, 10.0),
        "tau": (0.0, 1.0, 2.0),
        "tau_u": (2.0, 0.0, 1.0),
        "adapter_scale": (0.5, 0.0, 0.1),
        "paf": (True, False, True),
        "dlf": (True, True, False),
        "adjust_similarity": (False, True, True),
        "mu": (0.5, 0.01, 1.0),
        "n1": (30, 20, 25),
    }
    rows = [dict(zip(per_trial, row, strict=True)) for row in zip(*per_trial.values(), strict=True)]
    rows = [readable(values["method"], row) for row in rows]
    common = {"gamma_l": 10, "gamma_u": 10, "steps": STEPS, "rank": 3, "batch_labeled": 7, "batch_unlabeled": 9}
    return [FitConfig(**{**common, **row, "seed": seed, **values}) for seed, row in enumerate(rows)]


def double_trials(cache, configs, splits):
    names = per_trial_options(configs[0])
    values = {name: torch.tensor([float(getattr(c, name)) for c in configs]).double() for name in names}
    counts = np.stack([labeled_counts(cache.labels, split, len(cache.class_names)) for split in splits])
    log_prior = torch.log(torch.from_numpy(counts / counts.sum(1, keepdims=True)).double().clamp(min=1e-8))
    text = normalize(torch.from_numpy(np.asarray(cache.prototypes)).double()).repeat(len(configs), 1, 1)
    return Trials(configs[0], values, torch.tensor([c.seed for c in configs]), text, log_prior)


def doubled(tensors):
    return {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}


def started(cache, configs, engine):
    """State, velocity and a stepper in float64."""
    splits = [draw_split(cache.labels, cache.splits, cache.class_names, config) for config in configs]
    trials, method = double_trials(cache, configs, splits), method_of(configs[0])
    features = DeviceFeatures.load(cache, torch.device("cpu"))
    features = dataclasses.replace(features, views=normalize(features.views.double()))
    labeled = PaddedRows.pad([split.labeled for split in splits], torch.device("cpu"))
    source = BatchSource(
        labels=torch.from_numpy(cache.labels)[labeled.index],
        labeled=labeled,
        unlabeled=PaddedRows.pad([split.unlabeled for split in splits], torch.device("cpu")),
        trials=trials,
        features=features,
        config=configs[0],
        pairs=method.uses_unlabeled,
    )
    initial = method.start(trials)
    state = State(doubled(initial.parameters), doubled(initial.memory))
    velocity = {name: torch.zeros_like(value) for name, value in state.parameters.items()}
    stepper = make_stepper(method, trials, state, velocity, source, STEPS, engine)
    assert isinstance(stepper, AutogradSteps) == (engine == "specification")
    return state, velocity, stepper


def trained(cache, configs, engine):
    """State, velocity and summed losses after STEPS float64 steps by an engine."""
    state, velocity, stepper = started(cache, configs, engine)
    losses = sum(stepper.run(0, 5)) + sum(stepper.run(5, STEPS))
    return {name: value.detach() for name, value in state.tensors.items()}, velocity, losses


def compare(cache, configs):
    slow, fast = trained(cache, configs, "specification"), trained(cache, configs, "fused")
    for name, wanted in slow[0].items():
        torch.testing.assert_close(fast[0][name], wanted, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for name, wanted in slow[1].items():
        torch.testing.assert_close(fast[1][name], wanted, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    # the specification returns its losses as float32
    torch.testing.assert_close(fast[2].float(), slow[2], rtol=1e-5, atol=1e-5)
    assert fast[2].abs().sum() > 0


@pytest.mark.parametrize(
    "values",
    [
        {"method": "linear_probe"},
        {"method": "lightweight"},
        {"method": "lightweight", "adapter": "none"},
        {"method": "ulfine"},
        {"method": "ulfine", "adapter": "none"},
        {"method": "ulfine", "align": "max-ratio", "prior": "hard", "alpha": "constant"},
        {"method": "ulfine", "align": "none", "sharpen": 0.5, "momentum": 0.9, "paf": True},
        {"method": "ulfine", "feature_noise": 0.2},
        {"method": "ulfine", "lambda_o": 10.0},
        {"method": "ulfine", "threshold": 1.0},
        {"method": "ulfine", "threshold": 0.0},
        {"method": "ulfine", "lambda_u": 0.0},
    ],
    ids=lambda values: ",".join(str(value) for value in values.values()),
)
def test_the_fused_step_is_the_specification(cache, values):
    compare(cache, configs_of(**values))


@pytest.mark.parametrize("method", registry.names())
def test_a_method_with_a_fused_step_has_the_losses_of_that_step(cache, method):
    # a method that inherits a step and changes the losses would train something else without a word
    configs = configs_of(method=method)
    splits = [draw_split(cache.labels, cache.splits, cache.class_names, config) for config in configs]
    trials, named = double_trials(cache, configs, splits), method_of(configs[0])
    if named.fused(trials, named.start(trials)) is None:
        assert method not in ("linear_probe", "lightweight", "ulfine")
    else:
        compare(cache, configs)


def test_rows_without_a_pseudo_label_may_be_left_out(cache, monkeypatch):
    monkeypatch.setattr(ulfine_fast.core.fused.step, "_WORTH_SKIPPING", 0.0)
    compare(cache, configs_of(method="ulfine"))
    compare(cache, configs_of(method="ulfine", threshold=1.0))
    compare(cache, configs_of(method="lightweight", threshold=0.0))


def test_blocks_of_trials_change_nothing(cache, monkeypatch):
    monkeypatch.setattr(ulfine_fast.core.fused.blocks, "_BLOCK_VALUES", 3000)
    configs = configs_of(method="ulfine") + configs_of(method="ulfine", split_seed=7)
    splits = [draw_split(cache.labels, cache.splits, cache.class_names, config) for config in configs]
    assert len({len(split.unlabeled) for split in splits}) > 1  # padded rows in some blocks
    compare(cache, configs)


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_cores_change_nothing(cache, cores, monkeypatch):
    monkeypatch.setattr(ulfine_fast.core.fused.blocks, "_CORE_VALUES", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        compare(cache, configs_of(method="ulfine") + configs_of(method="ulfine", split_seed=7))
    finally:
        torch.set_num_threads(before)


def test_several_classes_from_one_to_many():
    for classes, dim in ((1, 8), (2, 5), (11, 16)):
        small = make_clusters(classes=classes, dim=dim, train=40)
        compare(small, configs_of(method="ulfine"))


def test_parameters_and_velocities_are_views_of_one_buffer_each(cache):
    state, velocity, _ = trained(cache, configs_of(method="ulfine"), "fused")
    learned = [state[name] for name in velocity]
    assert len({tensor.untyped_storage().data_ptr() for tensor in learned}) == 1
    assert len({tensor.untyped_storage().data_ptr() for tensor in velocity.values()}) == 1


@pytest.mark.parametrize("method", ["linear_probe", "lightweight", "ulfine"])
def test_a_stepper_is_freed_without_the_garbage_collector(cache, method):
    # on a GPU a reference cycle would keep buffers, graph and memory pool of every stepper that was replaced
    _, _, stepper = started(cache, configs_of(method=method), "fused")
    for _ in stepper.run(0, 5):
        pass
    blocks = [weakref.ref(block) for queue in stepper.queues for _, block in queue]
    buffers = weakref.ref(stepper.queues[0][0][1].buffers)
    gc.disable()
    try:
        del stepper
        assert blocks
        assert [block() for block in blocks] == [None] * len(blocks)
        assert buffers() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("method", ["linear_probe", "lightweight", "ulfine"])
def test_a_whole_fit_predicts_the_same_by_both_engines(clusters, quick, method):
    configs = [quick(method=method, seed=seed) for seed in range(3)]
    fast = fit_many(clusters, configs, engine="fused")
    slow = fit_many(clusters, configs, engine="specification")
    for a, b in zip(fast, slow, strict=True):
        np.testing.assert_allclose(a.test_probabilities, b.test_probabilities, atol=2e-3)
        assert a.history[-1]["loss"] == pytest.approx(b.history[-1]["loss"], rel=1e-3)


def test_a_method_without_a_fused_step_says_so(clusters, quick):
    with pytest.raises(InputError, match="method acr at precision float32 has no fused step; use engine auto"):
        fit_many(clusters, [quick(method="acr")], engine="fused")
    with pytest.raises(InputError, match="method ulfine at precision amp has no fused step"):
        fit_many(clusters, [quick(method="ulfine", precision="amp")], engine="fused")
    with pytest.raises(InputError, match="method ulfine at precision float32 has no fused step"):
        fit_many(clusters, [quick(method="ulfine", orthogonality="features")], engine="fused")
