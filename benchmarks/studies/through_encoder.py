"""LIFT's head trained twice on the same crops: over cached features, and through the frozen encoder in every step.

The encoder is a ViT of random weights, since no network is needed for it: this is about the computation, which must be
the same, and says nothing on accuracy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.data import FirstOfEachClass
from benchmarks.images import model_name
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.models.encoder import Encoder, load_encoder
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.views import ViewRecipe, draw
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import FitConfig
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.data.splits import draw_split
from ulfine_fast.demo import unpack_images
from ulfine_fast.engine.fit import fit
from ulfine_fast.engine.trial_batch import Pass
from ulfine_fast.ops.sgd import cosine_rate

Row = dict[str, Any]

_CROPS = ViewRecipe(weak=4, strong=0, weak_scale=(0.08, 1.0))
_IMAGES = {"train": 6, "test": 2}  # of each class
# a rate at which few steps go far
_CONFIG = FitConfig(
    method="lift_head", feature="pre-projection", steps=10, eval_every=10, batch_labeled=8, lr=0.2, crop_epochs=5
)


class Images:
    """Images and an encoder; views are drawn and encoded whenever they are asked for."""

    def __init__(self, source: FirstOfEachClass, model: str) -> None:
        """`model` as in `benchmarks.images.model_name`."""
        self.source, self.rows = source, {row.id: row for row in source.rows}
        self.encoder = load_encoder(model_name(model), device="cpu")
        self.encoder.model.visual.proj = None

    def feature(self, name: str, view: int) -> Tensor:
        """What the tower gives its classifier of a view, 0 for the evaluation view, at length 1 (W,)."""
        encoder, image = self.encoder, self.source.read(self.rows[name])
        with torch.no_grad():
            return normalize(encoder.model.visual(_pixels(encoder, image, name, view)[None])[0], dim=-1)


def _pixels(encoder: Encoder, image: Any, name: str, view: int) -> Tensor:
    """A view as the tower takes it (3, H, W)."""
    if view == 0:
        return encoder.transform(image)
    drawn = draw(image, name, _CROPS, image_size=encoder.spec.image_size)
    return encoder.normalise(torch.from_numpy(drawn.pixels[view - 1][None]))[0]


def both_ways(model: str, seeds: Iterable[int], folder: Path | None = None) -> Iterator[Row]:
    """For each seed the largest difference of test logits between both ways, and how far training moved them.

    Args:
        model: as in `benchmarks.images.model_name`.
        seeds: of split and mini-batches.
        folder: of images by split and class; None for those of the demo.
    """
    where = folder or unpack_images(cache_home() / "datasets" / "demo")
    source = FirstOfEachClass(open_source(where), _IMAGES)
    with tempfile.TemporaryDirectory() as space:
        cache, images = _extracted(source, model, Path(space) / "cache"), Images(source, model)
        test = np.flatnonzero(cache.splits == "test")
        seen = torch.stack([images.feature(cache.ids[row], 0) for row in test])  # (E, W)
        for seed in seeds:
            config = replace(_CONFIG, seed=seed)
            ours = fit(cache, config, device="cpu", progress=False).logits(cache.tokens("plain")[test])
            start, end = trained(cache, config, images.feature)
            before, after = ((config.scale * seen @ normalize(w, dim=-1).T).numpy() for w in (start, end))
            yield {
                "model": model,
                "seed": seed,
                "difference": _largest(ours - after),
                "moved": _largest(after - before),
            }


def _largest(values: Any) -> float:
    return float(np.abs(values).max())


def _extracted(source: FirstOfEachClass, model: str, folder: Path) -> FeatureCache:
    encoder = load_encoder(model_name(model), device="cpu", features="pre-projection")
    extract(source, encoder, folder, views=_CROPS, workers=0, progress=False)
    return FeatureCache.open(folder)


def trained(cache: FeatureCache, config: FitConfig, feature: Callable[[str, int], Tensor]) -> tuple[Tensor, Tensor]:
    """Heads (K, W) at the start and in the end, by autograd and torch's SGD, from images.

    Args:
        cache: tells which images and views the engine draws, and the texts; none of its features is read.
        config: the trial.
        feature: of an image's id and view, (W,).
    """
    texts, projection = torch.from_numpy(cache.prototypes), torch.from_numpy(cache.head["projection"])
    start = normalize(normalize(texts, dim=-1) @ projection.T, dim=-1)
    weights = start.clone().requires_grad_(True)
    sgd = torch.optim.SGD([weights], lr=1.0, momentum=config.momentum, weight_decay=config.weight_decay)
    for step, (images, labels, log_prior) in enumerate(drawn(cache, config)):
        rows = torch.stack([feature(*image) for image in images])  # (B, W)
        logits = config.scale * rows @ normalize(weights, dim=-1).T + config.tau * log_prior
        sgd.param_groups[0]["lr"] = config.lr * cosine_rate(step, config.steps)
        sgd.zero_grad()
        cross_entropy(logits, labels).backward()
        sgd.step()
    return start, weights.detach()


def drawn(cache: FeatureCache, config: FitConfig) -> Iterator[tuple[list[tuple[str, int]], Tensor, Tensor]]:
    """Of each step the ids and views that the engine draws, their labels (B,), and the log prior (K,)."""
    split = draw_split(cache.labels, cache.splits, cache.class_names, config)
    features = DeviceFeatures.load(cache, torch.device("cpu"), tokens=True)
    given = Pass(cache, features, [config], [split]).given
    for _, draws in given.batches(pairs=False).draws(0, config.steps):
        row, view = draws.labeled[0] // features.views.shape[1], draws.labeled[0] % features.views.shape[1]
        names = [cache.ids[number] for number in cache.view_rows[row]]
        yield list(zip(names, view.tolist(), strict=True)), draws.labels[0], given.trials.log_prior[0]
