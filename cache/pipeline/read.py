"""Rows of a source to images of the model's size: decoding, preprocessing and views, in whichever process it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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
_REDUCED_SIDES = 2
_PLAIN_ALONE = ViewRecipe(weak=0, strong=0)
_NOT_DRAWN = Drawing((0, 0, 0, 0), False, ())


class Batch(NamedTuple):
    """What was read of some rows: B images, and those that could not be read.

    Attributes:
        kept: the B rows.
        skipped: (row, reason) of the others.
        pixels: uint8 (B, V, H, W, 3), the plain view first, then weak, then strong ones; not normalised. Where the
            views are still to be made, uint8 (n,), the whole images one after another.
        scale: float32 (B, V - 1), fraction of the image's area in a view.
        flip: uint8 (B, V - 1), 1 where mirrored.
        seconds: that reading took.
        sampling: where the views are in whole images, None where they are made.
        drawn: (B V,), what was drawn for each view that is still to be made.
    """

    kept: list[Row]
    skipped: list[tuple[Row, str]]
    pixels: NDArray[np.uint8]
    scale: NDArray[np.float32]
    flip: NDArray[np.uint8]
    seconds: float
    sampling: Sampling | None = None
    drawn: tuple[Drawing, ...] = ()

    @property
    def views(self) -> int:
        """V, how many views each image has."""
        return self.scale.shape[1] + 1

    def pixels_of(self, start: int, stop: int) -> Batch:
        """The same with the pixels of images [start, stop) alone, for `ImageReader.pixels_on`."""
        if self.sampling is None:
            return self._replace(pixels=self.pixels[start:stop])
        sampling = Sampling(
            self.sampling.sizes[start:stop], self.sampling.windows[start:stop], self.sampling.mirrored[start:stop]
        )
        first, last = self.sampling.offsets[[start, stop]]
        drawn = self.drawn[start * self.views : stop * self.views]
        return self._replace(pixels=self.pixels[first:last], sampling=sampling, drawn=drawn)


class _ReadImage(NamedTuple):
    """One image with its views, or whole and with what is drawn for its views.

    Attributes:
        pixels: uint8 (V, H, W, 3), or (h, w, 3) of a whole image.
        scale: float32 (V - 1,).
        flip: uint8 (V - 1,).
        windows: float64 (V, 2, 2), where the views are in a whole image, see `Sampling`; else None.
        drawn: (V - 1,), of a whole image.
    """

    pixels: NDArray[np.uint8]
    scale: NDArray[np.float32]
    flip: NDArray[np.uint8]
    windows: NDArray[np.float64] | None = None
    drawn: Sequence[Drawing] = ()


@dataclass(frozen=True)
class ImageReader:
    """Rows -> all views of their images. It travels to reader processes.

    Attributes:
        source: of the images.
        resize: PIL image -> PIL image of the model's size, the evaluation preprocessing before normalisation.
        recipe: of the drawn views.
        image_size: H and W, in pixels.
        resampling: the same resizing for large images, which are reduced first; None to take all as they are.
        on_device: whether views are made on the device (`pixels_on`), so that images travel whole.
    """

    source: Source
    resize: Callable[[Image.Image], Image.Image]
    recipe: ViewRecipe
    image_size: int
    resampling: Resampling | None = None
    on_device: bool = False

    @classmethod
    def for_encoder(cls, source: Source, encoder: Encoder, recipe: ViewRecipe) -> ImageReader:
        """The reader for an encoder; it takes nothing of the model itself, which stays in the main process."""
        resampling = None if encoder.exact else encoder.resampling
        on_device = resampling is not None and encoder.device.type != "cpu"
        return cls(source, encoder.resize, recipe, encoder.spec.image_size, resampling, on_device)

    @property
    def image_bytes(self) -> int:
        """Bytes of one image in a batch: of its views, or of the largest whole image with sides as 1 to 2."""
        if not self.on_device:
            return (1 + self.recipe.weak + self.recipe.strong) * 3 * self.image_size**2
        return 3 * 2 * (2 * _REDUCED_SIDES * self.image_size) ** 2

    def read(self, rows: Sequence[Row]) -> Batch:
        """A batch of rows of one split; images that cannot be read are skipped."""
        started = time.perf_counter()
        kept: list[Row] = []
        skipped: list[tuple[Row, str]] = []
        images: list[_ReadImage] = []
        for row in rows:
            try:
                images.append(self._read_image(row))
                kept.append(row)
            except UnreadableImage as error:
                skipped.append((row, str(error)))

        sampling: Sampling | None = None
        drawn: tuple[Drawing, ...] = ()
        if not images:
            pixels = np.empty((0, 1, self.image_size, self.image_size, 3), np.uint8)
        elif self.on_device:
            pixels = np.concatenate([image.pixels.reshape(-1) for image in images])
            sampling, drawn = _sampling_of(images)
        else:
            pixels = np.stack([image.pixels for image in images])
        return Batch(
            kept=kept,
            skipped=skipped,
            pixels=pixels,
            scale=np.stack([image.scale for image in images]) if images else np.empty((0, 0), np.float32),
            flip=np.stack([image.flip for image in images]) if images else np.empty((0, 0), np.uint8),
            seconds=time.perf_counter() - started,
            sampling=sampling,
            drawn=drawn,
        )

    def pixels_on(self, device: torch.device, batch: Batch) -> torch.Tensor:
        """The views of a batch, made there if they are not yet: uint8 (B V, H, W, 3)."""
        pixels = torch.as_tensor(batch.pixels)
        if batch.sampling is None:
            return pixels.flatten(0, 1)
        return self._make_views(pixels.to(device, non_blocking=True), batch.sampling, batch.drawn)

    def _make_views(self, values: torch.Tensor, sampling: Sampling, drawn: Sequence[Drawing]) -> torch.Tensor:
        """Views of whole images, on the device of their pixels (n,): uint8 (B V, H, W, 3)."""
        assert self.resampling is not None
        views = resampled(values, sampling, self.resampling)  # (B, V, 3, S, S)
        return augmented(views.flatten(0, 1), drawn, self.recipe).permute(0, 2, 3, 1)

    def _read_image(self, row: Row) -> _ReadImage:
        """One image, whole where views are made on the device, else with its views."""
        image, size = self._load(row)
        if self.on_device:
            return self._whole(row, image, size)
        if image.size != size:  # reduced, so its views are made as a device makes them
            whole = self._whole(row, image, size)
            values = torch.from_numpy(whole.pixels.flatten())
            views = self._make_views(values, *_sampling_of([whole]))  # (V, S, S, 3)
            return _ReadImage(views.numpy(), whole.scale, whole.flip)
        plain = np.asarray(self.resize(image))[None]  # (1, H, W, 3)
        drawn = draw(image, row.id, self._recipe_of(row), image_size=self.image_size)
        return _ReadImage(np.concatenate([plain, drawn.pixels]), drawn.scale, drawn.flip)

    def _load(self, row: Row) -> tuple[Image.Image, tuple[int, int]]:
        """An image, reduced if it is large and that is wanted, and its own size (width, height)."""
        if self.resampling is None:
            image = self.source.read(row)
            return image, image.size
        short_side = _REDUCED_SIDES * self.image_size
        with no_finer_than(short_side) as decoding:
            image = self.source.read(row)
        size = decoding.whole
        if decoding.image is not image:
            # The source made it of what it loaded, and may have counted pixels there: nothing of it may be reduced.
            image = self.source.read(row) if decoding.image else image
            size = image.size
        return image.reduce(max(1, min(image.size) // short_side)), size

    def _whole(self, row: Row, image: Image.Image, size: tuple[int, int]) -> _ReadImage:
        """An image and where its views will be in it, drawn as for its own size (width, height)."""
        assert self.resampling is not None
        drawn = drawings(size, row.id, self._recipe_of(row), image_size=self.image_size)
        boxes = [self.resampling.cropped(drawing.box) for drawing in drawn]
        windows = np.array([self.resampling.whole(size[1], size[0]), *boxes])  # (V, 2, 2)
        # A pixel of a reduced image covers a whole number of pixels of the image, the last one perhaps fewer.
        windows /= round(min(size) / min(image.size))
        scale, flip = areas_and_flips(size, drawn)
        return _ReadImage(np.asarray(image), scale, flip, windows, drawn)

    def _recipe_of(self, row: Row) -> ViewRecipe:
        return self.recipe if row.split in VIEWED_SPLITS else _PLAIN_ALONE


def _sampling_of(images: Sequence[_ReadImage]) -> tuple[Sampling, tuple[Drawing, ...]]:
    """Where the V views of B whole images are in them, and what was drawn for each: (B V,), nothing for plain ones."""
    flip = np.stack([image.flip for image in images])  # (B, V - 1)
    sampling = Sampling(
        sizes=np.array([image.pixels.shape[:2] for image in images]),  # (B, 2)
        windows=np.stack([image.windows for image in images if image.windows is not None]),  # (B, V, 2, 2)
        mirrored=np.pad(flip.astype(bool), ((0, 0), (1, 0))),  # the plain view never is
    )
    return sampling, tuple(drawing for image in images for drawing in (_NOT_DRAWN, *image.drawn))
