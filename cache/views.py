"""Weak and strong views of a picture, the same whenever and wherever they are drawn."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from ulfine_fast.cache.errors import InputError

# Of RandAugment: magnitudes are 0..30, as in its paper and in torchvision.
_MAGNITUDES = 31
# A large crop is first averaged down to this many times the wanted size: faster, and hardly visible (PIL's advice).
_REDUCING_GAP = 3.0
# torchvision draws from torch's one generator of the process, so two threads must not draw at once.
_GENERATOR = threading.Lock()


@dataclass(frozen=True, slots=True)
class ViewRecipe:
    """How views are drawn; two equal recipes give equal views.

    Attributes:
        weak: Vw, number of weak views (random resized crop, flip), at least 0.
        strong: Vs, number of strong views (the same, then RandAugment), at least 0.
        seed: any whole number.
        weak_scale: smallest and largest share of the picture's area in a crop, 0 < low <= high <= 1; for both kinds.
        strong_ops: operations of RandAugment on a strong view, at least 0.
        strong_magnitude: their strength, 0..30.
    """

    weak: int = 1
    strong: int = 1
    seed: int = 0
    weak_scale: tuple[float, float] = (0.5, 1.0)
    strong_ops: int = 2
    strong_magnitude: int = 10

    def __post_init__(self) -> None:
        """Refuses values out of range with an InputError."""
        for name in ("weak", "strong", "strong_ops"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        low, high = self.weak_scale
        if not 0 < low <= high <= 1:
            raise InputError(f"weak_scale must hold 0 < low <= high <= 1, got {low:g} {high:g}")
        if not 0 <= self.strong_magnitude < _MAGNITUDES:
            raise InputError(f"strong_magnitude must be 0 to {_MAGNITUDES - 1}, got {self.strong_magnitude}")

    @property
    def kinds(self) -> list[str]:
        """The kind of each view in the order of `draw`: Vw times "weak", then Vs times "strong"."""
        return ["weak"] * self.weak + ["strong"] * self.strong


@dataclass(frozen=True, slots=True)
class Views:
    """The views of one picture, V = Vw + Vs, weak ones first.

    Attributes:
        pixels: uint8 (V, H, W, 3).
        scale: float32 (V,), share of the picture's area that the crop shows.
        flip: uint8 (V,), 1 where the view is mirrored.
    """

    pixels: NDArray[np.uint8]
    scale: NDArray[np.float32]
    flip: NDArray[np.uint8]


def view_seed(seed: int, id: str, kind: str, place: int) -> int:
    """Seed of one view: the first 8 bytes of sha256("seed/kind/place/id"), big-endian.

    The place counts from 0 inside the kind, so that asking for more weak views leaves all other views as they were.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{kind}/{place}/{id}".encode()).digest()[:8], "big")


def draw(picture: Image.Image, id: str, recipe: ViewRecipe, *, image_size: int) -> Views:
    """All views of a picture.

    Every view has a seed of its own (`view_seed`), so the result depends on the arguments alone: not on the order of
    the pictures, the process or the thread, and not on torch's random state, which is left as it was.

    Args:
        picture: RGB, any size.
        id: the row's id.
        recipe: what to draw.
        image_size: H and W, in pixels.
    """
    size = (image_size, image_size)
    pixels = np.empty((recipe.weak + recipe.strong, *size, 3), dtype=np.uint8)  # (V, H, W, 3)
    scale = np.empty(len(pixels), dtype=np.float32)
    flip = np.empty(len(pixels), dtype=np.uint8)
    # Places count inside each kind, as `view_seed` wants them.
    places = [*range(recipe.weak), *range(recipe.strong)]
    for view, (kind, place) in enumerate(zip(recipe.kinds, places, strict=True)):
        seed = view_seed(recipe.seed, id, kind, place)
        image, scale[view], flip[view] = _draw_one(picture, seed, recipe, kind == "strong", image_size)
        pixels[view] = np.asarray(image)
    return Views(pixels, scale, flip)


def _draw_one(
    picture: Image.Image, seed: int, recipe: ViewRecipe, strong: bool, image_size: int
) -> tuple[Image.Image, float, int]:
    """One view as a picture of the model's size, the crop's share of the area, and whether it is mirrored."""
    crop, augment = _transforms(recipe)
    with _GENERATOR, torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed every GPU, which takes longer than the whole view.
        torch.default_generator.manual_seed(seed)
        box = crop.make_params([picture])
        mirrored = bool(torch.rand(()) < 0.5)
        after = torch.get_rng_state() if strong else None
    # The costly part needs no random number, so it runs outside of the lock.
    image = _resized_crop(picture, box, image_size)
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if after is not None:
        with _GENERATOR, torch.random.fork_rng(devices=[]):
            torch.set_rng_state(after)
            image = augment(image)
    share = box["height"] * box["width"] / (picture.height * picture.width)
    return image, share, int(mirrored)


@cache
def _transforms(recipe: ViewRecipe) -> tuple[v2.RandomResizedCrop, v2.RandAugment]:
    """The transforms for a recipe; the crop serves only to draw boxes, so its size does not matter."""
    crop = v2.RandomResizedCrop(1, scale=recipe.weak_scale)
    return crop, v2.RandAugment(recipe.strong_ops, recipe.strong_magnitude, num_magnitude_bins=_MAGNITUDES)


def _resized_crop(picture: Image.Image, box: dict[str, int], size: int) -> Image.Image:
    """Crop and bicubic resize in one step, without a copy of the crop."""
    left, top = box["left"], box["top"]
    corners = (left, top, left + box["width"], top + box["height"])
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=corners, reducing_gap=_REDUCING_GAP)
