"""Weak and strong views of an image, the same whenever and wherever they are drawn."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from ulfine_fast.cache.io.device import upload
from ulfine_fast.cache.io.errors import InputError

# Of RandAugment: magnitudes are 0..30, as in its paper and in torchvision.
_MAGNITUDES = 31
# A large crop is first averaged down to this many times the wanted size: faster, and hardly visible (as PIL advises).
_REDUCING_GAP = 3.0
# torchvision draws from torch's one generator of the process, so two threads must not draw together.
_GENERATOR = threading.Lock()


@dataclass(frozen=True, slots=True)
class ViewRecipe:
    """How views are drawn; two equal recipes give equal views.

    Attributes:
        weak: Vw, number of weak views (random resized crop, flip), at least 0.
        strong: Vs, number of strong views (the same, then RandAugment), at least 0.
        seed: any whole number.
        weak_scale: smallest and largest fraction of the image's area in a crop, 0 < low <= high <= 1; for both kinds.
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
    """The views of one image, V = Vw + Vs, weak ones first.

    Attributes:
        pixels: uint8 (V, H, W, 3).
        scale: float32 (V,), fraction of the image's area that the crop shows.
        flip: uint8 (V,), 1 where the view is mirrored.
    """

    pixels: NDArray[np.uint8]
    scale: NDArray[np.float32]
    flip: NDArray[np.uint8]


def view_seed(seed: int, id: str, kind: str, index: int) -> int:
    """Seed of one view: the first 8 bytes of sha256("seed/kind/index/id"), big-endian.

    The index counts from 0 inside the kind, so that asking for more weak views leaves all other views as they were.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{kind}/{index}/{id}".encode()).digest()[:8], "big")


@dataclass(frozen=True, slots=True)
class Drawing:
    """The random choices for one view, made before any pixel is changed.

    Attributes:
        box: left, top, right and bottom of the crop, in whole pixels of the image.
        mirrored: whether it is then mirrored.
        operations: of RandAugment, in order: name and magnitude.
    """

    box: tuple[int, int, int, int]
    mirrored: bool
    operations: tuple[tuple[str, float], ...]


def draw(image: Image.Image, id: str, recipe: ViewRecipe, *, image_size: int) -> Views:
    """All views of an image, made with PIL.

    The result depends on the arguments alone, as that of `drawings` does.

    Args:
        image: RGB, any size.
        id: the row's id.
        recipe: what to draw.
        image_size: H and W, in pixels.
    """
    drawn = drawings(image.size, id, recipe, image_size=image_size)
    pixels = np.empty((len(drawn), image_size, image_size, 3), dtype=np.uint8)  # (V, H, W, 3)
    for view, drawing in enumerate(drawn):
        pixels[view] = np.asarray(_make_view(image, drawing, recipe, image_size))
    scale, flip = areas_and_flips(image.size, drawn)
    return Views(pixels, scale, flip)


def drawings(size: tuple[int, int], id: str, recipe: ViewRecipe, *, image_size: int) -> list[Drawing]:
    """What is drawn for the V views of an image of that size (width, height), weak ones first.

    Every view has a seed of its own (`view_seed`), so the result depends on the arguments alone: not on the order of
    the images, the process or the thread, and not on torch's random state, which is left as it was.
    """
    crop, augment = _transforms(recipe)
    indices = [*range(recipe.weak), *range(recipe.strong)]
    drawn = []
    with _GENERATOR, torch.random.fork_rng(devices=[]):
        for kind, index in zip(recipe.kinds, indices, strict=True):
            # torch.manual_seed would also seed every GPU, which takes longer than the whole view.
            torch.default_generator.manual_seed(view_seed(recipe.seed, id, kind, index))
            # torchvision asks an image for its size; this one has no pixels
            box = crop.make_params([torch.empty(3, size[1], size[0], device="meta")])
            left, top = box["left"], box["top"]
            mirrored = bool(torch.rand(()) < 0.5)
            operations = augment.draw(image_size) if kind == "strong" else ()
            drawn.append(Drawing((left, top, left + box["width"], top + box["height"]), mirrored, operations))
    return drawn


def areas_and_flips(size: tuple[int, int], drawn: Sequence[Drawing]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """`Views.scale` and `Views.flip` of what was drawn for an image of that size (width, height)."""
    boxes = [drawing.box for drawing in drawn]
    whole = size[0] * size[1]
    areas = [(right - left) * (bottom - top) / whole for left, top, right, bottom in boxes]
    return np.array(areas, dtype=np.float32), np.array([drawing.mirrored for drawing in drawn], dtype=np.uint8)


def augmented(views: torch.Tensor, drawn: Sequence[Drawing], recipe: ViewRecipe) -> torch.Tensor:
    """RandAugment on a batch of views, the same operations together.

    Args:
        views: uint8 (N, 3, H, W), on any device; changed in place.
        drawn: (N,), what was drawn for each.
        recipe: that they were drawn from.
    """
    augment = _transforms(recipe)[1]
    groups: list[tuple[tuple[str, float], list[int]]] = []
    for step in range(recipe.strong_ops):
        rows_by_operation: dict[tuple[str, float], list[int]] = {}
        for row, drawing in enumerate(drawn):
            if step < len(drawing.operations):
                rows_by_operation.setdefault(drawing.operations[step], []).append(row)
        groups += rows_by_operation.items()

    # the rows of all groups travel together, as an index made for each group would wait for the one before
    index = upload(torch.tensor([row for _, rows in groups for row in rows], dtype=torch.int64), views.device)
    parts = index.split([len(rows) for _, rows in groups]) if groups else ()
    for (operation, _), rows_of_group in zip(groups, parts, strict=True):
        views.index_copy_(0, rows_of_group, augment.apply(views.index_select(0, rows_of_group), operation))
    return views


def _make_view(image: Image.Image, drawing: Drawing, recipe: ViewRecipe, size: int) -> Image.Image:
    """One view of size x size pixels; crop and bicubic resize in one step, without a copy of the crop."""
    view = image.resize((size, size), Image.Resampling.BICUBIC, box=drawing.box, reducing_gap=_REDUCING_GAP)
    if drawing.mirrored:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for operation in drawing.operations:
        view = _transforms(recipe)[1].apply(view, operation)
    return view


class _Augment(v2.RandAugment):
    """torchvision's RandAugment in two steps, so that drawn operations can be applied elsewhere, and to many images."""

    def draw(self, size: int) -> tuple[tuple[str, float], ...]:
        """Operations and magnitudes for a square of `size` pixels, with the random numbers of `forward`."""
        operations = []
        for _ in range(self.num_ops):
            name, (magnitudes_of, signed) = self._get_random_item(self._AUGMENTATION_SPACE)
            magnitudes = magnitudes_of(self.num_magnitude_bins, size, size)
            magnitude = 0.0 if magnitudes is None else float(magnitudes[self.magnitude])
            if magnitudes is not None and signed and torch.rand(()) <= 0.5:
                magnitude = -magnitude
            operations.append((name, magnitude))
        return tuple(operations)

    def apply(self, image: Any, operation: tuple[str, float]) -> Any:
        """One operation on a PIL image, or on a tensor (..., 3, H, W)."""
        return self._apply_image_or_video_transform(
            image, *operation, interpolation=self.interpolation, fill=self._fill
        )


@cache
def _transforms(recipe: ViewRecipe) -> tuple[v2.RandomResizedCrop, _Augment]:
    """The transforms for a recipe; the crop serves only to draw boxes, so its size does not matter."""
    crop = v2.RandomResizedCrop(1, scale=recipe.weak_scale)
    return crop, _Augment(recipe.strong_ops, recipe.strong_magnitude, num_magnitude_bins=_MAGNITUDES)
