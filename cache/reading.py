"""Rows of a source to pictures of the model's size: decoding, preprocessing and views, wherever it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.shard import VIEWED_SPLITS
from ulfine_fast.cache.sources.picture import UnreadablePicture
from ulfine_fast.cache.views import ViewRecipe, draw

if TYPE_CHECKING:
    from PIL import Image

    from ulfine_fast.cache.encoder import Encoder
    from ulfine_fast.cache.sources import Row, Source


class Batch(NamedTuple):
    """What was read: B pictures, and those that could not be.

    Attributes:
        kept: the B rows.
        skipped: (row, reason).
        pixels: uint8 (B, V, H, W, 3), the plain view first, then weak, then strong ones; not normalised.
        scale: float32 (B, V - 1), share of the picture's area in a view. flip: uint8 (B, V - 1), 1 where mirrored.
        seconds: that reading took.
    """

    kept: list[Row]
    skipped: list[tuple[Row, str]]
    pixels: NDArray[np.uint8]
    scale: NDArray[np.float32]
    flip: NDArray[np.uint8]
    seconds: float


class _Views(NamedTuple):
    """One picture: pixels uint8 (V, H, W, 3), scale (V - 1,), flip (V - 1,)."""

    pixels: NDArray[np.uint8]
    scale: NDArray[np.float32]
    flip: NDArray[np.uint8]


@dataclass(frozen=True)
class PictureReader:
    """Rows -> all views of their pictures. It travels to reader processes.

    Attributes:
        source: where pictures come from.
        resize: PIL picture -> PIL picture of the model's size, the evaluation preprocessing before normalisation.
        recipe: of the drawn views.
        image_size: H and W, in pixels.
    """

    source: Source
    resize: Callable[[Image.Image], Image.Image]
    recipe: ViewRecipe
    image_size: int

    @classmethod
    def of(cls, source: Source, encoder: Encoder, recipe: ViewRecipe) -> PictureReader:
        """The reader for an encoder; it takes nothing of the model itself, which stays in the main process."""
        return cls(source, encoder.resize, recipe, encoder.spec.image_size)

    def read(self, rows: Sequence[Row]) -> Batch:
        """A batch of rows of one split."""
        started = time.perf_counter()
        kept: list[Row] = []
        found: list[_Views] = []
        skipped: list[tuple[Row, str]] = []
        for row in rows:
            try:
                found.append(self._views(self.source.read(row), row))
                kept.append(row)
            except UnreadablePicture as error:
                skipped.append((row, str(error)))
        pixels, scale, flip = self._stacked(found)
        return Batch(kept, skipped, pixels, scale, flip, time.perf_counter() - started)

    def _views(self, picture: Image.Image, row: Row) -> _Views:
        plain = np.asarray(self.resize(picture))[None]  # (1, H, W, 3)
        recipe = self.recipe
        if row.split not in VIEWED_SPLITS or recipe.weak + recipe.strong == 0:
            return _Views(plain, np.empty(0, np.float32), np.empty(0, np.uint8))
        drawn = draw(picture, row.id, recipe, image_size=self.image_size)
        return _Views(np.concatenate([plain, drawn.pixels]), drawn.scale, drawn.flip)

    def _stacked(self, found: list[_Views]) -> _Views:
        """(B, ...) of what was read; B may be 0."""
        if not found:
            shape = (0, 1, self.image_size, self.image_size, 3)
            return _Views(np.empty(shape, np.uint8), np.empty((0, 0), np.float32), np.empty((0, 0), np.uint8))
        return _Views(*(np.stack(parts) for parts in zip(*found, strict=True)))
