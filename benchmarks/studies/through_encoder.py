"""LIFT's head trained twice on the same crops: over cached features, and through the frozen encoder in every step.

The encoder is a ViT of random weights, since no network is needed for it: this is about the computation, which must be
the same, and says nothing on accuracy. `benchmarks.studies.lift_head` prints it.
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

from benchmarks.data import FirstOfEachClass, demo_source, source_of
from benchmarks.images import model_name
from benchmarks.results import Row
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.views import ViewRecipe, draw
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import FitConfig
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.data.splits import draw_split
from ulfine_fast.engine.fit import fit
from ulfine_fast.engine.inputs import trial_inputs
from ulfine_fast.ops.sgd import cosine_rate

_CROPS = ViewRecipe(weak=4, strong=0, weak_scale=(0.08, 1.0))
_IMAGES = {"train": 6, "test": 2}  # of each class
# a learning rate at which few steps go far
_CONFIG = FitConfig.from_dict(
    {
        "method": "lift_head",
        "feature": "pre-projection",
        "steps": 10,
        "eval_every": 10,
        "batch_labeled": 8,
        "lr": 0.2,
        "crop_epochs": 5,
    }
)


class EncodedImages:
    """Images and an encoder; a view is drawn and encoded whenever it is asked for."""

    def __init__(self, source: FirstOfEachClass, model: str) -> None:
        """`model` as in `benchmarks.images.model_name`."""
        self.source = source
        self.rows = {row.id: row for row in source.rows}
        self.encoder = load_encoder(model_name(model), device="cpu")
        self.encoder.model.visual.proj = None

    def feature(self, image_id: str, view: int) -> Tensor:
        """The tower's feature of a view before its projection, at length 1 (W,); view 0 is the evaluation view."""
        image = self.source.read(self.rows[image_id])
        if view == 0:
            pixels = self.encoder.transform(image)
        else:
            views = draw(image, image_id, _CROPS, image_size=self.encoder.spec.image_size).pixels
            pixels = self.encoder.normalise(torch.from_numpy(views[view - 1][None]))[0]
        with torch.no_grad():
            return normalize(self.encoder.model.visual(pixels[None])[0], dim=-1)


def both_ways(model: str, seeds: Iterable[int], folder: Path | None = None) -> Iterator[Row]:
    """For each seed the largest difference of test logits between both ways, and how far training moved them.

    Args:
        model: as in `benchmarks.images.model_name`.
        seeds: of split and mini-batches.
        folder: of images by split and class; None for those of the demo.
    """
    source = FirstOfEachClass(demo_source() if folder is None else source_of(folder), _IMAGES)
    images = EncodedImages(source, model)
    with tempfile.TemporaryDirectory() as space:
        cache_folder = Path(space) / "cache"
        encoder = load_encoder(model_name(model), device="cpu", features="pre-projection")
        extract(source, encoder, cache_folder, views=_CROPS, workers=0, progress=False)
        cache = FeatureCache.open(cache_folder)

        test = np.flatnonzero(cache.splits == "test")
        test_features = torch.stack([images.feature(cache.ids[row], 0) for row in test])  # (E, W)
        for seed in seeds:
            config = replace(_CONFIG, seed=seed)
            cached = fit(cache, config, device="cpu", progress=False).logits(cache.tokens("plain")[test])
            start, end = trained_heads(cache, config, images.feature)
            before = (config.scale * test_features @ normalize(start, dim=-1).T).numpy()
            after = (config.scale * test_features @ normalize(end, dim=-1).T).numpy()
            yield {
                "model": model,
                "seed": seed,
                "difference": _largest(cached - after),
                "moved": _largest(after - before),
            }


def _largest(values: Any) -> float:
    return float(np.abs(values).max())


def trained_heads(
    cache: FeatureCache, config: FitConfig, feature_of: Callable[[str, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Heads (K, W) at the start and in the end, by autograd and torch's SGD, from images.

    Args:
        cache: says which images and views the engine draws, and has the texts; none of its features is read.
        config: the trial.
        feature_of: of an image's id and view, (W,).
    """
    # what the engine draws
    split = draw_split(cache.labels, cache.splits, cache.class_names, config)
    features = DeviceFeatures.load(cache, torch.device("cpu"), tokens=True)
    inputs = trial_inputs(cache, features, [config], [split])
    log_prior = inputs.trials.log_prior[0]  # (K,)
    views = features.views.shape[1]

    texts = torch.from_numpy(cache.prototypes)
    projection = torch.from_numpy(cache.head["projection"])
    start = normalize(normalize(texts, dim=-1) @ projection.T, dim=-1)
    weights = start.clone().requires_grad_(True)
    sgd = torch.optim.SGD([weights], lr=1.0, momentum=config.momentum, weight_decay=config.weight_decay)
    for step, draws in inputs.batches(pairs=False).draws(0, config.steps):
        slots = draws.labeled[0]  # (B,)
        ids = [cache.ids[row] for row in cache.view_rows[slots // views]]
        rows = torch.stack(
            [feature_of(image_id, view) for image_id, view in zip(ids, (slots % views).tolist(), strict=True)]
        )  # (B, W)
        logits = config.scale * rows @ normalize(weights, dim=-1).T + config.tau * log_prior
        sgd.param_groups[0]["lr"] = config.lr * cosine_rate(step, config.steps)
        sgd.zero_grad()
        cross_entropy(logits, draws.labels[0]).backward()
        sgd.step()
    return start, weights.detach()
