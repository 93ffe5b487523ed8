"""What `benchmarks.speed.trials` compares: plain loop, compiled, vmapped; the engine's specification and fused path.

All of them train on the same cache and split, and start from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.eager import EagerTrial, Images, Tensors, Views, VmapTrials
from benchmarks.speed.floor import Shape
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import FitConfig
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.types import State, Trials
from ulfine_fast.data.splits import Split, draw_split
from ulfine_fast.engine.inputs import Given
from ulfine_fast.engine.steps import Steps, make_stepper
from ulfine_fast.methods.registry import method_of

CONTENDERS = ("eager", "compiled", "vmap", "specification", "fused")
ALONE = ("eager", "compiled")
"""Those that train one trial after another, so that their rate is the same for any number of trials."""

# so long a schedule that its end is never met
_STEPS = 10**6


def new_cache(shape: Shape, seed: int = 0) -> FeatureCache:
    """Clusters of K classes with one weak and two strong views, some 4,000 images; the text knows them badly."""
    random = np.random.default_rng(seed)
    each = max(8, 4000 // shape.classes)
    labels = np.repeat(np.arange(shape.classes), each)

    def blur(rows: np.ndarray, length: float) -> np.ndarray:
        noisy = rows + random.normal(size=rows.shape, scale=length / shape.dim**0.5)
        return (noisy / np.linalg.norm(noisy, axis=-1, keepdims=True)).astype(np.float32)

    means = blur(random.normal(size=(shape.classes, shape.dim)), 0.0)
    plain = blur(means[labels], 0.8)
    weak, strong = (blur(np.repeat(plain[:, None], views, 1), length) for views, length in ((1, 0.2), (2, 0.5)))
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
    each = len(cache.labels) // shape.classes
    return FitConfig(
        seed=seed,
        split_seed=0,
        n1=each // 2,
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
class Field:
    """Where all contenders train.

    Attributes:
        shape: sizes of the step. cache: the features. split: of all trials. device: where they train.
    """

    shape: Shape
    cache: FeatureCache
    split: Split
    device: torch.device

    @classmethod
    def of(cls, shape: Shape, device: torch.device) -> Field:
        """The shape's cache and split."""
        cache = new_cache(shape)
        split = draw_split(cache.labels, cache.splits, cache.class_names, config_of(shape, cache))
        return cls(shape, cache, split, device)

    def configs(self, trials: int) -> list[FitConfig]:
        """T trials, which differ in their seed."""
        return [config_of(self.shape, self.cache, seed) for seed in range(trials)]

    def given(self, configs: Sequence[FitConfig]) -> Given:
        """What the engine hands to a method, and draws its mini-batches from."""
        features = DeviceFeatures.load(self.cache, self.device)
        return Given.of(self.cache, features, configs, [self.split] * len(configs))

    def images(self) -> Images:
        """The same features as the plain loop keeps them."""
        return images_of(self.cache, self.split, self.device)


def images_of(cache: FeatureCache, split: Split, device: torch.device) -> Images:
    """A split's training images in memory, unit float32 rows."""
    views = {"weak": cache.views("weak"), "strong": cache.views("strong")}
    place = np.searchsorted(cache.view_rows, np.arange(len(cache)))

    def unit(rows: np.ndarray, kinds: Sequence[str]) -> Tensor:
        parts = [cache.plain[rows][:, None] if kind == "plain" else views[kind][place[rows]] for kind in kinds]
        stacked = torch.from_numpy(np.concatenate(parts, 1)).to(device).float()
        return F.normalize(stacked.flatten(0, 1), dim=-1)

    labels = torch.from_numpy(cache.labels[split.labeled]).to(device)
    counts, easy = (1 + views["weak"].shape[1], views["strong"].shape[1]), ("plain", "weak")
    hidden = split.unlabeled
    return Images(unit(split.labeled, easy), labels, unit(hidden, easy), unit(hidden, ("strong",)), counts)


def plain_parameters(state: State) -> Tensors:
    """The engine's first weights as the plain loop names them, each with a leading axis T."""
    own = state.parameters
    heads = torch.cat([own["linear"], own["prototypes"]], dim=1)  # (T, 2K, D)
    return {"heads": heads, **{name: own[f"adapter.{name}"].clone() for name in ("scale", "shift", "down", "up")}}


Work = Callable[[int], None]
"""Makes so many more steps of all its trials."""


def contender(name: str, field: Field, trials: int) -> tuple[Work, int]:
    """The work of a contender, and how many trials it trains at once."""
    if name in ALONE:
        return _alone(field, None if name == "eager" else "inductor"), 1
    given = field.given(field.configs(trials))
    method = method_of(given.trials.config)
    state = method.start(given.trials)
    # from the same weights as the engine's own, which draws the adapter from each trial's seed
    if name == "vmap":
        return _vmapped(field, given.trials, state), trials
    velocity = {key: torch.zeros_like(tensor) for key, tensor in state.parameters.items()}
    batches = given.batches(pairs=True)
    return _engine(make_stepper(method, given.trials, state, velocity, batches, _STEPS, name)), trials


def _alone(field: Field, backend: str | None) -> Work:
    trials = field.given(field.configs(1)).trials
    first = plain_parameters(method_of(trials.config).start(trials))
    parameters = {name: tensor[0].clone() for name, tensor in first.items()}
    trial = EagerTrial(trials.config, parameters, trials.log_prior[0], backend=backend)
    images, sizes = field.images(), (field.shape.labeled, field.shape.unlabeled)

    def work(steps: int) -> None:
        for _ in range(steps):
            trial.step(images.draw(*sizes))

    return work


def _vmapped(field: Field, given: Trials, state: State) -> Work:
    trials = VmapTrials(given.config, plain_parameters(state), given.log_prior[0])
    images, count = field.images(), len(given.seeds)

    def work(steps: int) -> None:
        for _ in range(steps):
            drawn = images.draw(count * field.shape.labeled, count * field.shape.unlabeled)
            trials.step(Views(*(tensor.unflatten(0, (count, -1)) for tensor in drawn)))

    return work


def _engine(stepper: Steps) -> Work:
    done = 0

    def work(steps: int) -> None:
        nonlocal done
        for _ in stepper.run(done, done + steps):
            pass
        done += steps

    return work
