"""All contenders do the same work: the same batches give the same losses, step by step."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

from benchmarks.speed.eager import EagerTrial, Views, VmapTrials
from benchmarks.speed.floor import Shape
from benchmarks.speed.trial_steps import CONTENDERS, ONE_TRIAL, TrainingSet, contender, plain_parameters
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig
from ulfine_fast.core.types import State, Trials
from ulfine_fast.engine.steps import AutogradSteps, make_stepper
from ulfine_fast.methods.registry import method_of

TINY = Shape("tiny", 24, 7, 4, 9, 6)
CPU = torch.device("cpu")
STEPS, TRIALS = 6, 3
# a schedule of a few steps, in which the learning rate falls and the unlabelled loss rises
VALUES = {"steps": STEPS, "warmup": 0.5, "lr": 0.1, "mu": 0.3, "weight_decay": 0.01, "threshold": 0.6, "tau": 0.7}
VALUES |= {"scale": 6.0, "adapter_scale": 0.5, "eta": 0.3}


@pytest.fixture(scope="module")
def training_set():
    return TrainingSet.of_shape(TINY, CPU)


@dataclass
class World:
    """What the engine starts from in float64, and the batches it draws."""

    trials: Trials
    batches: list

    def state(self):
        state = method_of(self.trials.config).start(self.trials)
        return State(*({name: as_double(tensor) for name, tensor in part.items()} for part in vars(state).values()))

    def draw(self, start, stop):
        return ((step, self.batches[step]) for step in range(start, stop))

    def views(self):
        return [Views(batch.labeled, batch.labels, batch.weak, batch.strong) for batch in self.batches]


def as_double(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def in_double(batch):
    """Rows of length one to float64's rounding, which float32 rows are not; labels and absent parts as they are."""
    parts = {spec.name: getattr(batch, spec.name) for spec in fields(batch)}
    rows = {name: part for name, part in parts.items() if part is not None and part.is_floating_point()}
    return replace(batch, **{name: torch.nn.functional.normalize(part.double(), dim=-1) for name, part in rows.items()})


@pytest.fixture(scope="module")
def world(training_set):
    configs = [FitConfig(**{**config.to_dict(), **VALUES}) for config in training_set.configs(TRIALS)]
    inputs = training_set.inputs(configs)
    trials = inputs.trials
    batches = [in_double(batch) for _, batch in inputs.batches(pairs=True).draw(0, STEPS)]
    # 0.7 is not the same number in float32
    values = {
        name: torch.full_like(one, getattr(configs[0], name), dtype=torch.float64)
        for name, one in trials.values.items()
    }
    double = replace(trials, values=values, prototypes=trials.prototypes.double(), log_prior=trials.log_prior.double())
    return World(double, batches)


@pytest.fixture(scope="module")
def specified(world):
    """Losses (S, 3, T) and last parameters by the engine's specification."""
    state, method = world.state(), method_of(world.trials.config)
    velocity = {name: torch.zeros_like(tensor) for name, tensor in state.parameters.items()}
    stepper = AutogradSteps(method, world.trials, state, velocity, world, STEPS)
    return torch.stack(list(stepper.run(0, STEPS))), plain_parameters(state)


def compare(own_losses, parameters, losses, last):
    torch.testing.assert_close(own_losses.float(), losses, rtol=1e-5, atol=1e-7)
    for name, tensor in parameters.items():
        torch.testing.assert_close(tensor, last[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize(("backend", "optimizer"), [(None, "fused"), (None, "foreach"), ("eager", "fused")])
def test_the_plain_loop_follows_the_specification(world, specified, backend, optimizer):
    losses, last = specified
    for t in range(TRIALS):
        own = {name: tensor[t].clone() for name, tensor in plain_parameters(world.state()).items()}
        config, log_prior = world.trials.config, world.trials.log_prior[t]
        trial = EagerTrial(config, own, log_prior, backend=backend, optimizer=optimizer)
        own_losses = [trial.step(Views(*(tensor[t] for tensor in batch))) for batch in world.views()]
        compare(
            torch.stack(own_losses), trial.parameters, losses[:, :, t], {name: one[t] for name, one in last.items()}
        )


def test_vmap_follows_the_specification(world, specified):
    trials = VmapTrials(world.trials.config, plain_parameters(world.state()), world.trials.log_prior[0])
    own_losses = torch.stack([trials.step(batch) for batch in world.views()])
    compare(own_losses, trials.parameters, *specified)


def test_the_specified_losses_are_worth_comparing(world, specified):
    """Some pseudo-labels train and some do not, and the losses change from step to step."""
    losses, last = specified
    assert (losses[:, 1] > 0).all()
    assert (losses[:, 0].diff(dim=0).abs() > 1e-4).all()
    assert all((last[name] - first).abs().max() > 1e-4 for name, first in plain_parameters(world.state()).items())
    pseudo = method_of(world.trials.config).losses(world.trials, world.state(), world.batches[0]).pseudo
    assert 0 < pseudo.mask.mean() < 1


def test_the_fused_path_follows_the_specification(training_set):
    results = []
    for engine in ("fused", "specification"):
        inputs = training_set.inputs(training_set.configs(TRIALS))
        trials, method = inputs.trials, method_of(inputs.trials.config)
        state = method.start(trials)
        velocity = {name: torch.zeros_like(tensor) for name, tensor in state.parameters.items()}
        stepper = make_stepper(method, trials, state, velocity, inputs.batches(pairs=True), 50, engine)
        sums = sum(stepper.run(0, 5))
        results.append((sums, plain_parameters(state)["heads"].detach()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


def test_the_plain_loops_images_are_the_caches(training_set):
    images, cache = training_set.images(), training_set.cache
    torch.manual_seed(0)
    drawn = images.draw(500, 500)
    assert drawn.labeled.shape == (500, TINY.dim)
    rows, unlabeled = training_set.split.labeled, training_set.split.unlabeled
    easy = {tuple(np.round(row, 3)): label for label, row in zip(cache.labels, unit(cache.plain), strict=True)}
    weak = unit(cache.views("weak")[:, 0])
    easy |= {tuple(np.round(row, 3)): label for label, row in zip(cache.labels[cache.view_rows], weak, strict=True)}
    for row, label in zip(drawn.labeled.numpy(), drawn.labels.tolist(), strict=True):
        assert easy[tuple(np.round(row, 3))] == label
    # weak and strong rows are views of the same image, and of unlabelled ones alone
    assert len(images.easy) == 2 * len(rows)
    assert len(images.weak) == len(images.strong) == 2 * len(unlabeled)
    assert (drawn.weak * drawn.strong).sum(1).mean() > 0.8
    few = images.draw(2, 4 * len(unlabeled)).weak
    assert len(torch.unique(few, dim=0)) > len(unlabeled)


def unit(rows):
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("values", [{"method": "lightweight"}, {"align": "none"}, {"paf": False}])
def test_other_configs_are_refused(world, values):
    changed = world.trials.config.with_method(**{"method": "ulfine", **values})
    for made in (EagerTrial, VmapTrials):
        with pytest.raises(InputError, match=next(iter(values))):
            made(changed, plain_parameters(world.state()), world.trials.log_prior[0])


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name != "compiled"])
def test_every_contender_works(training_set, name):
    work, trials = contender(name, training_set, 2)
    work(1)
    work(2)
    assert trials == (1 if name in ONE_TRIAL else 2)
