"""Rows of a source to images of the model's size: decoding, preprocessing and views, wherever it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ulfine_fast.cache.pipeline.resample import Resampling, Sampling, resampled
from ulfine_fast.cache.pipeline.views import Drawing, ViewRecipe, areas_and_flips, augmented, draw, drawings
from ulfine_fast.cache.shard import VIEWED_SPLITS
from ulfine_fast.cache.sources.image import UnreadableImage, no_finer_than

if TYPE_CHECKING:
    from PIL import Image

    from ulfine_fast.cache.models.encoder import Encoder
    from ulfine_fast.cache.sources import Row, Source

# A large image that travels whole keeps at least this many times the model's side: less than twice that, so that a
# batch has a largest size, and what is lost can hardly be seen in the features (`benchmarks.studies.agreement`).
_ENOUGH = 2


class Batch(NamedTuple):
    """What was read: B images, and those that could not be.

    Attributes:
        kept: the B rows.
        skipped: (row, reason).
        pixels: uint8 (B, V, H, W, 3), the plain view first, then weak, then strong ones; not normalised. Where the
            views are still to be made, uint8 (n,), the whole images one after another.
        scale: float32 (B, V - 1), share of the image's area in a view. flip: uint8 (B, V - 1), 1 where mirrored.
        seconds: that reading took.
        sampling: how the views lie in whole images, None where they are made. drawn: (B V,), strong ones' operations.
    """

    kept: list[Row]
    skipped: list[tuple[Row, str]]
    pixels: NDArray[np.uint8]
    scale: NDArray[np.float32]
    flip: NDArray[np.uint8]
    seconds: float
    sampling: Sampling | None = None
    drawn: tuple[Drawing, ...] = ()


class _Views(NamedTuple):
    """One image: pixels uint8 (V, H, W, 3), scale (V - 1,), flip (V - 1,)."""

    pixels: NDArray[np.uint8]
    scale: NDArray[np.float32]
    flip: NDArray[np.uint8]


class _Whole(NamedTuple):
    """One image (h, w, 3) whose views are still to be made: windows (V, 2, 2), what was drawn, and of it (V - 1,)."""

    pixels: NDArray[np.uint8]
    windows: NDArray[np.float64]
    drawn: list[Drawing]
    scale: NDArray[np.float32]
    flip: NDArray[np.uint8]


_Made = TypeVar("_Made")
_PLAIN_ALONE = ViewRecipe(weak=0, strong=0)
_NOTHING = Drawing((0, 0, 0, 0), False, ())


@dataclass(frozen=True)
class ImageReader:
    """Rows -> all views of their images. It travels to reader processes.

    Attributes:
        source: where images come from.
        resize: PIL image -> PIL image of the model's size, the evaluation preprocessing before normalisation.
        recipe: of the drawn views.
        image_size: H and W, in pixels.
        resampling: the same resizing for large images, which are reduced before; None to take all as they are.
        later: whether views are made on the device (`pixels_on`), so that images travel whole.
    """

    source: Source
    resize: Callable[[Image.Image], Image.Image]
    recipe: ViewRecipe
    image_size: int
    resampling: Resampling | None = None
    later: bool = False

    @classmethod
    def of(cls, source: Source, encoder: Encoder, recipe: ViewRecipe) -> ImageReader:
        """The reader for an encoder; it takes nothing of the model itself, which stays in the main process."""
        resampling = None if encoder.exact else encoder.resampling
        later = resampling is not None and encoder.device.type != "cpu"
        return cls(source, encoder.resize, recipe, encoder.spec.image_size, resampling, later)

    @property
    def image_bytes(self) -> int:
        """What one image comes to: its views, or the most that an oblong one has as a whole."""
        if not self.later:
            return (1 + self.recipe.weak + self.recipe.strong) * 3 * self.image_size**2
        return 3 * 2 * (2 * _ENOUGH * self.image_size) ** 2

    def read(self, rows: Sequence[Row]) -> Batch:
        """A batch of rows of one split."""
        started = time.perf_counter()
        if self.later:
            kept, whole, skipped = self._each(rows, lambda row: self._placed(row, *self._loaded(row)))
            return self._joined(kept, skipped, whole, started)
        kept, found, skipped = self._each(rows, self._views)
        pixels, scale, flip = self._stacked(found)
        return Batch(kept, skipped, pixels, scale, flip, time.perf_counter() - started)

    def pixels_on(self, device: torch.device, batch: Batch) -> torch.Tensor:
        """The views of a batch, made there if they are not yet: uint8 (B V, H, W, 3)."""
        pixels = torch.as_tensor(batch.pixels)
        if batch.sampling is None or self.resampling is None:
            return pixels.flatten(0, 1)
        views = resampled(pixels.to(device, non_blocking=True), batch.sampling, self.resampling)  # (B, V, 3, S, S)
        return augmented(views.flatten(0, 1), batch.drawn, self.recipe).permute(0, 2, 3, 1)

    def _each(
        self, rows: Sequence[Row], work: Callable[[Row], _Made]
    ) -> tuple[list[Row], list[_Made], list[tuple[Row, str]]]:
        """What can be read, what was made of it, and what cannot."""
        kept: list[Row] = []
        found: list[_Made] = []
        skipped: list[tuple[Row, str]] = []
        for row in rows:
            try:
                found.append(work(row))
                kept.append(row)
            except UnreadableImage as error:
                skipped.append((row, str(error)))
        return kept, found, skipped

    def _recipe_of(self, row: Row) -> ViewRecipe:
        return self.recipe if row.split in VIEWED_SPLITS else _PLAIN_ALONE

    def _views(self, row: Row) -> _Views:
        image, size = self._loaded(row)
        if image.size != size:
            return self._views_of_reduced(self._placed(row, image, size))
        plain = np.asarray(self.resize(image))[None]  # (1, H, W, 3)
        drawn = draw(image, row.id, self._recipe_of(row), image_size=self.image_size)
        return _Views(np.concatenate([plain, drawn.pixels]), drawn.scale, drawn.flip)

    def _views_of_reduced(self, whole: _Whole) -> _Views:
        here = self.pixels_on(torch.device("cpu"), self._joined([], [], [whole], 0.0))  # (V, S, S, 3)
        return _Views(here.numpy(), whole.scale, whole.flip)

    def _loaded(self, row: Row) -> tuple[Image.Image, tuple[int, int]]:
        """An image, reduced if it is large and that is wanted, and the size (width, height) that it had."""
        if self.resampling is None:
            image = self.source.read(row)
            return image, image.size
        enough = _ENOUGH * self.image_size
        with no_finer_than(enough) as decoding:
            image, size = self.source.read(row), decoding.whole
        if decoding.image is not image:
            # The source made it of what it loaded, and may have counted pixels there: nothing of it may be reduced.
            image = self.source.read(row) if decoding.image else image
            size = image.size
        return image.reduce(max(1, min(image.size) // enough)), size

    def _placed(self, row: Row, image: Image.Image, size: tuple[int, int]) -> _Whole:
        """An image, and where its views will lie in it, drawn as for its own size (width, height)."""
        assert self.resampling is not None
        found = drawings(size, row.id, self._recipe_of(row), image_size=self.image_size)
        boxes = [self.resampling.cropped(one.box) for one in found]
        windows = np.array([self.resampling.whole(size[1], size[0]), *boxes])  # (V, 2, 2)
        # A pixel of a reduced image stands for a whole number of them, the last one perhaps for less.
        windows /= round(min(size) / min(image.size))
        return _Whole(np.asarray(image), windows, found, *areas_and_flips(size, found))

    def _joined(self, kept: list[Row], skipped: list[tuple[Row, str]], found: list[_Whole], started: float) -> Batch:
        """A batch of whole images."""
        if not found:
            return Batch(kept, skipped, *self._stacked([]), time.perf_counter() - started)
        sizes = np.array([one.pixels.shape[:2] for one in found])  # (B, 2)
        flip = np.stack([one.flip for one in found])  # (B, V - 1)
        mirrored = np.pad(flip.astype(bool), ((0, 0), (1, 0)))  # the plain view never is
        sampling = Sampling(sizes, np.stack([one.windows for one in found]), mirrored)
        pixels = np.concatenate([one.pixels.reshape(-1) for one in found])
        scale = np.stack([one.scale for one in found])
        drawn = tuple(view for one in found for view in (_NOTHING, *one.drawn))
        return Batch(kept, skipped, pixels, scale, flip, time.perf_counter() - started, sampling, drawn)

    def _stacked(self, found: list[_Views]) -> _Views:
        """(B, ...) of what was read; B may be 0."""
        if not found:
            shape = (0, 1, self.image_size, self.image_size, 3)
            return _Views(np.empty(shape, np.uint8), np.empty((0, 0), np.float32), np.empty((0, 0), np.uint8))
        return _Views(*(np.stack(parts) for parts in zip(*found, strict=True)))
