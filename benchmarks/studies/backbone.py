"""FixMatch through an image tower: the losses of cached features, with gradients into the tower's weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from benchmarks.pixels import WEAK
from ulfine_fast.cache.pipeline.views import ViewRecipe, draw
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import FitConfig, per_trial_options
from ulfine_fast.core.batches import PaddedRows
from ulfine_fast.core.types import Batch, State, Trials
from ulfine_fast.data.splits import Split, labeled_counts
from ulfine_fast.methods.lightweight import Lightweight
from ulfine_fast.ops.philox import Purpose, integers
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.ops.sgd import cosine_rate

Rows = NDArray[np.int64]

WAYS = ("fft", "lft", "lp", "scratch")
"""Full fine-tuning, norm tuning, frozen tower with a trained head, and full training from random weights."""

_BLOCK = 64
_LOSSES = Lightweight()


@dataclass(frozen=True)
class World:
    """Images and the tower that encodes them.

    Attributes:
        image: row number -> RGB image.
        ids: of the images (n,).
        labels: class of each row (n,).
        splits: "train" or "test" (n,).
        class_names: (K,).
        text: textual features of the classes (K, P, D).
        prototypes: their unit means (K, D).
        tower: pixels (B, 3, size, size) to features (B, D); never changed.
        plain: image -> (3, size, size), the evaluation view.
        mean: of the tower's normalisation, per channel.
        std: of the tower's normalisation, per channel.
        size: side of the square input in pixels.
    """

    image: Callable[[int], Image.Image]
    ids: list[str]
    labels: Rows
    splits: NDArray[np.str_]
    class_names: list[str]
    text: NDArray[np.float32]
    prototypes: NDArray[np.float32]
    tower: nn.Module
    plain: Callable[[Image.Image], Tensor]
    mean: Sequence[float]
    std: Sequence[float]
    size: int

    def plain_pixels(self, rows: Rows) -> Tensor:
        """Evaluation views (n, 3, size, size)."""
        return torch.stack([self.plain(self.image(row)) for row in rows.tolist()])

    def views(self, rows: Rows, recipe: ViewRecipe) -> Tensor:
        """Augmented views (n, V, 3, size, size), weak ones first, the same for the same rows and recipe."""
        drawn = [draw(self.image(row), self.ids[row], recipe, image_size=self.size).pixels for row in rows.tolist()]
        pixels = torch.from_numpy(np.stack(drawn)).permute(0, 1, 4, 2, 3).float()  # (n, V, 3, size, size)
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return pixels.div_(255.0).sub_(mean).div_(std)


@dataclass
class Model:
    """A tower and the head on it.

    Attributes:
        tower: pixels to features.
        state: the head "linear" (1, K, D).
        trials: what the losses read of the one trial.
    """

    tower: nn.Module
    state: State
    trials: Trials

    def features(self, pixels: Tensor) -> Tensor:
        """Unit features (1, B, D) of pixels (B, 3, H, W)."""
        # channels last, for which the convolutions of a CPU are written
        return normalize(self.tower(pixels.contiguous(memory_format=torch.channels_last))).unsqueeze(0)

    def trained(self) -> list[Tensor]:
        """The weights that get gradients, head included."""
        weights: list[Tensor] = [weight for weight in self.tower.parameters() if weight.requires_grad]
        return [*weights, self.state.parameters["linear"]]

    @torch.no_grad()
    def logits(self, world: World, rows: Rows) -> NDArray[np.float32]:
        """Logits (n, K) of plain views."""
        training = self.tower.training
        self.tower.eval()
        blocks = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
        features = torch.cat([self.features(world.plain_pixels(block)) for block in blocks], dim=1)  # (1, n, D)
        self.tower.train(training)
        logits = _LOSSES.logits(self.trials, self.state.tensors, features)[0]  # (n, K)
        # a run that diverged must end as a bad row of the table, not as an error
        return np.asarray(logits.nan_to_num(0.0, 0.0, 0.0).numpy())


def new_model(way: str, world: World, split: Split, config: FitConfig) -> Model:
    """The model before its first step.

    Args:
        way: one of `WAYS`. "lft" trains scale and shift of all norm layers, as BitFit (arXiv 2106.10199) and BN tuning
            (arXiv 2003.00152) do, with frozen running statistics; "fft" and "scratch" train every weight and let norm
            layers use the batch's statistics.
        world: images and tower.
        split: its labelled rows give the prior of the logit adjustment.
        config: seed and hyper-parameters of the losses; the adapter must be "none".
    """
    torch.manual_seed(config.seed)
    trains_all = way in ("fft", "scratch")
    tower = copy.deepcopy(world.tower).requires_grad_(trains_all).train(trains_all)
    head = torch.from_numpy(world.prototypes).float().unsqueeze(0)  # (1, K, D)
    if way == "scratch":
        forget(tower)
        head = normalize(torch.randn_like(head))
    if way == "lft":
        for weight in norm_weights(tower):
            weight.requires_grad_(True)
    counts = labeled_counts(world.labels, split, len(world.class_names))
    state = State({"linear": head.clone().requires_grad_(True)})
    return Model(tower.to(memory_format=torch.channels_last), state, one_trial(config, head, counts))


def forget(tower: nn.Module) -> None:
    """Reset every layer to random weights, and every norm to its first statistics."""
    for module in tower.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


def norm_weights(tower: nn.Module) -> list[nn.Parameter]:
    """Scale and shift of every batch and layer norm."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    norms = (module for module in tower.modules() if isinstance(module, kinds))
    return [weight for norm in norms for weight in norm.parameters(recurse=False)]


def one_trial(config: FitConfig, prototypes: Tensor, counts: Rows) -> Trials:
    """What a method's losses read, for one trial with prototypes (1, K, D) and labelled counts (K,)."""
    values = {name: torch.tensor([float(getattr(config, name))]) for name in per_trial_options(config)}
    frequency = torch.from_numpy(counts / counts.sum()).float().unsqueeze(0)  # (1, K)
    return Trials(
        config=config,
        values=values,
        seeds=torch.tensor([config.seed]),
        prototypes=prototypes,
        log_prior=torch.log(frequency.clamp(min=1e-8)),
    )


def drawn(rows: Rows, config: FitConfig, size: int, purposes: tuple[Purpose, Purpose]) -> tuple[Tensor, Tensor]:
    """Rows of every mini-batch and the view of each (S, size), as the engine for cached features draws them."""
    seeds = torch.tensor([config.seed])
    steps = torch.arange(config.steps)
    index, _ = PaddedRows.pad([rows], torch.device("cpu")).draw(seeds, steps, purposes[0], size)  # (S, 1, size)
    view = integers(seeds, steps, purposes[1], size, torch.tensor([1 + WEAK]))  # (S, 1, size)
    return index[:, 0], view[:, 0]


def batches(world: World, split: Split, config: FitConfig) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The mini-batches of a trial: the images that it would get from a cache, with views drawn anew each time.

    An easy view is the plain one as often as each of the weak ones that a cache has.

    Yields:
        Easy views of labelled images (B, 3, H, W), their labels (1, B), easy and strong views of unlabelled ones
        (U, 3, H, W).
    """
    labeled, easy = drawn(split.labeled, config, config.batch_labeled, (Purpose.LABELED, Purpose.LABELED_VIEW))
    unlabeled, weak = drawn(split.unlabeled, config, config.batch_unlabeled, (Purpose.UNLABELED, Purpose.WEAK_VIEW))
    for step in range(config.steps):
        labeled_rows = labeled[step].numpy()
        labeled_views = views(world, labeled_rows, easy[step] == 0, recipe_of(config.seed, step, strong=0))
        pairs = views(world, unlabeled[step].numpy(), weak[step] == 0, recipe_of(config.seed, step, strong=1))
        labels = torch.from_numpy(world.labels[labeled_rows]).unsqueeze(0)
        yield labeled_views[:, 0], labels, pairs[:, 0], pairs[:, 1]


def views(world: World, rows: Rows, plain: Tensor, recipe: ViewRecipe) -> Tensor:
    """Augmented views (n, V, 3, H, W), the first of them the evaluation view where `plain` (n,) says so."""
    pixels = world.views(rows, recipe)
    if bool(plain.any()):
        pixels[plain, 0] = world.plain_pixels(rows[plain.numpy()])
    return pixels


def recipe_of(seed: int, step: int, strong: int) -> ViewRecipe:
    """One weak view and `strong` strong ones; a trial has 64 different views of an image, more than it draws."""
    # each recipe keeps its transforms in memory, so there is not one for every step
    return ViewRecipe(weak=1, strong=strong, seed=64 * seed + step % 64)


def train(model: Model, world: World, split: Split, config: FitConfig) -> float:
    """Run the config's steps; views are drawn as they are needed.

    Returns:
        Wall seconds, views included.
    """
    started = time.perf_counter()
    optimizer = torch.optim.SGD(
        model.trained(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    for step, batch in enumerate(batches(world, split, config)):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * cosine_rate(step, config.steps)
        ramp = min(1.0, (step + 1) / config.steps / max(config.warmup, 1e-9))
        optimizer.zero_grad()
        loss(model, *batch, ramp).backward()
        optimizer.step()
    return time.perf_counter() - started


def loss(model: Model, labeled: Tensor, labels: Tensor, weak: Tensor, strong: Tensor, ramp: float) -> Tensor:
    """FixMatch's loss (arXiv 2001.07685, equations 3 and 4) with a logit-adjusted labelled part, a scalar.

    Args:
        model: tower and head.
        labeled: easy views of labelled images (B, 3, H, W).
        labels: their classes (1, B).
        weak: of unlabelled images (U, 3, H, W), for pseudo-labels.
        strong: of the same (U, 3, H, W), to learn from.
        ramp: factor of the unlabelled part, 0..1.
    """
    with torch.no_grad():
        weak_features = model.features(weak)  # (1, U, D)
    # one forward pass, so that norm layers see labelled and strong images as one batch
    both = model.features(torch.cat([labeled, strong]))  # (1, B + U, D)
    batch = Batch(both[:, : len(labeled)], labels, weak_features, both[:, len(labeled) :])
    losses = _LOSSES.losses(model.trials, model.state, batch)
    return (losses.labeled + ramp * losses.unlabeled).sum()


def cache_of(world: World, split: Split, recipe: ViewRecipe) -> tuple[FeatureCache, Split, float]:
    """Features of a split's images through the untouched tower, in memory.

    Returns:
        The cache, the split in its row numbers, and the wall seconds that the training images took: plain view and
        augmented ones.
    """
    training = np.sort(np.concatenate([split.labeled, split.unlabeled, split.val]))
    started = time.perf_counter()
    views = encoded(world, training, recipe)  # (m, 1 + V, D)
    seconds = time.perf_counter() - started
    test_views = encoded(world, split.test, ViewRecipe(weak=0, strong=0))  # (E, 1, D)
    rows = np.concatenate([training, split.test])
    cache = FeatureCache.from_arrays(
        np.concatenate([views[:, 0], test_views[:, 0]]),
        world.labels[rows],
        class_names=world.class_names,
        text_features=world.text,
        weak=views[:, 1 : 1 + recipe.weak],
        strong=views[:, 1 + recipe.weak :],
        splits=world.splits[rows].tolist(),
        ids=[world.ids[row] for row in rows],
    )
    return cache, moved(split, rows), seconds


def moved(split: Split, rows: Rows) -> Split:
    """The split in positions among `rows`."""
    position = {int(row): i for i, row in enumerate(rows)}
    parts: dict[str, Any] = {
        role: np.array([position[int(row)] for row in getattr(split, role)], dtype=np.int64)
        for role in ("labeled", "unlabeled", "val", "test")
    }
    return replace(split, **parts)


@torch.inference_mode()
def encoded(world: World, rows: Rows, recipe: ViewRecipe) -> NDArray[np.float16]:
    """Unit features (n, 1 + V, D) of the plain view and those of the recipe, as a cache stores them."""
    tower = copy.deepcopy(world.tower).eval().to(memory_format=torch.channels_last)
    blocks = []
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        pixels = world.plain_pixels(block).unsqueeze(1)  # (b, 1, 3, H, W)
        if recipe.kinds:
            pixels = torch.cat([pixels, world.views(block, recipe)], dim=1)
        flat = pixels.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        # views of many images at once would leave the processor's cache
        features = torch.cat([tower(part) for part in flat.split(_BLOCK)])
        blocks.append(normalize(features).unflatten(0, pixels.shape[:2]))  # (b, 1 + V, D)
    return np.asarray(torch.cat(blocks).numpy().astype(np.float16))
