"""What `benchmarks.speed.trials` compares: plain loop, compiled, vmapped; the engine's specification and fused paths.

All of them train on the same cache and split, and start from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.eager import EagerTrial, Images, Tensors, Views, VmapTrials
from benchmarks.speed.floor import Shape
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import FitConfig
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.fused.arithmetic import Arithmetic
from ulfine_fast.core.types import State
from ulfine_fast.data.splits import Split, draw_split
from ulfine_fast.engine.inputs import TrialInputs, trial_inputs
from ulfine_fast.engine.steps import make_stepper
from ulfine_fast.methods.registry import method_of

CONTENDERS = (
    *("eager", "compiled", "vmap", "specification", "fused", "native"),
    *("eager_bf16", "fused_bf16", "native_bf16"),
)
"""Of `_bf16`, products round their inputs to bfloat16."""
ONE_TRIAL = ("eager", "compiled", "eager_bf16")
"""Those that train one trial after another, so that their rate is the same for any number of trials."""

# a schedule so long that its end is never reached
_STEPS = 10**6


def new_cache(shape: Shape, seed: int = 0, images_per_class: int | None = None) -> FeatureCache:
    """Clusters of K classes with one weak and two strong views, some 4,000 images; the texts know them badly."""
    random = np.random.default_rng(seed)
    images_per_class = images_per_class or max(8, 4000 // shape.classes)
    labels = np.repeat(np.arange(shape.classes), images_per_class)

    def blur(rows: np.ndarray, length: float) -> np.ndarray:
        noisy = rows + random.normal(size=rows.shape, scale=length / shape.dim**0.5)
        return (noisy / np.linalg.norm(noisy, axis=-1, keepdims=True)).astype(np.float32)

    means = blur(random.normal(size=(shape.classes, shape.dim)), 0.0)
    plain = blur(means[labels], 0.8)
    weak = blur(np.repeat(plain[:, None], 1, axis=1), 0.2)
    strong = blur(np.repeat(plain[:, None], 2, axis=1), 0.5)
    return FeatureCache.from_arrays(
        plain.astype(np.float16),
        labels,
        class_names=[str(k) for k in range(shape.classes)],
        text_features=blur(means, 0.5),
        weak=weak.astype(np.float16),
        strong=strong.astype(np.float16),
        splits=["train"] * len(labels),
    )


def config_of(shape: Shape, cache: FeatureCache, seed: int = 0) -> FitConfig:
    """A trial of the shape; all seeds share one split, half of the labels known."""
    images_per_class = len(cache.labels) // shape.classes
    return FitConfig(
        method="ulfine",
        seed=seed,
        split_seed=0,
        n1=images_per_class // 2,
        gamma_l=4,
        gamma_u=4,
        val_fraction=0.0,
        test_fraction=0.05,
        steps=_STEPS,
        warmup=0.0,
        rank=shape.rank,
        batch_labeled=shape.labeled,
        batch_unlabeled=shape.unlabeled,
    )


@dataclass(frozen=True)
class TrainingSet:
    """What all contenders train on.

    Attributes:
        shape: sizes of the step.
        cache: the features.
        split: of all trials.
        device: where they train.
    """

    shape: Shape
    cache: FeatureCache
    split: Split
    device: torch.device

    @classmethod
    def of_shape(cls, shape: Shape, device: torch.device) -> TrainingSet:
        """The shape's cache and split."""
        cache = new_cache(shape)
        split = draw_split(cache.labels, cache.splits, cache.class_names, config_of(shape, cache))
        return cls(shape, cache, split, device)

    def configs(self, trials: int, precision: str = "float32") -> list[FitConfig]:
        """T trials, which differ in their seed."""
        one = config_of(self.shape, self.cache)
        return [replace(one, precision=precision, seed=seed) for seed in range(trials)]

    def inputs(self, configs: Sequence[FitConfig]) -> TrialInputs:
        """What the engine gives to a method, and draws its mini-batches from."""
        features = DeviceFeatures.load(self.cache, self.device)
        return trial_inputs(self.cache, features, configs, [self.split] * len(configs))

    def images(self) -> Images:
        """The same features as the plain loop keeps them."""
        return images_of(self.cache, self.split, self.device)


def images_of(cache: FeatureCache, split: Split, device: torch.device) -> Images:
    """A split's training images in memory, unit float32 rows."""
    weak = cache.views("weak")
    strong = cache.views("strong")
    view_position = np.searchsorted(cache.view_rows, np.arange(len(cache)))

    def unit(views: Sequence[np.ndarray]) -> Tensor:
        stacked = torch.from_numpy(np.concatenate(views, axis=1)).to(device).float()  # (n, V, D)
        return F.normalize(stacked.flatten(0, 1), dim=-1)

    def easy(rows: np.ndarray) -> Tensor:
        return unit([cache.plain[rows][:, None], weak[view_position[rows]]])

    return Images(
        easy=easy(split.labeled),
        labels=torch.from_numpy(cache.labels[split.labeled]).to(device),
        weak=easy(split.unlabeled),
        strong=unit([strong[view_position[split.unlabeled]]]),
        easy_views=1 + weak.shape[1],
        strong_views=strong.shape[1],
    )


def plain_parameters(state: State) -> Tensors:
    """The engine's first weights as the plain loop names them, each with a leading axis T."""
    parameters = state.parameters
    heads = torch.cat([parameters["linear"], parameters["prototypes"]], dim=1)  # (T, 2K, D)
    adapter = {name: parameters[f"adapter.{name}"].clone() for name in ("scale", "shift", "down", "up")}
    return {"heads": heads, **adapter}


Work = Callable[[int], None]
"""Makes so many more steps of all its trials."""


def contender(name: str, training_set: TrainingSet, trials: int) -> tuple[Work, int]:
    """The work of a contender, and how many trials it trains together.

    All start from the same weights as the engine, which draws the adapter from each trial's seed.
    """
    engine, _, rounded = name.partition("_")
    if name in ONE_TRIAL:
        work = _one_trial(training_set, "inductor" if name == "compiled" else None)
        return (_rounding(work, training_set.device) if rounded else work), 1
    inputs = training_set.inputs(training_set.configs(trials, rounded or "float32"))
    state = method_of(inputs.trials.config).start(inputs.trials)
    if name == "vmap":
        return _vmapped(training_set, inputs, state), trials
    return _engine(engine, inputs, state), trials


def _rounding(work: Work, device: torch.device) -> Work:
    """The same work with products of bfloat16, as the processor has them."""

    def rounded(steps: int) -> None:
        with Arithmetic(bfloat16=True).applied(device):
            work(steps)

    return rounded


def _one_trial(training_set: TrainingSet, backend: str | None) -> Work:
    """One trial of the plain loop."""
    trials = training_set.inputs(training_set.configs(1)).trials
    first = plain_parameters(method_of(trials.config).start(trials))
    parameters = {name: tensor[0].clone() for name, tensor in first.items()}
    trial = EagerTrial(trials.config, parameters, trials.log_prior[0], backend=backend)
    images = training_set.images()
    shape = training_set.shape

    def work(steps: int) -> None:
        for _ in range(steps):
            trial.step(images.draw(shape.labeled, shape.unlabeled))

    return work


def _vmapped(training_set: TrainingSet, inputs: TrialInputs, state: State) -> Work:
    """T trials of the plain loop's functions under vmap."""
    trials = VmapTrials(inputs.trials.config, plain_parameters(state), inputs.trials.log_prior[0])
    images = training_set.images()
    shape = training_set.shape
    count = len(inputs.trials.seeds)

    def work(steps: int) -> None:
        for _ in range(steps):
            batch = images.draw(count * shape.labeled, count * shape.unlabeled)
            trials.step(Views(*(tensor.unflatten(0, (count, -1)) for tensor in batch)))

    return work


def _engine(name: str, inputs: TrialInputs, state: State) -> Work:
    """T trials of the engine, fused or by its specification."""
    method = method_of(inputs.trials.config)
    velocity = {key: torch.zeros_like(tensor) for key, tensor in state.parameters.items()}
    stepper = make_stepper(method, inputs.trials, state, velocity, inputs.batches(pairs=True), _STEPS, name)
    done = 0

    def work(steps: int) -> None:
        nonlocal done
        for _ in stepper.run(done, done + steps):
            pass
        done += steps

    return work
