"""Five crops of an image for predictions: four corners and the middle, as LIFT takes them (arXiv 2309.10019)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from ulfine_fast.cache.pipeline.read import ImageReader

NUM_CROPS = 5
_SIDE = 224 / 248  # of a crop, as a fraction of the shorter side: crops of 224 of an image resized to 248


@dataclass(frozen=True)
class Cropped:
    """The evaluation preprocessing of one crop of an image. It travels to reader processes.

    Attributes:
        resize: PIL image -> PIL image of the model's size, the preprocessing of a whole one.
        crop: which crop, 0 to 4, see `crop_box`.
    """

    resize: Callable[[Image.Image], Image.Image]
    crop: int

    def __call__(self, image: Image.Image) -> Image.Image:
        """That crop at the model's size."""
        return self.resize(image.crop(crop_box(image.size, self.crop)))


def crop_box(size: tuple[int, int], crop: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a square crop, in pixels.

    Args:
        size: width and height of the image, in pixels.
        crop: 0 to 3 for the corners, row by row; 4 for the middle.
    """
    width, height = size
    side = max(1, round(_SIDE * min(size)))
    if crop == NUM_CROPS - 1:
        left, top = (width - side) // 2, (height - side) // 2
    else:
        left, top = (width - side) * (crop % 2), (height - side) * (crop // 2)
    return left, top, left + side, top + side


def cropped(reader: ImageReader, crop: int) -> ImageReader:
    """The reader of one crop of each image; images are read exactly, none is reduced first."""
    return replace(reader, resize=Cropped(reader.resize, crop), resampling=None, on_device=False)
