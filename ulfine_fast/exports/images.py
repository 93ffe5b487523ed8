"""Image files for a model that has its encoder inside: resized as the encoder would, by what config.json says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torchvision.transforms import Compose

from ulfine_fast.cache.io.errors import InputError, one_line
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.cache.pipeline.plan import batches_of
from ulfine_fast.cache.pipeline.read import ImageReader
from ulfine_fast.cache.pipeline.resample import Resampling
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.exports.config import IMAGES
from ulfine_fast.runs.predict import Predictions, Scorer, images_at, judged

if TYPE_CHECKING:
    from ulfine_fast.cache.sources.rows import Source
    from ulfine_fast.exports.load import Loaded

_PLAIN_ALONE = ViewRecipe(weak=0, strong=0)


def predict_without_encoder(
    model: Loaded, scorer: Scorer, images: Path | Any, batch_size: int, rate: float | None, coverage: float | None
) -> Predictions:
    """Classes of image files.

    Args:
        model: one that takes images.
        scorer: its outputs.
        images: an image, a folder of images at any depth, a table with a column `path`, or a data frame with one.
        batch_size: images read together, at least 1.
        rate: as `Loaded.predict_images` takes it.
        coverage: likewise.

    Raises:
        InputError: no images there, none readable, or nothing to calibrate rate or coverage on.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    scorer.check(rate, coverage)
    source = images_at(images)

    try:
        reader = image_reader(source, model.config[IMAGES])
    # of another program: names and types may be anything
    except Exception as error:
        reason = one_line(error)
        raise InputError(
            f"config.json in {model.folder} has a preprocessing that is not one of open_clip's ({reason}); export the "
            "run again"
        ) from error

    ids: list[str] = []
    skipped: list[tuple[str, str]] = []
    blocks, scores = [np.zeros((0, len(model.class_names)), np.float32)], [np.zeros(0, np.float32)]
    with progress_bar() as bar:
        task = bar.add_task("predict", total=len(source.rows), unit="images", note="")
        for rows in batches_of(source.rows, batch_size):
            batch = reader.read(rows)
            ids += [row.id for row in batch.kept]
            skipped += [(row.id, reason) for row, reason in batch.skipped]
            if batch.kept:
                pixels = reader.pixels_on(torch.device("cpu"), batch).numpy()
                blocks.append(scorer.probabilities(pixels))
                if rate is not None:
                    scores.append(scorer.scores(pixels))
            bar.advance(task, len(rows))
    if not ids:
        raise InputError(f"none of the {len(skipped)} images at {images} can be read; the first: {skipped[0][1]}")
    all_scores = None if rate is None else np.concatenate(scores)
    return judged(ids, np.concatenate(blocks), all_scores, skipped, scorer, rate, coverage)


def image_reader(
    source: Source, preprocessing: dict[str, Any], recipe: ViewRecipe = _PLAIN_ALONE, *, on_device: bool = False
) -> ImageReader:
    """A reader that makes images as the encoder's does; scaling and normalisation of the numbers are left out.

    Args:
        source: of the images.
        preprocessing: "open_clip" and "resampling" as config.json has them.
        recipe: of the drawn views.
        on_device: whether views are made on a device other than a processor.
    """
    settings = PreprocessCfg(**preprocessing["open_clip"])
    # the last two transforms scale and normalise
    transform = Compose(image_transform_v2(settings, is_train=False).transforms[:-2])
    side = settings.size if isinstance(settings.size, int) else settings.size[0]
    resampling = None if preprocessing["resampling"] is None else Resampling(**preprocessing["resampling"])
    return ImageReader(source, transform, recipe, side, resampling, on_device)
